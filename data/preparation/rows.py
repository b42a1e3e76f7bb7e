"""Where rows come from: JSONL, JSON and parquet files, and Hugging Face data sets, cut into chunks."""

import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.preparation.conversation import RowError

# Chunks are the unit of work and of resuming: about 128 of them for small data, no larger than this for large
_CHUNKS, _BYTES, _ROWS = 128, (1 << 16, 1 << 24), (64, 8192)
Row = tuple[int, Any]  # number within the chunk, from 0; the parsed row, or Unreadable


@dataclass(frozen=True)
class Unreadable:
    """A line that is no JSON."""

    text: str
    error: RowError


@dataclass(frozen=True)
class JsonLines:
    """A file with a JSON object on each line; its ranges are bytes, a line belongs to where it starts."""

    name: str
    path: Path

    @property
    def identity(self) -> str:
        """Changes when the content does."""
        return _file_identity(self.path)

    def chunks(self, limit: int | None) -> tuple[list[tuple[int, int]], int | None]:
        """Ranges that cover the rows, or the first `limit` rows and how many these are."""
        size, rows = self.path.stat().st_size, None
        if limit is not None:
            with open(self.path, "rb") as file:
                lines = itertools.islice((line for line in _positions(file) if line[1].strip()), limit)
                ends = [position + len(line) for position, line in lines]
            size, rows = (ends[-1], len(ends)) if ends else (0, 0)
        return _ranges(size, _BYTES), rows

    def read(self, start: int, stop: int) -> Iterator[Row]:
        """The rows of one range."""
        with open(self.path, "rb") as file:
            if start:  # the line that reaches over the start belongs to the chunk before
                file.seek(start - 1)
                file.readline()
            number = -1
            for position, line in _positions(file, file.tell()):
                if position >= stop:
                    return
                number += 1
                if not line.strip():  # no row, but a line, so that numbers stay right
                    continue
                try:
                    yield number, json.loads(line)
                except ValueError as error:
                    text = line.decode("utf-8", "replace").rstrip("\n")
                    yield number, Unreadable(text, RowError("not JSON", str(error)))

    def lines(self, start: int, stop: int) -> int:
        """How many lines start in a range of bytes."""
        with open(self.path, "rb") as file:
            file.seek(max(start - 1, 0))
            count = 1 if start == 0 and stop > 0 else 0
            left = stop - 1 - file.tell()  # a newline at byte b starts a line at b + 1
            while left > 0 and (block := file.read(min(left, 1 << 20))):
                count += block.count(b"\n")
                left -= len(block)
        return count


@dataclass(frozen=True)
class Table:
    """Rows that can be read by their numbers; its ranges are row numbers."""

    name: str
    identity: str
    length: int
    rows: Callable[[int, int], list[Any]]

    def chunks(self, limit: int | None) -> tuple[list[tuple[int, int]], int | None]:
        """As for JSONL, with ranges of rows."""
        length = self.length if limit is None else min(limit, self.length)
        return _ranges(length, _ROWS), length

    def read(self, start: int, stop: int) -> Iterator[Row]:
        """The rows of one range."""
        yield from enumerate(self.rows(start, stop))

    def lines(self, start: int, stop: int) -> int:
        """How many row numbers a range has."""
        return stop - start


def _positions(file, position: int = 0) -> Iterator[tuple[int, bytes]]:
    """Lines with the byte at which each starts."""
    for line in file:
        yield position, line
        position += len(line)


def _ranges(size: int, bounds: tuple[int, int]) -> list[tuple[int, int]]:
    step = min(max(-(-size // _CHUNKS), bounds[0]), bounds[1])
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def _file_identity(path: Path) -> str:
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"


def open_source(name: str, config: str | None = None, split: str | None = None) -> JsonLines | Table:
    """A file, a directory that `datasets` reads, or a hub data set `name[:config[:split]]`.

    Raises ValueError where there is none or it cannot be read.
    """
    path = Path(name)
    if path.is_file():
        return _open_file(name, path)
    base, *rest = name.split(":")
    looks_like_file = base.startswith((".", "/", "~")) or Path(base).suffix in _READERS
    if not Path(base).is_dir() and (looks_like_file or base.count("/") > 1 or not base):
        raise ValueError(f"{name}: there is no such file")
    if len(rest) > 2:
        raise ValueError(f"{name}: write a data set as name, name:config or name:config:split")
    parts = [*rest, "", ""]
    return _open_dataset(name, base, parts[0] or config, parts[1] or split)


def _open_file(name: str, path: Path) -> JsonLines | Table:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise ValueError(f"{name}: unknown kind of file, known are {', '.join(_READERS)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{name}: the file is empty")
    return reader(name, path)


def _open_json(name: str, path: Path) -> JsonLines | Table:
    """A JSON list, or an object with the list under `data`; JSON lines go by this suffix too."""
    text = path.read_bytes()
    try:
        content = json.loads(text)
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            return JsonLines(name, path)
        raise ValueError(f"{name}: not JSON: {error}") from error
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        if b"\n" not in text.strip():  # one line of JSON lines
            return JsonLines(name, path)
        raise ValueError(f'{name}: a JSON file must hold a list of rows or {{"data": [...]}}')
    return Table(name, _file_identity(path), len(rows), lambda start, stop: rows[start:stop])


def _open_parquet(name: str, path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{name}: not a parquet file: {error}") from error
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    bounds = [0, *itertools.accumulate(sizes)]
    cache: dict[int, Any] = {}  # the last group that was read, since a group holds several chunks

    def rows(start: int, stop: int) -> list[dict]:
        found = []
        for group, (first, last) in enumerate(itertools.pairwise(bounds)):
            if first < stop and start < last:
                if group not in cache:
                    cache.clear()
                    # opened here, because a file that was opened before a fork is shared with other processes
                    cache[group] = pyarrow.parquet.ParquetFile(path).read_row_group(group)
                low, high = max(start, first) - first, min(stop, last) - first
                found += cache[group].slice(low, high - low).to_pylist()
        return found

    return Table(name, _file_identity(path), bounds[-1], rows)


def _open_dataset(name: str, base: str, config: str | None, split: str | None) -> Table:
    import datasets

    try:
        if Path(base).is_dir() and any((Path(base) / mark).is_file() for mark in _SAVED):
            data = datasets.load_from_disk(base)
        else:
            data = datasets.load_dataset(base, config, **({"split": split} if split else {}))
    except Exception as error:  # hub, network, builders and file readers each raise their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{name}: no file, and no data set could be loaded ({reason})") from error
    if isinstance(data, datasets.DatasetDict):
        if split is None and len(data) == 1:
            split = next(iter(data))
        if split not in data:
            raise ValueError(f"{name}: choose one of its splits with --split: {', '.join(data)}")
        data = data[split]
    fingerprint = getattr(data, "_fingerprint", None) or os.urandom(8).hex()
    identity = f"{name} {config} {split} {len(data)} {fingerprint}"
    return Table(name, identity, len(data), lambda start, stop: data.select(range(start, stop)).to_list())


_SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves
_READERS: dict[str, Callable[[str, Path], JsonLines | Table]] = {
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".json": _open_json,
    ".parquet": _open_parquet,
}
