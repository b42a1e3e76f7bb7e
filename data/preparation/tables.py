"""JSON and CSV files as tables of rows."""

import csv
import itertools
from bisect import bisect_right
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from data.preparation.conversation import RowError
from data.preparation.rows import JsonLines, Table, Unreadable, file_identity, opened, parse

_MARK = 256  # a CSV file can be read from about every so many rows on
_LONGEST = 1 << 24  # characters of a CSV value: a quote that is never closed must not swallow the file


def open_json(name: str, path: Path, original: Path | None = None) -> JsonLines | Table:
    """A list of rows, `{"data": [...]}`, or columns `{"question": [...], "answer": [...]}`, all held in memory.

    JSON lines go by this suffix, too. Lists of messages are no columns: `{"messages": [{"role": ...}]}` is one row.
    """
    with opened(path) as file:
        lines = (line for line in file if line.strip())
        first, second = next(lines, b""), next(lines, None)
        if second is not None and _is_json(first):
            return JsonLines(name, path, original)
        file.seek(0)
        text = file.read()
    try:
        content = parse(text.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    identity = file_identity(original or path)
    rows = content.get("data") if isinstance(content, dict) else content
    if isinstance(rows, list):
        return Table(name, identity, len(rows), lambda start, stop: rows[start:stop])
    if isinstance(content, dict) and _are_columns(content):
        columns = list(content.values())
        if len(set(map(len, columns))) > 1:
            lengths = ", ".join(f"{column} {len(values)}" for column, values in content.items())
            raise ValueError(f"{name}: the columns have different lengths ({lengths})")
        return Table(name, identity, len(columns[0]), lambda start, stop: _zipped(content, start, stop))
    if isinstance(content, dict) and second is None:
        return JsonLines(name, path, original)
    raise ValueError(f'{name}: a JSON file must hold a list of rows, {{"data": [...]}}, or a list for each column')


def _is_json(line: bytes) -> bool:
    try:
        parse(line.decode("utf-8-sig"))
    except ValueError:
        return False
    return True


def _are_columns(content: dict[str, Any]) -> bool:
    lists = [values for values in content.values() if isinstance(values, list)]
    messages = any(isinstance(values[0], dict) and {"role", "from"} & values[0].keys() for values in lists if values)
    return 0 < len(lists) == len(content) and not messages


def _zipped(columns: dict[str, list], start: int, stop: int) -> list[dict[str, Any]]:
    cells = zip(*(values[start:stop] for values in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in cells]


def open_csv(name: str, path: Path, delimiter: str, original: Path | None = None) -> Table:
    """Records below a line of column names; every value is text as it stands. Flat in memory.

    A record that is not one value for each column is unreadable, and so is every line of one whose quotes are wrong.
    """
    marks: list[tuple[int, int]] = []  # the number of a row, and the byte at which its record starts
    length = previous = 0
    with opened(path) as file:
        file.seek(len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0)
        records = _records(file, delimiter)
        _, header = next(records, (0, []))
        if isinstance(header, Unreadable):
            raise ValueError(f"{name}: its first line does not name columns: {header.error}")
        if not header or len(set(header)) < len(header):
            raise ValueError(f"{name}: its first line must name each column once, it is {delimiter.join(header)!r}")
        for position, _ in records:
            if position != previous and length >= len(marks) * _MARK:
                marks.append((length, position))
            previous = position
            length += 1

    def rows(start: int, stop: int) -> list[Any]:
        if start >= stop:
            return []
        with opened(path) as file:
            first, position = marks[bisect_right(marks, start, key=lambda mark: mark[0]) - 1]
            file.seek(position)
            records = itertools.islice(_records(file, delimiter), start - first, stop - first)
            return [_csv_row(header, record) for _, record in records]

    return Table(name, file_identity(original or path), length, rows)


def _csv_row(header: list[str], record: list[str] | Unreadable) -> dict[str, str] | Unreadable:
    if isinstance(record, Unreadable):
        return record
    if len(record) != len(header):
        error = RowError("wrong number of values", f"{len(record)} values for {len(header)} columns")
        return Unreadable(str(record), error)
    return dict(zip(header, record, strict=True))


def _records(file: IO[bytes], delimiter: str) -> Iterator[tuple[int, list[str] | Unreadable]]:
    """Records with the byte at which each starts; empty lines are none.

    One whose quotes are wrong may hold several, so that each of its lines counts as one.
    """
    csv.field_size_limit(_LONGEST)
    position = file.tell()
    lines: list[str] = []  # of this record
    errors: list[UnicodeDecodeError] = []

    def decoded() -> Iterator[str]:
        nonlocal position
        for line in file:
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                errors.append(error)
                text = line.decode("utf-8", "replace")
            lines.append(text)
            position += len(line)
            yield text

    reader = csv.reader(decoded(), delimiter=delimiter, strict=True)
    while True:
        lines.clear()
        errors.clear()
        start = position
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            for line in lines:
                yield start, Unreadable(line.rstrip("\r\n"), RowError("not CSV", str(error)))
            continue
        if errors:
            yield start, Unreadable("".join(lines).rstrip("\r\n"), RowError("not UTF-8", str(errors[0])))
        elif values:
            yield start, values
