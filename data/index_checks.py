"""Checksums of a prepared data directory: what meta.json says of the other files, and of itself."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.checked_files import fault_of
from data.checksums import SUMS, file_sum, leads_out, own_sum, sums_of

META = "meta.json"
FILES = (META, "tokens.bin", "tokens.idx", "spans.npy", "spans_offsets.npy")
NUMBERS: dict[str, type] = {"sources": np.uint16, "kinds": np.uint8}  # NAME.npy, a number for each document
READ_WHOLE = ("tokens.idx", "spans_offsets.npy", "sources.npy", "kinds.npy")  # when a directory is opened


def add_checksums(directory: Path, meta: dict[str, Any]) -> None:
    """Put into `meta` the checksums of the small files, those of the large files' checksums, and its own."""
    small = [*directory.glob(f"*{SUMS}"), *(directory / "tokenizer").rglob("*")]
    names = sorted(path.relative_to(directory).as_posix() for path in small if path.is_file())
    meta["checksums"] = {name: file_sum(directory / name) for name in names}
    meta["checksum"] = own_sum(meta)


def index_faults(path: Path) -> Iterator[str]:
    """A sentence for each damaged file of a data directory, found by reading all of it."""
    try:
        meta = read_meta(path)
    except (ValueError, TypeError, AttributeError, RecursionError, OSError):
        yield f"{path / META} is damaged"
        return
    yield from small_faults(path, meta)
    for name in (*FILES[1:], *(f"{name}.npy" for name in NUMBERS)):
        checked = sums_of(path / name).exists()
        if not (path / name).is_file():
            if checked or name in FILES:
                yield f"{path / name} is missing"
        elif checked and (fault := fault_of(path / name)):
            yield fault


def small_faults(path: Path, meta: dict[str, Any]) -> Iterator[str]:
    """The files that do not have the checksum which meta.json states."""
    for name, expected in meta.get("checksums", {}).items():
        if leads_out(name):
            yield f"{path / META} names a file outside its directory: {name}"
        elif not (path / name).is_file():
            yield f"{path / name} is missing"
        elif fault := fault_of(path / name, expected):
            yield fault


def read_meta(path: Path) -> dict[str, Any]:
    """What meta.json says; ValueError where it is not what was written."""
    text = (path / META).read_text(encoding="utf-8")
    meta = json.loads(text)
    if ("checksum" in meta or "checksums" in meta) and (meta.get("checksum") != own_sum(meta) or text[-1:] != "\n"):
        raise ValueError
    return meta
