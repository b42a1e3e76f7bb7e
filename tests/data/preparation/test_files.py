"""Which files a source's name stands for, and the sentence that is said about one that cannot be read."""

import errno
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from data.preparation.files import left_alone, open_source
from data.preparation.rows import JsonLines
from tests.support.preparing import ENVIRONMENT, answers, jsonl, rows, run, texts


def numbered(*numbers: int) -> list[dict]:
    return [{"n": number} for number in numbers]


def numbers(name: str | Path, **how) -> list[int]:
    return [
        row["n"]
        for file in open_source(str(name), **how)
        for start, stop in file.chunks(None)[0]
        for _, row in file.read(start, stop)
    ]


def names(name: str | Path) -> list[str]:
    return [Path(file.name).name for file in open_source(str(name))]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six files of rows, two of them in a directory of their own, and what lies about beside data."""
    folder = tmp_path / "folder"
    (folder / "more").mkdir(parents=True)
    (folder / ".git").mkdir()
    jsonl(folder / "train.jsonl", numbered(0, 1))
    jsonl(folder / "test.jsonl", [{"n": 2, "other": "column"}])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(numbered(3)), folder / "table.PARQUET")
    (folder / "a b,c.json").write_text('{"n": [4, 5]}')
    jsonl(folder / "more" / "_x.ndjson", numbered(6))
    (folder / "more" / "validation.jsonl.gz").write_bytes(gzip.compress(b'{"n": 7}'))
    for name in ("README.md", "LICENSE", ".gitattributes", "dataset_infos.json", "_SUCCESS", "more/Readme.txt"):
        (folder / name).write_text("no rows")
    jsonl(folder / ".git" / "hidden.jsonl", numbered(99))
    return folder


def test_every_file_of_a_directory_is_read(folder):
    assert names(folder) == [
        "a b,c.json",
        "_x.ndjson",
        "validation.jsonl.gz",
        "table.PARQUET",
        "test.jsonl",
        "train.jsonl",
    ]
    assert numbers(folder) == [4, 5, 6, 7, 3, 2, 0, 1]
    assert sorted(os.path.relpath(path, folder) for path in left_alone(str(folder))) == [
        ".git", ".gitattributes", "LICENSE", "README.md", "_SUCCESS", "dataset_infos.json", "more/Readme.txt",
    ]  # fmt: skip


def test_globs(folder, monkeypatch):
    assert numbers(folder / "t*.jsonl") == [2, 0, 1]
    assert numbers(folder / "**" / "*.*json*") == [4, 5, 6, 7, 2, 0, 1] and numbers(folder / "mor[e]") == [6, 7]
    assert numbers(folder / "*") == numbers(folder / "**") == numbers(folder)  # each file once
    assert numbers(folder / "a b,c*") == numbers(folder / "a b,c.json") == [4, 5]
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    assert numbers("~/test.jsonl") == numbers("te??.jsonl") == numbers("./[t]est.jsonl") == [2]
    assert names("t*.jsonl") == ["test.jsonl", "train.jsonl"] and left_alone("[Rt]*") == ["README.md"]


def test_what_cannot_be_read_is_refused_by_name(folder):
    for name in ("weights.bin", "notes.txt", "archive.tar.gz", "table.parquet.gz"):
        (folder / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"archive\.tar\.gz, .*notes\.txt, .*table\.parquet\.gz and 1 more cannot be"):
        open_source(str(folder))
    with pytest.raises(ValueError, match=r"notes\.txt: unknown kind of file, known are \.jsonl, .*\.feather"):
        open_source(str(folder / "notes.txt"))
    assert numbers(folder / "*.jsonl") == [2, 0, 1]


def test_links_are_followed_and_a_circle_is_read_once(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    jsonl(tmp_path / "elsewhere" / "z.jsonl", numbered(8))
    (folder / "way").symlink_to(tmp_path / "elsewhere")
    (folder / "more" / "up").symlink_to(folder)
    assert numbers(folder) == [4, 5, 6, 7, 3, 2, 0, 1, 8]
    (folder / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"gone\.jsonl: No such file or directory"):
        open_source(str(folder))


def test_a_directory_that_datasets_saved_is_one_source(folder, tmp_path):
    both = datasets.DatasetDict({name: datasets.Dataset.from_list(numbered(1)) for name in ("a", "b")})
    both.save_to_disk(folder / "saved")
    (file,) = open_source(f"{folder / 'saved'}::b")
    assert (file.length, list(file.read(0, 1))) == (1, [(0, {"n": 1})])
    assert numbers(folder / "saved", split="a") == [1] and left_alone(str(folder / "saved")) == []
    with pytest.raises(ValueError, match="choose one of its splits with --split: a, b"):
        open_source(str(folder / "saved"))
    with pytest.raises(ValueError, match=r"saved was written by `save_to_disk`: give it as a source of its own"):
        open_source(str(folder))
    with pytest.raises(ValueError, match=r"every file of a directory is read.* write .*more::train for what"):
        open_source(str(folder / "more"), split="train")


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("a.jsonl,b.jsonl", "write sources apart by spaces, not by commas: a.jsonl b.jsonl"),
        ("d*.jsonl, hub/name", "write sources apart by spaces, not by commas: d*.jsonl hub/name"),
        ("*.none", "no file of rows matches"),
        ("*.md", "no file of rows matches, only README.md"),
        ("nothing", "the directory holds no file of rows"),
        ("missing.csv.gz", "there is no such file"),
        ("some/where/else", "there is no such file"),
        ("hub/name:a:b:c", "write a data set as name, name:config or name:config:split"),
        ("empty.jsonl", "the file is empty"),
        ("empty.jsonl.gz", "the file is empty"),
        ("empty.tsv.zst", "the file is empty"),
        ("cut.jsonl.gz", "damaged or cut off, it cannot be decompressed: Truncated compressed stream"),
        ("check.jsonl.gz", "damaged or cut off, it cannot be decompressed: zlib inflate failed: incorrect data check"),
        ("text.csv.zst", "damaged or cut off, it cannot be decompressed: ZSTD decompress failed"),
        ("text.parquet", "not a parquet file: "),
        ("text.arrow", "not an Arrow file: "),
        ("cut.arrow", "the file was cut off: its stream has no end"),
        ("deep.json", "not JSON: nested too deeply"),
        ("bad.json", "not JSON: Expecting value: line 3"),
        ("latin.json", "'utf-8' codec can't decode byte 0xe9"),
        ("one.json", 'a JSON file must hold a list of rows, {"data": [...]}, or a list for each column'),
        ("uneven.json", "the columns have different lengths (q 2, a 1)"),
        ("twice.parquet", "two columns have the same name (a, a)"),
        ("pipe.jsonl", "neither a file nor a directory; write what comes through a pipe to a file first"),
    ],
)
def test_one_sentence_for_each_mistake(tmp_path, monkeypatch, name, sentence):
    monkeypatch.chdir(tmp_path)
    make_mistakes()
    with pytest.raises(ValueError) as caught:
        open_source(name)
    assert str(caught.value).startswith(f"{name}: {sentence}") and "\n" not in str(caught.value)


def make_mistakes() -> None:
    packed = gzip.compress(b'{"a": 1}\n' * 9000)
    contents = {
        "empty.jsonl": b"",
        "empty.jsonl.gz": gzip.compress(b""),
        "empty.tsv.zst": pyarrow.Codec("zstd").compress(b"", asbytes=True),
        "cut.jsonl.gz": packed[:-12],
        "check.jsonl.gz": packed[:-8] + b"\0\0\0\0" + packed[-4:],
        "text.csv.zst": b"a,b",
        "text.parquet": b"not parquet",
        "text.arrow": b"no",
        "deep.json": b"[" * 100_000,
        "bad.json": b"[\n{},\n}\n]",
        "latin.json": b'["\xe9"]',
        "one.json": b'{\n"q": "a"}',
        "uneven.json": b'{"q": [1, 2], "a": [1]}',
        "README.md": b"text",
    }
    for name, content in contents.items():
        Path(name).write_bytes(content)
    Path("nothing").mkdir()
    os.mkfifo("pipe.jsonl")
    pyarrow.parquet.write_table(pyarrow.table([[1], [2]], names=["a", "a"]), "twice.parquet")
    with pyarrow.ipc.new_stream("whole.arrow", pyarrow.schema([("a", pyarrow.int64())])) as stream:
        stream.write_table(pyarrow.table({"a": list(range(9))}), 3)
    Path("cut.arrow").write_bytes(Path("whole.arrow").read_bytes()[:-8])  # Arrow reads it as if nothing were missing


def test_decompressed_copies_are_kept_and_found_again(tmp_path):
    packed, scratch = tmp_path / "a.jsonl.gz", tmp_path / "new" / "scratch"
    packed.write_bytes(gzip.compress(b'{"n": 1}\n' * 9))
    (file,) = open_source(str(packed), scratch=scratch)
    (copy,) = scratch.iterdir()
    assert copy.read_bytes() == b'{"n": 1}\n' * 9 and file.name == str(packed) and str(packed) in file.identity
    made = copy.stat().st_mtime_ns
    (again,) = open_source(str(packed), scratch=scratch)
    assert again == file and copy.stat().st_mtime_ns == made
    packed.write_bytes(gzip.compress(b'{"n": 2}\n'))
    assert numbers(packed, scratch=scratch) == [2] and len(list(scratch.iterdir())) == 2
    packed.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="damaged"):
        open_source(str(packed), scratch=scratch)
    assert len(list(scratch.iterdir())) == 2  # nothing half-written is left


def test_without_scratch_copies_are_removed_at_exit(tmp_path):
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"n\n007\n"))
    code = f"""
import os
from data.preparation.files import open_source
(file,) = open_source({str(tmp_path / "a.csv.gz")!r})
if not os.fork():
    raise SystemExit  # a child's end removes nothing
os.wait()
print(list(file.read(0, 1)))"""
    environment = {**ENVIRONMENT, "TMPDIR": str(tmp_path)}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout == "[(0, {'n': '007'})]\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv.gz"]


def test_a_full_disk_names_its_path(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"{}"))

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"scratch/.*\.partial: .*a\.jsonl\.gz cannot be decompressed: No space left"):
        open_source(str(tmp_path / "a.jsonl.gz"), scratch=tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_files_that_may_not_be_read(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", rows(1))
    path.chmod(0)
    user = os.geteuid()
    if user == 0:  # who may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(ValueError, match=r"a\.jsonl: Permission denied"):
            open_source(str(path))
    finally:
        os.seteuid(user)


def test_an_error_in_the_middle_names_the_file(tmp_path):
    broken = JsonLines("a", Path("/proc/self/mem"))  # it opens, and nothing can be read at its start
    for reading in (lambda: list(broken.read(0, 9)), lambda: broken.lines(0, 9), lambda: broken.chunks(9)):
        with pytest.raises(OSError, match="Input/output error: '/proc/self/mem'"):
            reading()
    some = [{"text": os.urandom(4000).hex()} for _ in range(8)]
    for ending in ("parquet", "arrow"):
        path = tmp_path / f"a.{ending}"
        if ending == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some), path, row_group_size=4, use_dictionary=False)
        else:
            with pyarrow.ipc.new_file(path, pyarrow.schema([("text", pyarrow.string())])) as file:
                file.write_table(pyarrow.Table.from_pylist(some), 4)
        (table,) = open_source(str(path))
        assert len(list(table.read(0, 8))) == 8
        if ending == "parquet":
            content = bytearray(path.read_bytes())
            middle = len(content) // 2 + 2000
            content[middle : middle + 9000] = b"\xff" * 9000
            path.write_bytes(content)
        else:
            path.write_bytes(b"")
        with pytest.raises((OSError, ValueError), match=rf"a\.{ending}"):
            list(table.read(0, 4)) + list(table.read(4, 8))


def test_one_source_of_many_files_is_prepared_whole(tmp_path, model, folder):
    """The rows of all files, and the file and line of one that is dropped."""
    source = tmp_path / "source"
    source.mkdir()
    some = rows(12)
    jsonl(source / "a_test.jsonl", [*some[:4], '{"a": ' + "[" * 999])
    (source / "b.csv").write_text(
        "question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in some[4:8])
    )
    (source / "c.json.gz").write_bytes(gzip.compress(json.dumps(some[8:]).encode()))
    meta, _ = run(model, tmp_path / "data", source)
    assert texts(tmp_path / "data") == answers(some) and meta["rows"] == 13
    assert meta["dropped"]["not JSON"]["first"].startswith(f"{source}/a_test.jsonl:5: nested too deeply")
