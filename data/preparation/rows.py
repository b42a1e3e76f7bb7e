"""Rows of one file, cut into chunks: JSON lines by bytes, everything else by the rows' numbers."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data.preparation.conversation import RowError

# Chunks are the unit of work and of resuming: about 128 of them for small data, no larger than this for large
_CHUNKS, _BYTES, _ROWS = 128, (1 << 16, 1 << 24), (64, 8192)
# Lists and objects inside each other: far more than any row has, far fewer than Python's recursion allows, and the same
# in every process, whereas the recursion that is left depends on who calls
_LEVELS = 100
Row = tuple[int, Any]  # number within the chunk, from 0; the parsed row, or Unreadable
Keep = Callable[[Any], bool]


@dataclass(frozen=True)
class Unreadable:
    """A row that is none: its text as far as there is one, and why."""

    text: str
    error: RowError


@dataclass(frozen=True)
class JsonLines:
    """A file with a JSON object on each line; its ranges are bytes, a line belongs to where it starts.

    original: the compressed file that `path` is a copy of. OSErrors name the file.
    """

    name: str
    path: Path
    original: Path | None = None

    @property
    def identity(self) -> str:
        """Changes when the content does."""
        return file_identity(self.original or self.path)

    def chunks(self, limit: int | None, keep: Keep | None = None) -> tuple[list[tuple[int, int]], int | None]:
        """Ranges that cover all rows, or those up to the one that is the `limit`-th, and how many were counted.

        keep: says which rows count towards the limit; where it raises RowError, and for an `Unreadable`, they do.
        """
        if limit is None:
            return _ranges(self.path.stat().st_size, _BYTES), None
        end = counted = 0
        with opened(self.path) as file:
            for position, line in _positions(file):
                if counted == limit:
                    break
                end = position + len(line)
                if line.strip():
                    counted += keep is None or _counts(keep, _parse_line(line))
        return _ranges(end, _BYTES), counted

    def read(self, start: int, stop: int) -> Iterator[Row]:
        """The rows of one range."""
        with opened(self.path) as file:
            if start:  # the line that reaches over the start belongs to the chunk before
                file.seek(start - 1)
                if not file.readline(stop - start).endswith(b"\n"):
                    return
            for number, (position, line) in enumerate(_positions(file, file.tell())):
                if position >= stop:
                    return
                if line.strip():  # an empty line is no row, but a line, so that numbers stay right
                    yield number, _parse_line(line)

    def lines(self, start: int, stop: int) -> int:
        """How many lines start in a range of bytes."""
        with opened(self.path) as file:
            file.seek(max(start - 1, 0))
            count = 1 if start == 0 and stop > 0 else 0
            left = stop - 1 - file.tell()  # a newline at byte b starts a line at b + 1
            while left > 0 and (block := file.read(min(left, 1 << 20))):
                count += block.count(b"\n")
                left -= len(block)
        return count


@dataclass(frozen=True)
class Table:
    """Rows that can be read by their numbers; its ranges are row numbers.

    rows: the rows [start, stop), `Unreadable` in the place of one that is none.
    """

    name: str
    identity: str
    length: int
    rows: Callable[[int, int], list[Any]]

    def chunks(self, limit: int | None, keep: Keep | None = None) -> tuple[list[tuple[int, int]], int | None]:
        """As for JSON lines, with ranges of rows."""
        if limit is None or keep is None:
            length = self.length if limit is None else min(limit, self.length)
            return _ranges(length, _ROWS), length
        end = counted = 0
        for start, stop in _ranges(self.length, _ROWS):
            for _, row in self.read(start, stop):
                if counted == limit:
                    return _ranges(end, _ROWS), counted
                end += 1
                counted += _counts(keep, row)
        return _ranges(end, _ROWS), counted

    def read(self, start: int, stop: int) -> Iterator[Row]:
        """The rows of one range."""
        for number, row in enumerate(self.rows(start, stop)):
            try:
                check(row)
            except RowError as error:
                row = Unreadable(_shown(row), error)
            yield number, row

    def lines(self, start: int, stop: int) -> int:
        """How many row numbers a range has."""
        return stop - start


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A file open for reading; an error in the middle of it names the file, as one at its opening does."""
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def file_identity(path: Path) -> str:
    """Changes when the file's content does."""
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"


def parse(text: str) -> Any:
    """The value of a JSON text; RowError where it is none."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise RowError("not JSON", str(error)) from error
    except RecursionError as error:
        raise RowError("not JSON", f"nested too deeply (more than {_LEVELS} levels)") from error


def check(row: Any) -> None:
    """Raises RowError for what Python takes for JSON and others do not: too many levels, and NaN and infinities.

    A column may be NaN itself, as data frames write where nothing is known, and --where can see it. Inside a list
    or an object, such as the arguments of a call, a chat template would write it, and it would be trained.
    """
    level, depth = [row] if isinstance(row, dict | list) else [], 0
    while level:
        depth += 1
        if depth > _LEVELS:
            raise RowError("not JSON", f"nested too deeply (more than {_LEVELS} levels)")
        below: list[Any] = []
        for parent in level:
            for value in parent.values() if isinstance(parent, dict) else parent:
                if isinstance(value, dict | list):
                    below.append(value)
                elif depth > 1 and isinstance(value, float) and not math.isfinite(value):
                    raise RowError("not JSON", f"{value} inside a list or an object is no JSON number")
        level = below


def _parse_line(line: bytes) -> Any:
    """The row of a line, or Unreadable."""
    try:
        row = parse(line.decode().removeprefix("\ufeff"))  # the byte-order mark; in files that were joined, anywhere
        check(row)
        return row
    except UnicodeDecodeError as error:
        reason = RowError("not UTF-8", str(error))
    except RowError as error:
        reason = error
    return Unreadable(line.decode("utf-8", "replace").rstrip("\r\n"), reason)


def _counts(keep: Keep, row: Any) -> bool:
    """Whether a row counts towards a limit: what will be dropped does, for it is a row that was asked for."""
    if isinstance(row, Unreadable):
        return True
    try:
        return bool(keep(row))
    except RowError:
        return True


def _shown(row: Any) -> str:
    try:
        return json.dumps(row, ensure_ascii=False)
    except RecursionError:  # one of too many levels
        return ""


def _positions(file: IO[bytes], position: int = 0) -> Iterator[tuple[int, bytes]]:
    """Lines with the byte at which each starts."""
    for line in file:
        yield position, line
        position += len(line)


def _ranges(size: int, bounds: tuple[int, int]) -> list[tuple[int, int]]:
    step = min(max(-(-size // _CHUNKS), bounds[0]), bounds[1])
    return [(start, min(start + step, size)) for start in range(0, size, step)]
