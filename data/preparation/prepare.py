"""Sources -> one prepared data directory: the plan, and the report of what became of the rows."""

import hashlib
import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as PrintedTable

from data.index import token_dtype
from data.preparation.encoder import ChatEncoder
from data.preparation.files import open_source
from data.preparation.options import PrepareOptions
from data.preparation.output import check_output
from data.preparation.prompt import load_prompt
from data.preparation.rows import JsonLines, Table
from data.preparation.tokenizer import load_tokenizer, tokenizer_fingerprint
from data.preparation.where import Where
from data.preparation.workers import HoldOut, Job, join_parts, make_parts, write_whole

FORMAT = 1  # rises when the same rows would give other documents, so that no old parts are continued


def prepare(options: PrepareOptions, console: Console | None = None) -> dict[str, Any]:
    """Prepares the data, prints what became of it and returns the content of meta.json.

    Raises ValueError for what the user can mend, RuntimeError where a worker process was killed.
    """
    console = console or Console()
    inputs = (*options.sources, options.model, options.tokenizer, options.chat_template, options.prompt)
    check_output(options.output, inputs, overwrite=options.overwrite)
    tokenizer_of = options.tokenizer or options.model
    assert tokenizer_of is not None, "PrepareOptions checks it"
    tokenizer = load_tokenizer(tokenizer_of, options.chat_template)
    _check_vocabulary(options, len(tokenizer))
    sources = _open(options)
    chunks = _plan(sources, options.limit)
    prompt = load_prompt(options.prompt) if options.prompt else None
    where = Where(options.where, lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]))
    plan = {
        "format": FORMAT,
        "options": _recorded(options) | {"prompt": None if prompt is None else vars(prompt)},
        "sources": [source.identity for source in sources],
        "chat_template": tokenizer.chat_template,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "chunks": len(chunks),
    }
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    if (done := _already_there(options, digest, console)) is not None:
        return done
    parts = options.output.with_name(options.output.name + ".parts")
    now = _start_or_continue(parts, digest, len(chunks), console)
    job = Job(
        encoder=ChatEncoder(tokenizer, now=now),
        sources=sources,
        chunks=chunks,
        fields=options.fields,
        prompt=prompt,
        where=where,
        parts=parts,
        dtype=token_dtype(len(tokenizer)),
        strict=options.strict,
    )
    make_parts(job, options.num_workers, console)
    meta = {key: plan[key] for key in ("tokenizer_fingerprint", "chat_template", "options")}
    meta |= {"plan": digest, "end_token_ids": job.encoder.end_token_ids()}
    meta |= {"end_tokens": tokenizer.convert_ids_to_tokens(meta["end_token_ids"])}
    if "strftime_now" in tokenizer.chat_template:
        meta["date"] = now.isoformat()
    hold_out = HoldOut(options.hold_out, options.hold_out_fraction, options.seed)
    meta = join_parts(job, options.output, tokenizer, meta, hold_out, options.overwrite)
    shutil.rmtree(parts)
    _report(meta, options.output, console)
    return meta


def _recorded(options: PrepareOptions) -> dict[str, Any]:
    """The options that decide what is written, as JSON."""
    kept = {key: value for key, value in vars(options).items() if key not in _NOT_RECORDED}
    return kept | {"fields": vars(options.fields), "sources": list(options.sources)}


_NOT_RECORDED = ("output", "num_workers", "overwrite", "prompt", "chat_template")


def _check_vocabulary(options: PrepareOptions, size: int) -> None:
    """Refuses a tokenizer with more tokens than the model has embeddings, where a config file says so."""
    file = Path(options.model or "") / "config.json"
    rows = json.loads(file.read_text()).get("vocab_size") if options.model and file.is_file() else None
    if rows is not None and size > rows:
        raise ValueError(
            f"--tokenizer {options.tokenizer or options.model} has {size} tokens, {options.model} has"
            f" embeddings for {rows}: choose the tokenizer that belongs to the model"
        )


def _open(options: PrepareOptions) -> list[JsonLines | Table]:
    try:
        return [file for name in options.sources for file in open_source(name, options.config, options.split)]
    except ValueError as error:
        raise ValueError(f"--sources {error}") from error


def _plan(sources: list[JsonLines | Table], limit: int | None) -> list[tuple[int, int, int]]:
    chunks, left = [], limit
    for number, source in enumerate(sources):
        ranges, rows = source.chunks(left)
        chunks += [(number, start, stop) for start, stop in ranges]
        if left is not None:
            left -= rows or 0
    if not chunks:
        raise ValueError("--sources: there are no rows")
    return chunks


def _already_there(options: PrepareOptions, digest: str, console: Console) -> dict[str, Any] | None:
    """The meta of an output that is complete already; one made otherwise is refused."""
    if not options.output.exists() or options.overwrite:
        return None
    file = options.output / "meta.json"
    meta = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if meta.get("plan") == digest:
        console.print(f"{options.output} is there already, made from these sources with these options")
        return meta
    raise ValueError(f"--output {options.output} exists: choose another, or replace it with --overwrite")


def _start_or_continue(parts: Path, digest: str, chunks: int, console: Console) -> datetime:
    """Makes the directory of parts, or keeps one of the same plan; returns the date of the plan."""
    file = parts / "plan.json"
    plan = json.loads(file.read_text()) if file.is_file() else {}
    if plan.get("digest") != digest:
        if parts.exists():
            console.print(f"{parts} is of other sources or options: starting anew")
            shutil.rmtree(parts)
        parts.mkdir(parents=True)
        plan = {"digest": digest, "date": datetime.now().isoformat()}
        write_whole(file, json.dumps(plan).encode())
    elif done := len(list(parts.glob("*.npz"))):
        console.print(f"continuing: {done:,} of {chunks:,} chunks are there already")
    return datetime.fromisoformat(plan["date"])


def _report(meta: dict[str, Any], output: Path, console: Console) -> None:
    """Prints the counts, every reason for which rows were dropped, and what deserves a look."""
    table = PrintedTable(title=str(output), show_header=False)
    dropped = sum(drop["count"] for drop in meta["dropped"].values())
    for name in ("rows", "filtered", "documents", "held_out", "tokens", "supervised_tokens", "longest"):
        if name != "filtered" or meta[name]:
            table.add_row(name.replace("_", " "), f"{meta[name]:,}")
    table.add_row("dropped", f"{dropped:,}")
    console.print(table)
    for reason, drop in meta["dropped"].items():
        line = f"dropped {drop['count']:,}: {reason}, first {drop['first']}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if dropped:
        console.print(f"the dropped rows are kept in {output / 'dropped.jsonl'}")
    if not meta["end_token_ids"]:
        console.print("warning: no token of its own ends a turn in this template: generation will not stop")
    notes = {
        "open_turns": "assistant turns end with no end token or text in this template",
        "rewritten_turns": "assistant turns were changed by the template (such as earlier thinking left out)",
        "straddling_tokens": "supervised tokens hold characters on both sides of a turn's boundary",
    }
    for name, note in notes.items():
        if meta[name]:
            console.print(f"note: {meta[name]:,} {note}")
