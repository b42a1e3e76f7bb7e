"""Parquet and Arrow files, and what their columns become as rows: the values that JSON lines would have given."""

import base64
import errno
import itertools
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
from pyarrow import types

from data.preparation.conversation import RowError
from data.preparation.rows import Table, Unreadable, file_identity, opened, parse

_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
Tidy = Callable[[Any], Any]


def open_parquet(name: str, path: Path) -> Table:
    """Columns as fields; one row group is held in memory. Raises ValueError for what is no such file."""
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{name}: not a parquet file: {error}") from error
    check_schema(name, file.schema_arrow)
    sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]

    def group(number: int) -> pyarrow.Table:
        # opened here, because a file that was opened before a fork is shared with other processes
        return pyarrow.parquet.ParquetFile(path, metadata=file.metadata).read_row_group(number)

    return _grouped(name, path, sizes, group)


def open_arrow(name: str, path: Path) -> Table:
    """An Arrow file, or a stream as `datasets` writes; both are mapped, and memory stays flat.

    Only streams with compressed batches, which are rare, are held in memory. Raises ValueError as for parquet.
    """
    with opened(path) as file:
        is_stream = file.read(6) != b"ARROW1"
        file.seek(max(path.stat().st_size - len(_END_OF_STREAM), 0))
        cut_off = is_stream and file.read() != _END_OF_STREAM
    try:
        if is_stream:
            stream = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
            batches = list(stream)
            schema, sizes = stream.schema, [batch.num_rows for batch in batches]
        else:
            reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
            schema, sizes = reader.schema, [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{name}: not an Arrow file: {error}") from error
    if cut_off:
        raise ValueError(f"{name}: the file was cut off: its stream has no end")
    check_schema(name, schema)

    def group(number: int) -> pyarrow.Table:
        if is_stream:
            return pyarrow.Table.from_batches([batches[number]])
        return pyarrow.Table.from_batches([pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).get_batch(number)])

    return _grouped(name, path, sizes, group)


def _grouped(name: str, path: Path, sizes: list[int], group: Callable[[int], pyarrow.Table]) -> Table:
    """A table of which one group of rows is held in memory."""
    bounds = [0, *itertools.accumulate(sizes)]
    cache: dict[int, pyarrow.Table] = {}  # the last group that was read, since a group holds several chunks

    def rows(start: int, stop: int) -> list[Any]:
        found: list[Any] = []
        while start < stop:
            number = bisect_right(bounds, start) - 1
            end = min(stop, bounds[number + 1])
            try:
                if number not in cache:
                    cache.clear()
                    cache[number] = group(number)
                found += json_rows(cache[number].slice(start - bounds[number], end - start))
            except pyarrow.ArrowException as error:
                raise ValueError(f"{name}: rows {start + 1} to {end} cannot be read: {error}") from error
            except OSError as error:  # Arrow's own name no file, and often have no number
                raise OSError(error.errno or errno.EIO, str(error), str(path)) from error
            start = end
        return found

    return Table(name, file_identity(path), bounds[-1], rows)


def check_schema(name: str, schema: pyarrow.Schema) -> None:
    """Raises ValueError for columns that cannot become fields of a row."""
    if len(set(schema.names)) < len(schema.names):
        raise ValueError(f"{name}: two columns have the same name ({', '.join(schema.names)})")
    for field in schema:
        try:
            _form(field.type)
        except ValueError as error:
            raise ValueError(f"{name}: column {field.name} is of type {field.type}, which JSON cannot hold") from error


def json_rows(table: pyarrow.Table) -> list[Any]:
    """The rows of a table as JSON lines would have given them; `Unreadable` in the place of one that is not text.

    All rows of a table share one schema, and what one of them has is null in the others: inside objects keys that
    are null are left out, at every depth. A null that a row really had goes with them. Columns and items of lists
    keep theirs. Maps become objects; JSON columns are parsed; dates, times and decimals become text, bytes too (as
    base64 where they are no UTF-8), durations integers.
    """
    forms = {field.name: _form(field.type) for field in table.schema}
    target = pyarrow.schema([(name, kind) for name, (kind, _) in forms.items()])
    if target.types != table.schema.types:
        table = table.cast(target)
    tidies = {name: tidy for name, (_, tidy) in forms.items() if tidy is not None}
    rows = _objects(table)
    return [_tidied(row, tidies) for row in rows] if tidies else rows


def _objects(table: pyarrow.Table) -> list[Any]:
    try:
        return table.to_pylist()
    except UnicodeDecodeError as error:  # some writers do not look at what they call text
        if table.num_rows == 1:
            return [Unreadable("", RowError("not UTF-8", str(error)))]
        return [row for number in range(table.num_rows) for row in _objects(table.slice(number, 1))]


def _tidied(row: Any, tidies: dict[str, Tidy]) -> Any:
    if isinstance(row, Unreadable):
        return row
    try:
        return row | {name: tidy(row[name]) for name, tidy in tidies.items() if row[name] is not None}
    except RowError as error:  # a column of JSON that is none
        return Unreadable(str(row), error)


def _form(kind: pyarrow.DataType) -> tuple[pyarrow.DataType, Tidy | None]:
    """The type that Arrow is to cast values to, and what is then still to be done with each of them in Python.

    Raises ValueError for a type that JSON has nothing like.
    """
    if isinstance(kind, pyarrow.BaseExtensionType):
        # messages of many shapes are JSON in what `datasets` writes
        return (kind.storage_type, parse) if kind.extension_name == "arrow.json" else _form(kind.storage_type)
    if types.is_dictionary(kind):
        return _form(kind.value_type)
    if types.is_struct(kind):
        return _form_of_struct(kind)
    if types.is_map(kind):
        return _form_of_map(kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _form_of_list(kind)
    if types.is_date(kind) or types.is_time(kind) or types.is_timestamp(kind) or types.is_decimal(kind):
        return pyarrow.string(), None
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return kind, _text
    if types.is_duration(kind):
        return pyarrow.int64(), None
    if types.is_float16(kind):
        return pyarrow.float32(), None
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return kind, None
    if types.is_floating(kind) or types.is_integer(kind) or types.is_boolean(kind) or types.is_null(kind):
        return kind, None
    raise ValueError(f"{kind} is no type of JSON")


def _form_of_struct(kind: pyarrow.StructType) -> tuple[pyarrow.DataType, Tidy]:
    forms = {field.name: _form(field.type) for field in kind}
    if len(forms) < kind.num_fields:
        raise ValueError(f"{kind} has two fields of one name")
    if any(forms[field.name][0] != field.type for field in kind):
        kind = pyarrow.struct([(name, target) for name, (target, _) in forms.items()])
    tidies = {name: tidy for name, (_, tidy) in forms.items()}
    return kind, lambda value: {name: _done(tidies[name], item) for name, item in value.items() if item is not None}


def _form_of_map(kind: pyarrow.MapType) -> tuple[pyarrow.DataType, Tidy]:
    (key, key_tidy), (item, tidy) = _form(kind.key_type), _form(kind.item_type)
    if (key, item) != (kind.key_type, kind.item_type):
        kind = pyarrow.map_(key, item)
    return kind, lambda pairs: {str(_done(key_tidy, name)): _done(tidy, value) for name, value in pairs}


def _form_of_list(kind: pyarrow.DataType) -> tuple[pyarrow.DataType, Tidy | None]:
    item, tidy = _form(kind.value_type)
    if item != kind.value_type:
        kind = pyarrow.large_list(item) if types.is_large_list(kind) else pyarrow.list_(item)
    return kind, None if tidy is None else lambda values: [_done(tidy, value) for value in values]


def _done(tidy: Tidy | None, value: Any) -> Any:
    return value if tidy is None or value is None else tidy(value)


def _text(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return base64.b64encode(value).decode("ascii")
