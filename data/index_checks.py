"""Checksums of a prepared data directory: what meta.json says of the other files, and of itself."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.checksums import SUMS, file_sum, sums_of, text_sum, verify

META = "meta.json"
FILES = (META, "tokens.bin", "tokens.idx", "spans.npy", "spans_offsets.npy")
NUMBERS: dict[str, type] = {"sources": np.uint16, "kinds": np.uint8}  # NAME.npy, a number for each document
READ_WHOLE = ("tokens.idx", "spans_offsets.npy", "sources.npy", "kinds.npy")  # when a directory is opened


def add_checksums(directory: Path, meta: dict[str, Any]) -> None:
    """Put into `meta` the checksums of the small files, those of the large files' checksums, and its own."""
    small = [*directory.glob(f"*{SUMS}"), *(directory / "tokenizer").rglob("*")]
    names = sorted(path.relative_to(directory).as_posix() for path in small if path.is_file())
    meta["checksums"] = {name: file_sum(directory / name) for name in names}
    meta["checksum"] = _own_sum(meta)


def index_faults(path: Path) -> Iterator[str]:
    """A sentence for each damaged file of a data directory, found by reading all of it."""
    try:
        meta = read_meta(path)
    except (ValueError, TypeError, AttributeError, RecursionError, OSError):
        yield f"{path / META} is damaged"
        return
    yield from small_faults(path, meta)
    for name in (*FILES[1:], *(f"{name}.npy" for name in NUMBERS)):
        if sums_of(path / name).exists() or (name in FILES and not (path / name).is_file()):
            try:
                verify(path / name)
            except FileNotFoundError:
                yield f"{path / name} is missing"
            except ValueError as error:
                yield str(error)


def small_faults(path: Path, meta: dict[str, Any]) -> Iterator[str]:
    """The files that do not have the checksum which meta.json states."""
    for name, expected in meta.get("checksums", {}).items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            yield f"{path / META} names a file outside its directory: {name}"
        elif not (path / name).is_file():
            yield f"{path / name} is missing"
        elif file_sum(path / name) != expected:
            size = (path / name).stat().st_size
            yield f"{path / name} is damaged: its bytes 0 to {size - 1:,} are not those that were written"


def read_meta(path: Path) -> dict[str, Any]:
    """What meta.json says; ValueError where it is not what was written."""
    text = (path / META).read_text(encoding="utf-8")
    meta = json.loads(text)
    if ("checksum" in meta or "checksums" in meta) and (meta.get("checksum") != _own_sum(meta) or text[-1:] != "\n"):
        raise ValueError
    return meta


def _own_sum(meta: dict[str, Any]) -> str:
    """The checksum of the other fields of meta.json, however they are laid out."""
    rest = {name: value for name, value in meta.items() if name != "checksum"}
    return text_sum(json.dumps(rest, sort_keys=True, separators=(",", ":")))
