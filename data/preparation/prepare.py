"""Sources -> one prepared data directory: the plan, and the calls that carry it out."""

import errno
import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from data.index import token_dtype
from data.preparation.data_report import write_data_report
from data.preparation.decontaminate import Questions
from data.preparation.dropped import printable
from data.preparation.encoder import ChatEncoder
from data.preparation.files import left_alone, open_source
from data.preparation.formats import Fields, RowReader
from data.preparation.job import Chunk, Job, Reading, SourceFile
from data.preparation.join import join_parts
from data.preparation.lock import only_one
from data.preparation.options import PrepareOptions
from data.preparation.output import UNPACKED, check_output, clear_parts
from data.preparation.parts import write_whole
from data.preparation.preview import preview
from data.preparation.prompt import Prompt, load_prompt
from data.preparation.rows import JsonLines, Table
from data.preparation.sources import Source
from data.preparation.summary import print_summary
from data.preparation.tokenizer import load_tokenizer, tokenizer_fingerprint, tokenizer_state
from data.preparation.trained_on import TrainedOn
from data.preparation.where import Where
from data.preparation.workers import make_parts

FORMAT = 2  # rises when the same rows would give other documents, so that no old parts are continued
_NOT_RECORDED = ("output", "num_workers", "overwrite", "preview", "chat_template")  # the template's text is


def prepare(options: PrepareOptions, console: Console | None = None) -> dict[str, Any]:
    """Prepares the data, prints what became of it and returns the content of meta.json; {} after a preview.

    Raises ValueError for what the user can mend, RuntimeError where a worker process was killed, OSError where a file
    cannot be read or written.
    """
    console = console or Console()
    options.check_complete()
    if options.preview:
        with tempfile.TemporaryDirectory() as scratch:
            inputs = _open(options, Path(scratch), console)
            preview(_job(options, inputs, Path(scratch)), options.preview, inputs.tokenizer, console)
        return {}
    assert options.output is not None, "check_complete checks it"
    output = options.output
    check_output(output, _paths(options), overwrite=options.overwrite)
    parts = output.with_name(output.name + ".parts")
    try:
        with only_one(parts, output):
            return _prepare(options, output, parts, console)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                f"No space left on the disk of {error.filename or parts}: make room there and run the same command"
                " again, it will continue"
            ) from error
        raise


def _prepare(options: PrepareOptions, output: Path, parts: Path, console: Console) -> dict[str, Any]:
    inputs = _open(options, parts / UNPACKED, console)
    tokenizer = inputs.tokenizer
    plan = {
        "format": FORMAT,
        "options": _recorded(options, inputs.sources),
        "files": inputs.identities,
        "chat_template": tokenizer.chat_template,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "tokenizer": tokenizer_state(tokenizer),
        "chunks": len(inputs.chunks),
    }
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    if (done := _already_there(output, digest, options.overwrite, console)) is not None:
        clear_parts(parts)
        return done
    now = _start_or_continue(parts, digest, len(inputs.chunks), console)
    job = _job(options, inputs, parts, now)
    make_parts(job, options.num_workers, console)
    meta = {key: plan[key] for key in ("tokenizer_fingerprint", "chat_template", "options")}
    meta |= {"plan": digest, "end_token_ids": job.encoder.end_token_ids(), "notes": job.encoder.notes}
    meta |= {"end_tokens": tokenizer.convert_ids_to_tokens(meta["end_token_ids"])}
    if "strftime_now" in json.dumps(tokenizer.chat_template):
        meta["date"] = now.isoformat()
    hold_out = options.hold_out or options.hold_out_fraction
    meta = join_parts(
        job, inputs.sources, output, tokenizer, meta, hold_out=hold_out, seed=options.seed, overwrite=options.overwrite
    )
    clear_parts(parts)
    write_data_report(output, tokenizer)
    print_summary(meta, output, console)
    return meta


@dataclass(frozen=True)
class Inputs:
    """What is read before any row is prepared."""

    tokenizer: Any
    sources: list[Source]  # with their prompts loaded
    files: list[SourceFile]
    chunks: list[Chunk]
    readings: list[Reading]
    questions: Questions | None
    identities: list[str]  # of all files; they change when one does


def _open(options: PrepareOptions, scratch: Path, console: Console) -> Inputs:
    """Loads the tokenizer and opens every file; `scratch` is where compressed ones may be unpacked."""
    tokenizer_of = options.tokenizer or options.model
    assert tokenizer_of is not None, "check_complete checks it"
    needs_template = any(source.format not in ("rendered", "text") for source in options.each_source())
    tokenizer = load_tokenizer(tokenizer_of, options.chat_template, needs_template=needs_template)
    _check_vocabulary(options, len(tokenizer))
    added = tuple(token.content for token in tokenizer.added_tokens_decoder.values())
    sources, readings = [], []
    files: list[SourceFile] = []
    chunks: list[Chunk] = []
    given = options.each_source()
    for number, source in enumerate(given):
        source = replace(source, prompt=_loaded(source.prompt))
        where = Where(source.where or (), lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]))
        reader = _reader(source, added, of=f"--sources {source.name}: " if len(given) > 1 else "")
        try:
            opened = open_source(source.data, source.config, source.split, scratch=scratch)
        except ValueError as error:
            raise ValueError(f"--sources {error}") from error
        if alone := left_alone(source.data):
            said = printable(f"{source.name}: not rows, and left alone: {', '.join(alone)}")
            console.print(said, markup=False, soft_wrap=True)
        chunks += _plan(opened, len(files), source.limit, where)
        files += [SourceFile(number, rows) for rows in opened]
        readings.append(Reading(source.name or "", reader, where))
        sources.append(source)
    if not chunks:
        raise ValueError(f"--sources: there are no rows in {', '.join(source.data for source in sources)}")
    questions, compared = _questions(options, scratch)
    identities = [file.rows.identity for file in files] + compared
    return Inputs(tokenizer, sources, files, chunks, readings, questions, identities)


def _reader(source: Source, added: tuple[str, ...], of: str) -> RowReader:
    """The reader of a source's rows; `of` begins what is said of options that do not go together (ValueError)."""
    try:
        return RowReader(
            format=source.format or "auto",
            fields=source.fields or Fields(),
            prompt=source.prompt if isinstance(source.prompt, Prompt) else None,
            system=source.system,
            ignore_columns=source.ignore_columns or (),
            special_tokens=added,
        )
    except ValueError as error:
        raise ValueError(f"{of}{error}") from None


def _loaded(prompt: str | Path | Prompt | None) -> Prompt | None:
    return prompt if isinstance(prompt, Prompt | None) else load_prompt(prompt)


def _plan(opened: list[JsonLines | Table], first: int, limit: int | None, where: Where) -> list[Chunk]:
    """The chunks of a source's files, of which the first has the number `first`."""
    chunks, left = [], limit
    for number, rows in enumerate(opened):
        ranges, counted = rows.chunks(left, where if where.expressions else None)
        chunks += [Chunk(first + number, start, stop) for start, stop in ranges]
        if left is not None:
            left -= counted or 0
    return chunks


def _questions(options: PrepareOptions, scratch: Path) -> tuple[Questions | None, list[str]]:
    """The test questions that rows are compared with, and the identities of their files."""
    if not options.decontaminate:
        return None, []
    questions, identities = Questions(options.ngram), []
    for name in options.decontaminate:
        try:
            opened = open_source(name, None, None, scratch=scratch)
        except ValueError as error:
            raise ValueError(f"--decontaminate {error}") from error
        questions.add_file(name, opened)
        identities += [rows.identity for rows in opened]
    return questions, identities


def _job(options: PrepareOptions, inputs: Inputs, parts: Path, now: datetime | None = None) -> Job:
    trained_on = TrainedOn(
        turns=options.train_on,
        mask_tool_output=options.mask_tool_output,
        stripped_thinking=options.stripped_thinking,
        template_args=options.template_args,
    )
    try:
        encoder = ChatEncoder(inputs.tokenizer, now=now, options=trained_on, hashed=options.dedup != "none")
    except ValueError as error:
        template = options.chat_template or f"of {options.tokenizer or options.model}"
        raise ValueError(f"--chat-template {template}: {error}: give another") from error
    return Job(
        encoder=encoder,
        sources=inputs.readings,
        files=inputs.files,
        chunks=inputs.chunks,
        parts=parts,
        dtype=token_dtype(len(inputs.tokenizer)),
        strict=options.strict,
        max_length=options.max_length,
        dedup=options.dedup,
        questions=inputs.questions,
    )


def _recorded(options: PrepareOptions, sources: list[Source]) -> dict[str, Any]:
    """The options that decide what is written, as JSON."""
    kept = {key: value for key, value in vars(options).items() if key not in _NOT_RECORDED}
    prompt = _loaded(options.prompt)
    kept |= {"prompt": prompt and asdict(prompt), "fields": asdict(options.fields)}
    kept |= {"sources": [asdict(source) for source in sources]}
    return json.loads(json.dumps(kept, default=str))


def _paths(options: PrepareOptions) -> list[str | Path | None]:
    """Everything that is read, which an output must not replace."""
    sources = options.each_source()
    prompts = [source.prompt for source in sources if isinstance(source.prompt, str | Path)]
    named = [options.model, options.tokenizer, options.chat_template, *options.decontaminate]
    return [*named, *prompts, *(source.data for source in sources)]


def _check_vocabulary(options: PrepareOptions, size: int) -> None:
    """Refuses a tokenizer with more tokens than the model has embeddings, where a config file says so."""
    file = Path(options.model or "") / "config.json"
    if not options.model or not os.path.isfile(file):
        return
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--model {options.model}: {file} is damaged ({error}): fetch the model again") from error
    rows = config.get("vocab_size") if isinstance(config, dict) else None
    if rows is not None and size > rows and not options.resize_embeddings:
        raise ValueError(
            f"--tokenizer {options.tokenizer or options.model} has {size} tokens, {options.model} has"
            f" embeddings for {rows}: choose the tokenizer that belongs to the model, or say --resize-embeddings here"
            " and train with --override.resize-embeddings"
        )


def _already_there(output: Path, digest: str, overwrite: bool, console: Console) -> dict[str, Any] | None:
    """The meta of an output that is complete already; one made otherwise is refused."""
    if not output.exists() or overwrite:
        return None
    file = output / "meta.json"
    meta = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if meta.get("plan") == digest:
        console.print(f"{output} is there already, made from these sources with these options")
        return meta
    raise ValueError(f"--output {output} exists: choose another, or replace it with --overwrite")


def _start_or_continue(parts: Path, digest: str, chunks: int, console: Console) -> datetime:
    """Empties the directory of parts, or keeps those of the same plan; returns the date of the plan."""
    file = parts / "plan.json"
    plan = json.loads(file.read_text()) if file.is_file() else {}
    if plan.get("digest") != digest:
        if plan or any(parts.glob("*.npz")):
            console.print(f"{parts} is of other sources or options: starting anew")
        clear_parts(parts, UNPACKED)
        plan = {"digest": digest, "date": datetime.now().isoformat()}
        write_whole(file, json.dumps(plan).encode())
    elif done := len(list(parts.glob("*.npz"))):
        console.print(f"continuing: {done:,} of {chunks:,} chunks are there already")
    return datetime.fromisoformat(plan["date"])
