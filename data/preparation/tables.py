"""JSON and CSV files as tables of rows."""

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from data.preparation.conversation import RowError
from data.preparation.rows import JsonLines, Table, Unreadable, file_identity, opened, parse

_MARKS = 256  # records of a CSV file between two whose places are remembered
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
    try:
        content = parse(path.read_bytes().decode("utf-8-sig"))
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
    marks: list[int] = []
    length = 0
    with opened(path) as file:
        records = _records(file, delimiter)
        _, header = next(records, (0, []))
        if isinstance(header, Unreadable):
            raise ValueError(f"{name}: its first line does not name columns: {header.error}")
        if not header or len(set(header)) < len(header):
            raise ValueError(f"{name}: its first line must name each column once, it is {delimiter.join(header)!r}")
        for position, _ in records:
            if length % _MARKS == 0:
                marks.append(position)
            length += 1

    def rows(start: int, stop: int) -> list[Any]:
        if start >= stop:
            return []
        with opened(path) as file:
            file.seek(marks[start // _MARKS])
            skipped = start % _MARKS
            records = itertools.islice(_records(file, delimiter), skipped, skipped + stop - start)
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
    """Records with the byte at which each starts; empty lines are none."""
    csv.field_size_limit(_LONGEST)
    position = file.tell()
    lines: list[tuple[int, str]] = []  # of this record, with their positions
    errors: list[UnicodeDecodeError] = []

    def decoded() -> Iterator[str]:
        nonlocal position
        for line in file:
            try:
                text = line.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                errors.append(error)
                text = line.decode("utf-8", "replace")
            lines.append((position, text))
            position += len(line)
            yield text

    reader = csv.reader(decoded(), delimiter=delimiter, strict=True)
    while True:
        lines.clear()
        errors.clear()
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # it may hold several records, so that each of its lines counts as one
            for start, line in lines:
                yield start, Unreadable(line.rstrip("\r\n"), RowError("not CSV", str(error)))
            continue
        if errors:
            text = "".join(line for _, line in lines)
            yield lines[0][0], Unreadable(text.rstrip("\r\n"), RowError("not UTF-8", str(errors[0])))
        elif values:
            yield lines[0][0], values
