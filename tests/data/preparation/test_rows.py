"""The same rows from every kind of file, from every way of cutting it, and whatever stands on a line."""

import csv
import datetime
import decimal
import gzip
import itertools
import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.preparation.rows
import data.preparation.tables
from data.preparation.conversation import RowError
from data.preparation.files import open_source
from data.preparation.rows import JsonLines, Table, Unreadable
from tests.support.preparing import jsonl

# Arrow's types of the rows that are made below; all keys of objects are optional, as in tool calls of several tools
ARGUMENTS = pyarrow.struct(
    [("city", pyarrow.string()), ("x", pyarrow.float64()), ("days", pyarrow.list_(pyarrow.int64()))]
)
CALL = pyarrow.struct([("name", pyarrow.string()), ("arguments", ARGUMENTS)])
MESSAGE = pyarrow.struct([("role", "string"), ("content", "string"), ("tool_calls", pyarrow.list_(CALL))])
SCHEMA = pyarrow.schema(
    [
        ("messages", pyarrow.list_(MESSAGE)),
        ("number", "int64"),
        ("text", "string"),
        ("tags", pyarrow.list_(pyarrow.string())),
    ]
)
TEXT = st.text(max_size=6) | st.sampled_from(["007", 'a "b"\n', "\u2028", "\ufeff", "ß" * 40, "NaN", "{}"])


def some(**optional):
    return st.fixed_dictionaries({}, optional=optional)


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
arguments = some(city=TEXT, x=FLOATS, days=st.lists(st.integers(-9, 9), max_size=2))
messages = some(role=TEXT, content=TEXT, tool_calls=st.lists(some(name=TEXT, arguments=arguments), max_size=2))
typed_row = st.fixed_dictionaries(
    {
        "messages": st.lists(messages, max_size=3),
        "number": st.none() | st.integers(-(2**63), 2**63 - 1),
        "text": st.none() | TEXT,
        "tags": st.none() | st.lists(st.none() | TEXT, max_size=2),
    }
)
value = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def read(files: list[JsonLines | Table], sizes: tuple[int, int] | None = None) -> list:
    """All rows, in chunks of these bytes or rows."""
    sizes = sizes or (1 << 16, 64)
    found = []
    with (
        mock.patch.object(data.preparation.rows, "_BYTES", (sizes[0],) * 2),
        mock.patch.object(data.preparation.rows, "_ROWS", (sizes[1],) * 2),
    ):
        for file in files:
            for start, stop in file.chunks(None)[0]:
                numbered = list(file.read(start, stop))
                assert all(0 <= number < file.lines(start, stop) for number, _ in numbered)
                found += [row for _, row in numbered]
    return found


def unreadable(file: JsonLines | Table) -> list[tuple[int, str, str]]:
    """Line or row number from 1, reason and detail of what cannot be read."""
    rows = [(place + 1, row) for place, row in file.read(*whole(file))]
    return [(place, row.error.reason, row.error.detail) for place, row in rows if isinstance(row, Unreadable)]


def whole(file: JsonLines | Table) -> tuple[int, int]:
    ranges, _ = file.chunks(None)
    return ranges[0][0], ranges[-1][1]


def write_lines(path: Path, rows: list, **how) -> None:
    path.write_text("".join(json.dumps(row, **how) + "\n" for row in rows), encoding="utf-8", newline="")


def write_all_kinds(folder: Path, rows: list[dict]) -> None:
    """Files of every kind that can hold any JSON rows."""
    write_lines(folder / "a.jsonl", rows)
    write_lines(folder / "unicode.ndjson", rows, ensure_ascii=False)
    write_lines(folder / "lines.json", rows)
    (folder / "list.json").write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    (folder / "data.json").write_text(json.dumps({"version": 1, "data": rows}, indent=1))
    lines = (folder / "a.jsonl").read_bytes()
    half = len(lines) // 2
    (folder / "joined.jsonl.gz").write_bytes(gzip.compress(lines[:half]) + gzip.compress(lines[half:]))
    (folder / "list.json.zst").write_bytes(zstd((folder / "list.json").read_bytes()))


def write_tables(folder: Path, rows: list[dict]) -> None:
    """Files of columns, with one group of rows and with several."""
    table = pyarrow.Table.from_pylist(rows, SCHEMA)
    (folder / "columns.json").write_text(json.dumps({name: [row[name] for row in rows] for name in SCHEMA.names}))
    pyarrow.parquet.write_table(table, folder / "one.parquet")
    pyarrow.parquet.write_table(table, folder / "many.parquet", row_group_size=3)
    for number, compression in enumerate((None, "lz4")):
        options = pyarrow.ipc.IpcWriteOptions(compression=compression)
        with pyarrow.ipc.new_stream(folder / f"stream{number}.arrow", SCHEMA, options=options) as file:
            file.write_table(table, 3)
        with pyarrow.ipc.new_file(folder / f"file{number}.feather", SCHEMA, options=options) as file:
            file.write_table(table, 3)


def zstd(content: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.dictionaries(TEXT, value, max_size=4), min_size=1, max_size=9), step=st.integers(1, 99))
def test_any_rows_come_back_from_every_kind_of_text(rows, step):
    with TemporaryDirectory() as place:
        folder, scratch = Path(place, "data"), Path(place, "scratch")
        folder.mkdir()
        write_all_kinds(folder, rows)
        if len(rows) == 1:  # one object alone may be rows under `data`, or columns, also of different lengths
            (folder / "lines.json").unlink()
        for file in open_source(str(folder), scratch=scratch):
            assert read([file]) == read([file], (step, 1 + step % 7)) == rows, file.name


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(typed_row, min_size=1, max_size=9), step=st.integers(1, 99))
def test_tables_give_the_rows_that_lines_give(rows, step):
    with TemporaryDirectory() as place:
        write_tables(Path(place), rows)
        files = open_source(place)
        assert len(files) == 7
        for file in files:
            assert read([file]) == read([file], (step, 1 + step % 7)) == rows, file.name


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> list[JsonLines | Table]:
    """Three readers of the same thirty rows; the lines have gaps and a line that is no JSON."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = [{"n": number, "kept": number % 3 == 0} for number in range(30)]
    lines = ["", *rows[:7], "oops", "  ", *rows[8:], ""]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "b.parquet", row_group_size=8)
    (folder / "c.json").write_text(json.dumps(rows))
    jsonl(folder / "a.jsonl", lines)
    return open_source(str(folder))


def of_three(row: dict) -> bool:
    if row["n"] == 13:
        raise RowError("--where could not be evaluated")
    return row["kept"]


@pytest.mark.parametrize("limit", [0, 1, 3, 5, 9, 11, 12, 30, 99])
@pytest.mark.parametrize("keep", [None, of_three])
def test_a_limit_covers_the_rows_up_to_the_last_that_counts(mixed, small_chunks, limit, keep):
    for file in mixed:
        ranges, counted = file.chunks(limit, keep)
        found = [row for start, stop in ranges for _, row in file.read(start, stop)]
        counting = [
            keep is None or isinstance(row, Unreadable) or row["n"] == 13 or row["kept"]
            for _, row in file.read(*whole(file))
        ]
        assert counted == min(limit, sum(counting))
        up_to = [place for place, counts in enumerate(counting) if counts][limit - 1 : limit] if limit else [-1]
        assert len(found) == (up_to[0] + 1 if up_to else 30), file.name
        assert all(earlier[1] == later[0] for earlier, later in itertools.pairwise(ranges))


def test_without_a_limit_no_row_is_asked_for(mixed):
    for file in mixed:
        assert file.chunks(None, lambda row: pytest.fail("called")) == file.chunks(None)


def test_a_line_longer_than_many_chunks_belongs_to_one(tmp_path, small_chunks):
    rows = [{"a": "x" * length} for length in (10, 50_000, 990, 3)]
    file = JsonLines("a", jsonl(tmp_path / "a.jsonl", rows))
    per_chunk = [[row for _, row in file.read(*chunk)] for chunk in file.chunks(None)[0]]
    assert list(itertools.chain(*per_chunk)) == rows and len(per_chunk) > 50
    assert sum(file.lines(*chunk) for chunk in file.chunks(None)[0]) == 4


@pytest.mark.parametrize(
    "line, reason, detail",
    [
        (b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", "not JSON", "nested too deeply (more than 100 levels)"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "not JSON", "nested too deeply (more than 100 levels)"),
        (b"[" * 100_000, "not JSON", "nested too deeply (more than 100 levels)"),
        (b'{"a": "\xff"}', "not UTF-8", "'utf-8' codec can't decode byte 0xff in position 7: invalid start byte"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8", "'utf-8' codec can't decode byte 0xed in position 7"),
        (b'{"a": {"x": NaN}}', "not JSON", "nan inside a list or an object is no JSON number"),
        (b'{"a": [[-Infinity]]}', "not JSON", "-inf inside a list or an object is no JSON number"),
        (b'{"a": [1e999]}', "not JSON", "inf inside a list or an object is no JSON number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON", "Exceeds the limit"),
        (b'{"a": 1} {"a": 2}', "not JSON", "Extra data"),
        (b"\0", "not JSON", "Expecting value"),
    ],
    ids=lambda value: value[:16].decode("latin-1") if isinstance(value, bytes) else None,
)
def test_a_line_that_is_no_row_is_named_and_the_others_are_read(tmp_path, line, reason, detail):
    good = b'{"question": "a", "answer": "b"}'
    (tmp_path / "a.jsonl").write_bytes(good + b"\n" + line + b"\r\n" + good)
    (file,) = open_source(str(tmp_path / "a.jsonl"))
    ((place, found, why),) = unreadable(file)
    assert (place, found) == (2, reason) and why.startswith(detail)
    rows = [row for _, row in file.read(*whole(file))]
    assert rows[0] == rows[2] == json.loads(good) and rows[1].text == line.decode("utf-8", "replace")


def test_unusual_lines_that_are_rows(tmp_path):
    deep = '{"a": ' + "[" * 99 + "]" * 99 + "}"
    lines = ['\ufeff{"a": 1, "a": 2}', '{"a": NaN}\r', deep, '\ufeff{"a": "\\ud800"}', '{"a": "' + "x" * 10**6 + '"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8", newline="")
    first, second, third, fourth, fifth = read(open_source(str(tmp_path / "a.jsonl")))
    assert first == {"a": 2} and math.isnan(second["a"]) and third == json.loads(deep)
    assert fourth == {"a": "\ud800"} and len(fifth["a"]) == 10**6


@pytest.mark.parametrize("ending", ["parquet", "json"])
def test_rows_of_tables_are_held_to_the_same_rules(tmp_path, ending):
    rows = [{"a": 1.5, "b": [1.5]}, {"a": math.nan, "b": [1.5]}, {"a": 1.5, "b": [math.nan]}]
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        deep = "[" * 200 + "]" * 200
        path.write_text(json.dumps(rows)[:-1] + ', {"a": ' + deep + "}]")
    (file,) = open_source(str(path))
    expected = [(3, "not JSON", "nan inside a list or an object is no JSON number")]
    if ending == "json":
        expected.append((4, "not JSON", "nested too deeply (more than 100 levels)"))
    assert unreadable(file) == expected
    (third,) = [row for _, row in file.read(2, 3)]
    assert json.loads(third.text)["a"] == 1.5


def test_nulls_of_unified_objects_are_left_out_and_real_ones_in_lines_stay(tmp_path):
    tools = [
        {"name": "a", "parameters": {"city": {"type": "string"}}},
        {"name": "b", "parameters": {"day": {"type": "integer", "enum": [1, None]}}},
    ]
    calls = [{"name": "a", "arguments": {"city": "Oslo"}}, {"name": "b", "arguments": {"day": 0}}]
    rows = [
        {"messages": [{"role": "user", "content": "u"}], "tools": tools, "note": None},
        {"messages": [{"role": "assistant", "tool_calls": calls}, None], "tools": None, "note": "n"},
    ]
    table = pyarrow.Table.from_pylist(rows)
    assert table["tools"][0].as_py()[0]["parameters"]["day"] is None  # Arrow has put it there
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    assert read(open_source(str(tmp_path / "a.parquet"))) == read(open_source(str(tmp_path / "saved"))) == rows
    real = [{"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}]
    assert read(open_source(str(jsonl(tmp_path / "a.jsonl", real)))) == real


def test_messages_of_many_shapes_that_datasets_keeps_as_json(tmp_path):
    rows = [
        {"m": [{"role": "a", "arguments": {"x": 1, "y": None}}]},
        {"m": [{"role": "b", "arguments": {"x": "text"}}, {"role": "c"}]},
    ]
    data_set = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    assert "Json" in str(data_set.features)
    data_set.save_to_disk(tmp_path / "saved")
    data_set.to_parquet(tmp_path / "a.parquet")
    assert read(open_source(str(tmp_path / "saved"))) == rows
    assert read(open_source(str(tmp_path / "a.parquet"))) == rows


def test_values_that_json_has_not_become_text(tmp_path):
    day = datetime.date(2024, 2, 29)
    moment = datetime.datetime(2024, 2, 29, 12, 30, tzinfo=datetime.UTC)
    columns = {
        "date": [day],
        "moments": pyarrow.array([[moment]], pyarrow.list_(pyarrow.timestamp("ns", "UTC"))),
        "far": pyarrow.array([10**9], pyarrow.int32()).cast(pyarrow.date32()),  # a year that Python does not know
        "time": [datetime.time(1, 2)],
        "wait": pyarrow.array([90], pyarrow.duration("s")),
        "money": [{"price": decimal.Decimal("1.50"), "none": None}],
        "bytes": [b"text"],
        "raw": [b"\xff\x00"],
        "map": pyarrow.array(
            [[("b", [day]), ("a", None)]], pyarrow.map_(pyarrow.string(), pyarrow.list_(pyarrow.date32()))
        ),
        "empty": pyarrow.array([[]], pyarrow.map_(pyarrow.int32(), pyarrow.string())),
        "names": pyarrow.array(["x"]).dictionary_encode(),
    }
    expected = {
        "date": "2024-02-29",
        "moments": ["2024-02-29 12:30:00.000000000Z"],
        "time": "01:02:00.000000",
        "wait": 90,
        "money": {"price": "1.50"},
        "bytes": "text",
        "raw": "/wA=",
        "map": {"b": ["2024-02-29"], "a": None},
        "empty": {},
        "names": "x",
    }
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", pyarrow.table(columns).schema) as file:
        file.write_table(pyarrow.table(columns))
    (row,) = read(open_source(str(tmp_path / "a.arrow")))
    assert isinstance(row.pop("far"), str) and row == expected
    wrong = pyarrow.table({"a": pyarrow.array([pyarrow.MonthDayNano([1, 2, 3])])})
    with pyarrow.ipc.new_file(tmp_path / "b.arrow", wrong.schema) as file:
        file.write_table(wrong)
    with pytest.raises(
        ValueError, match=r"b\.arrow: column a is of type month_day_nano_interval, which JSON cannot hold"
    ):
        open_source(str(tmp_path / "b.arrow"))


def test_text_of_a_table_that_is_no_text_is_one_unreadable_row(tmp_path):
    bad = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"t": bad, "n": [1, 2, 3]}), tmp_path / "a.parquet")
    (file,) = open_source(str(tmp_path / "a.parquet"))
    rows = [row for _, row in file.read(0, 3)]
    assert rows[0] == {"t": "a", "n": 1} and rows[2] == {"t": "c", "n": 3}
    assert [found[:2] for found in unreadable(file)] == [(2, "not UTF-8")]


@pytest.mark.parametrize("ending, delimiter", [("csv", ","), ("tsv", "\t")])
def test_csv_is_text_as_it_stands(tmp_path, small_chunks, ending, delimiter):
    rows = [
        {"question": f"{number:03d}", "answer": "a,\tb\n" * (number % 3) + '"', "ß": ["", "NA", "1.0"][number % 3]}
        for number in range(600)
    ]
    path = tmp_path / f"a.{ending}"
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows[:300])
        file.write("\r\n\r\n")  # empty lines are no rows
        writer.writerows(rows[300:])
    (table,) = open_source(str(path))
    assert table.length == 600 and read([table], (1, 7)) == rows
    ranges, counted = table.chunks(10, lambda row: row["ß"] == "NA")
    assert (ranges[-1], counted) == ((28, 29), 10)
    long = {"question": "q" * 10**6, "answer": "b", "ß": "c"}
    path.write_text("question" + delimiter + "answer" + delimiter + "ß\n" + delimiter.join(long.values()))
    assert read(open_source(str(path))) == [long]


def test_csv_records_that_are_no_rows(tmp_path):
    text = b'q,a\n1,2\n3\n4,5,6\n"7"x,8\n9,"\xff"\n"10\n11"z,12\n13,14\n15,"16'
    (tmp_path / "a.csv").write_bytes(text)
    (table,) = open_source(str(tmp_path / "a.csv"))
    rows = [row for _, row in table.read(0, table.length)]
    assert [row for row in rows if isinstance(row, dict)] == [{"q": "1", "a": "2"}, {"q": "13", "a": "14"}]
    assert [found[:2] for found in unreadable(table)] == [
        (2, "wrong number of values"),
        (3, "wrong number of values"),
        (4, "not CSV"),
        (5, "not UTF-8"),
        (6, "not CSV"),
        (7, "not CSV"),  # each line of a record whose quotes are wrong, for it may hold several
        (9, "not CSV"),  # a quote that is never closed
    ]
    assert [row.text for row in rows if isinstance(row, Unreadable)][3:] == ['9,"\ufffd"', '"10', '11"z,12', '15,"16']
    wrong = {b"q,q\n1,2\n": "must name each column once", b'"q\n1,2\n': "does not name columns: not CSV"}
    for content, why in wrong.items():
        (tmp_path / "b.csv").write_bytes(content)
        with pytest.raises(ValueError, match=rf"b\.csv: its first line {why}"):
            open_source(str(tmp_path / "b.csv"))


@settings(max_examples=150, deadline=None)
@given(
    content=st.lists(st.sampled_from([b'"', b'""', b",", b"\n", b"\r\n", b"a", b"\xff"]), max_size=40).map(b"".join),
    mark=st.integers(1, 3),
    step=st.integers(1, 4),
)
def test_csv_is_the_same_from_any_row_on(content, mark, step):
    with TemporaryDirectory() as folder, mock.patch.object(data.preparation.tables, "_MARK", mark):
        path = Path(folder, "a.csv")
        path.write_bytes(b"q,a\n" + content)
        (table,) = open_source(str(path))
        found = [row for _, row in table.read(0, table.length)]
        assert list(map(str, read([table], (1, step)))) == list(map(str, found)) and len(found) == table.length
        if b'"' not in content:  # then a record is a line
            assert len(found) == sum(line.strip(b"\r\n") != b"" for line in content.split(b"\n"))
