"""Chunks of rows -> part files over processes, and part files -> the data directory, in order.

Every chunk becomes one part, written and then renamed, so that a killed run continues with the parts that
are missing. How many processes wrote them, and in which order, cannot be seen in the result.
"""

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from data.index import IndexWriter
from data.preparation.conversation import RowError
from data.preparation.encoder import ChatEncoder, Document
from data.preparation.formats import Fields, to_conversation
from data.preparation.output import make_room
from data.preparation.prompt import Prompt
from data.preparation.rows import JsonLines, Table, Unreadable
from data.preparation.where import Where

COUNTS = ("filtered", "open_turns", "rewritten_turns", "straddling_tokens")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker process knows; workers inherit it when they are forked."""

    encoder: ChatEncoder
    sources: list[JsonLines | Table]
    chunks: list[tuple[int, int, int]]  # source, start, stop
    fields: Fields
    prompt: Prompt | None
    where: Where
    parts: Path
    dtype: np.dtype
    strict: bool = False

    def part(self, number: int) -> Path:
        return self.parts / f"{number:06d}.npz"


@dataclass(frozen=True)
class HoldOut:
    """How many documents go into the directory `valid`: a count or a fraction of all."""

    count: int = 0
    fraction: float = 0.0
    seed: int = 0

    def mask(self, documents: int) -> np.ndarray:
        """bool [documents], true where held out. Raises ValueError where none would be left."""
        count = self.count or round(documents * self.fraction)
        if count >= documents:
            raise ValueError(f"--hold-out {count} would leave nothing of {documents} documents to train on")
        mask = np.zeros(documents, dtype=bool)
        mask[np.random.default_rng(self.seed).permutation(documents)[:count]] = True
        return mask


_job: Job | None = None  # set in the parent just before workers are forked


def make_parts(job: Job, num_workers: int, console: Console) -> None:
    """Makes the parts that are missing with `num_workers` processes (0: one for each core).

    Raises ValueError for the first bad row if the job is strict, RuntimeError where a worker was killed.
    """
    global _job
    missing = [number for number in range(len(job.chunks)) if not job.part(number).exists()]
    if not missing:
        return
    workers = min(num_workers or len(os.sched_getaffinity(0)), len(missing))
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    _job = job
    try:
        # forked, so that tokenizer, template and tables are neither sent nor loaded once more
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(workers, context, _start_worker, (os.getpid(),)) as pool:
            futures = [pool.submit(_make_part, number) for number in missing]
            try:
                with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
                    done = len(job.chunks) - len(missing)
                    bar = progress.add_task("preparing", total=len(job.chunks), completed=done)
                    for future in futures:
                        future.add_done_callback(lambda _: progress.advance(bar))
                    wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                pool.shutdown(cancel_futures=True)  # chunks that were begun are finished
        for future in futures:  # in order, so that it is the first bad row that is named
            if not future.cancelled():
                future.result()
    except BrokenProcessPool as error:
        raise RuntimeError("a worker was killed (out of memory?): run again, it will continue") from error
    finally:
        _job = None


def _start_worker(parent: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and lets chunks that were begun finish

    def watch() -> None:  # a worker whose parent was killed would wait for work for ever
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _make_part(number: int) -> None:
    """Tokenises one chunk of rows into its part file."""
    assert _job is not None
    job = _job
    source_number, start, stop = job.chunks[number]
    source = job.sources[source_number]
    places, conversations, drops = [], [], []
    rows = filtered = 0
    for place, row in source.read(start, stop):
        rows += 1
        try:
            if isinstance(row, Unreadable):
                raise row.error
            if not job.where(row):
                filtered += 1
                continue
            conversations.append(to_conversation(row, job.fields, job.prompt))
            places.append((place, row))
        except RowError as error:
            drops.append((place, error, row.text if isinstance(row, Unreadable) else row))
    documents: list[Document] = []
    for (place, row), document in zip(places, job.encoder.encode(conversations), strict=True):
        if isinstance(document, Document):
            documents.append(document)
        else:
            drops.append((place, document, row))
    drops.sort(key=lambda drop: drop[0])
    if job.strict and drops:
        place, reason, _ = drops[0]
        raise ValueError(f"{source.name}:{source.lines(0, start) + place + 1}: {reason}")
    report = {
        "rows": rows,
        "lines": source.lines(start, stop),
        "filtered": filtered,
        "open_turns": sum(document.open_turns for document in documents),
        "rewritten_turns": sum(document.rewritten for document in documents),
        "straddling_tokens": sum(document.straddling for document in documents),
        "drops": [
            {"place": place, "reason": error.reason, "detail": error.detail, "row": row} for place, error, row in drops
        ],
    }
    _save_part(job.part(number), documents, report, job.dtype)


def _save_part(path: Path, documents: list[Document], report: dict[str, Any], dtype: np.dtype) -> None:
    empty = np.empty((0, 2), np.int32)
    partial = path.with_suffix(f".{os.getpid()}.partial")  # its own, should an orphaned worker still write
    with open(partial, "wb") as file:
        np.savez(
            file,
            tokens=np.concatenate([*(document.tokens for document in documents), empty[:, 0]]).astype(dtype),
            lengths=np.array([len(document.tokens) for document in documents], dtype=np.int32),
            spans=np.concatenate([*(document.spans for document in documents), empty]),
            counts=np.array([len(document.spans) for document in documents], dtype=np.int64),
            report=np.frombuffer(json.dumps(report, default=str).encode(), dtype=np.uint8),
        )
        file.flush()
        os.fsync(file.fileno())  # a part that has its name is whole, even after the machine went down
    os.replace(partial, path)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is there completely or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def join_parts(
    job: Job, output: Path, tokenizer: Any, meta: dict[str, Any], hold_out: HoldOut, overwrite: bool
) -> dict[str, Any]:
    """Joins all parts into `output`, in the place of what is there with `overwrite`, and returns its meta.

    Raises ValueError where no document is left.
    """
    totals, drops, sizes = _read_reports(job)
    reasons: dict[str, dict[str, Any]] = {}
    for drop in drops:
        first = f"{drop['source']}:{drop['line']}" + (f": {drop['detail']}" if drop["detail"] else "")
        reasons.setdefault(drop["reason"], {"count": 0, "first": first})["count"] += 1
    causes = [f"{drop['count']:,} x {why} (first {drop['first']})" for why, drop in reasons.items()]
    if totals["filtered"]:
        causes.append(f"{totals['filtered']:,} x left out by --where")
    described = "; ".join(causes)
    if not sum(sizes):
        raise ValueError(f"--sources: none of {totals['rows']:,} rows can be used: {described or 'no rows'}")
    held_out = hold_out.mask(sum(sizes))
    writer = IndexWriter(output, vocab_size=len(tokenizer))
    valid = IndexWriter(writer.directory / "valid", vocab_size=len(tokenizer)) if held_out.any() else None
    for number, mask in enumerate(np.split(held_out, np.cumsum(sizes)[:-1])):
        with np.load(job.part(number)) as part:
            arrays = [part[name] for name in ("tokens", "lengths", "spans", "counts")]
        if valid is not None:
            valid.add(*_choose(arrays, mask))
            arrays = _choose(arrays, ~mask)
        writer.add(*arrays)
    meta = {**totals, "held_out": int(held_out.sum()), "dropped": reasons, **meta}
    assert meta["rows"] == writer.documents + meta["held_out"] + meta["filtered"] + len(drops)
    if valid is not None:
        valid.close({**meta, "held_out": 0, "held_out_of": str(output.name)}, tokenizer)
    if drops:
        lines = [json.dumps(drop) + "\n" for drop in drops]
        (writer.directory / "dropped.jsonl").write_text("".join(lines), encoding="utf-8")
    replaced = make_room(output, overwrite=overwrite)
    meta = writer.close(meta, tokenizer)
    if replaced is not None:
        shutil.rmtree(replaced)
    return meta


def _read_reports(job: Job) -> tuple[dict[str, int], list[dict[str, Any]], list[int]]:
    """Total counts, the dropped rows with their lines, and the number of documents of each part."""
    totals = dict.fromkeys(("rows", *COUNTS), 0)
    drops, sizes = [], []
    line, previous = 0, -1
    for number, (source, _, _) in enumerate(job.chunks):
        with np.load(job.part(number)) as part:
            report = json.loads(part["report"].tobytes())
            sizes.append(len(part["lengths"]))
        line = line if source == previous else 0
        for drop in report["drops"]:
            place = {"source": job.sources[source].name, "line": line + drop.pop("place") + 1}
            drops.append(place | drop)
        line, previous = line + report["lines"], source
        for name in totals:
            totals[name] += report[name]
    return totals, drops, sizes


def _choose(arrays: list[np.ndarray], mask: np.ndarray) -> list[np.ndarray]:
    """The documents of a part where `mask` [documents] is true."""
    tokens, lengths, spans, counts = arrays
    return [tokens[np.repeat(mask, lengths)], lengths[mask], spans[np.repeat(mask, counts)], counts[mask]]
