"""Part files: what one chunk of rows became.

A part is an .npz of

tokens       by the vocabulary's size [all tokens]
lengths      int32 [documents]
spans        int32 [all spans, 2]
spans_of     int64 [documents], how many spans each has
lines        int32 [documents], the line of its row within the chunk, from 0
kinds        uint8 [documents], numbers in the order of the report's `kinds`
counts       int32 [documents, COUNTS]
hashes       uint64 [documents, 2], equal where documents are duplicates; [0, 2] where none are looked for
report       uint8, JSON: numbers of the chunk
drops        uint8, JSON: a list of {place, reason, detail, row}, place being the line within the chunk, from 0
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from data.preparation.job import COUNTS, HASHES, Job, Prepared


def write_part(job: Job, number: int, done: Prepared, lines: int) -> None:
    """Writes the part of a chunk, whole or not at all; lines: how many the chunk has."""
    documents, kinds = done.documents, sorted(done.rows_of_kind)
    report = {
        "rows": done.rows,
        "lines": lines,
        "filtered": done.filtered,
        "tokens": done.tokens,
        "dropped_tokens": done.dropped_tokens,
        "kinds": {kind: done.rows_of_kind[kind] for kind in kinds},
        "overlaps": [done.overlaps[file] for file in range(len(job.questions.files))] if job.questions else [],
        "unused_columns": sorted({name for names in done.unused for name in names}),
    }
    drops = [
        {"place": place, "reason": error.reason, "detail": error.detail, "row": row} for place, error, row in done.drops
    ]
    numbers = {kind: number for number, kind in enumerate(kinds)}
    hashes = [getattr(one, HASHES[job.dedup]) for one in documents] if job.dedup in HASHES else []
    counts = [[getattr(one, name) for name in COUNTS.values()] for one in documents]
    no_spans = np.empty((0, 2), np.int32)
    arrays: dict[str, Any] = {
        "tokens": np.concatenate([*(one.tokens for one in documents), no_spans[:, 0]]).astype(job.dtype),
        "lengths": np.array([len(one.tokens) for one in documents], np.int32),
        "spans": np.concatenate([*(one.spans for one in documents), no_spans]),
        "spans_of": np.array([len(one.spans) for one in documents], np.int64),
        "lines": np.array(done.places, np.int32),
        "kinds": np.array([numbers[kind] for kind in done.kinds], np.uint8),
        "counts": np.array(counts, np.int32).reshape(-1, len(COUNTS)),
        "hashes": np.frombuffer(b"".join(hashes), np.uint64).reshape(-1, 2),
        "report": _json(report),
        "drops": _json(drops),
    }
    path = job.part(number)
    partial = path.with_suffix(f".{os.getpid()}.partial")  # its own, should an orphaned worker still write
    with open(partial, "wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())  # a part that has its name is whole, even after the machine went down
    os.replace(partial, path)


def read_part(path: Path, *names: str) -> list[Any]:
    """Some of a part's arrays; `report` and `drops` as what their JSON holds."""
    with np.load(path) as part:
        found = [part[name] for name in names]
    return [
        json.loads(array.tobytes()) if name in ("report", "drops") else array
        for name, array in zip(names, found, strict=True)
    ]


def _json(content: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(content, default=str).encode(), np.uint8)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is there completely or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    os.replace(partial, path)
