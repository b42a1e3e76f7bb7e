"""A flipped byte and a cut tail in every file of a checkpoint are named: by --verify, and where the bytes are read."""

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from checkpoint_tools import inspect_checkpoint
from data.checked_files import CheckedFile, verify
from data.checksums import BlockSums, DamagedFile, write_sums
from engine.checkpointing.directory import MANIFEST, STATE, faults, read_manifest, write_manifest
from engine.checkpointing.resume_point import find_resume_point, newest_intact
from engine.checkpointing.store_reader import StoreReader
from engine.checkpointing.store_writer import write_store


def make(folder: Path, step: int) -> Path:
    """A checkpoint of two tensors, 3 MiB in two files."""
    tensors = {"a": torch.randn(700, 1000), "optimizer.state.exp_avg.a": torch.randn(100, 1000)}
    specs = [(key, tensor.shape, tensor.dtype, tensor.__getitem__) for key, tensor in tensors.items()]
    write_store(folder / STATE, specs, 2**18, num_workers=2)
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text('{"vocab_size": 8}')
    write_manifest(folder, {"step": step, "data": {}})
    return folder


def read_all(folder: Path) -> None:
    read_manifest(folder)
    store = StoreReader(folder / STATE)
    for key in store.keys():  # noqa: SIM118  (no dict)
        store.read(key)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with three checkpoints."""
    run = tmp_path_factory.mktemp("run")
    for step in (1, 2, 3):
        make(run / "checkpoints" / f"step_{step:06d}", step)
    return run


def damaged(path: Path) -> Iterator[str]:
    """Damages a file in one way after another, and mends it in the end."""
    content, numbers = path.read_bytes(), random.Random(path.name)
    places = {0, len(content) // 2, len(content) - 1, *(numbers.randrange(len(content)) for _ in range(4))}
    try:
        for place in sorted(places):
            changed = bytearray(content)
            changed[place] ^= 1 << numbers.randrange(8)
            path.write_bytes(changed)
            yield f"byte {place}"
        path.write_bytes(content)
        os.truncate(path, len(content) - 1)
        yield "tail"
    finally:
        path.write_bytes(content)


def test_every_flip_and_every_cut_is_named(run, capsys):
    folder = run / "checkpoints" / "step_000003"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix() for path in files}
    assert {MANIFEST, "state/.metadata", "state/__1_0.distcp", "state/__1_0.distcp.sums", "hf/config.json"} <= names
    for path in files:
        for kind in damaged(path):
            with pytest.raises(ValueError, match=r"step_000003.*" + path.name.removesuffix(".sums")):
                read_all(folder)
            assert inspect_checkpoint.main(folder, verify=True) == 1
            assert path.name.removesuffix(".sums") in capsys.readouterr().out, (path, kind)
    assert inspect_checkpoint.main(folder, verify=True) == 0
    assert capsys.readouterr().out == f"{folder} is intact\n"


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(content)


def test_the_newest_intact_step_is_offered(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    steps = tmp_path / "run" / "checkpoints"
    (steps / "latest").write_text("step_000003\n")
    for step in (2, 3):
        flip(steps / f"step_{step:06d}" / STATE / "__0_0.distcp", 2**20 + 5000)
    with pytest.raises(DamagedFile, match=r"__0_0.distcp is damaged: its bytes 1,048,576 to 1,310,719 are not those"):
        read_all(steps / "step_000003")
    assert "that is intact is step_000001: go on from it with --checkpoint.resume-from 1," in newest_intact(
        steps / "step_000003"
    )
    # One too large to be read by every rank is held against its manifest alone.
    assert "manifest says is step_000002" in newest_intact(steps / "step_000003", at_most=0)
    flip(steps / "step_000003" / "hf" / "config.json", 3)
    for named in (None, 3):  # by `latest` and by hand
        with pytest.raises(ValueError, match=r"config.json is damaged.*is intact is step_000001: go on"):
            find_resume_point(tmp_path / "run", named)
    # An average has nothing to go on with.
    manifest = {name: value for name, value in read_manifest(steps / "step_000001").items() if name == "step"}
    write_manifest(steps / "step_000001", manifest)
    assert "has no other checkpoint that is intact" in newest_intact(steps / "step_000003")


def test_a_checkpoint_of_another_step_is_not_taken_for_the_one_that_it_is_named_after(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    steps = tmp_path / "run" / "checkpoints"
    (steps / "step_000003").rename(steps / "step_000040")
    with pytest.raises(ValueError, match="step_000040 holds step 3"):
        find_resume_point(tmp_path / "run", 40)
    for name in ("../../elsewhere", "step_3", ""):
        (steps / "latest").write_text(name)
        with pytest.raises(ValueError, match="latest is damaged: it names"):
            find_resume_point(tmp_path / "run")


def test_what_cannot_be_verified_is_no_damage(tmp_path):
    (tmp_path / "empty").mkdir()
    for path, sentence in ((tmp_path / "nowhere", "it is not there"), (tmp_path / "empty", "is no checkpoint, no")):
        with pytest.raises(ValueError, match=sentence):
            inspect_checkpoint.main(path, verify=True)


def test_a_file_that_the_manifest_does_not_know_is_missed(run, tmp_path, capsys):
    folder = shutil.copytree(run / "checkpoints" / "step_000001", tmp_path / "step_000001")
    for name in ("__1_0.distcp", "__1_0.distcp.sums"):
        (folder / STATE / name).unlink()
    write_manifest(folder, {"step": 1})
    assert inspect_checkpoint.main(folder, verify=True) == 1
    assert "__1_0.distcp is missing" in capsys.readouterr().out


def test_a_bare_store_is_verified(run, tmp_path, capsys):
    store = shutil.copytree(run / "checkpoints" / "step_000001" / STATE, tmp_path / "store")
    assert inspect_checkpoint.main(store, verify=True) == 0
    assert capsys.readouterr().out == f"{store} is intact\n"
    flip(store / "__1_0.distcp", 500)
    assert inspect_checkpoint.main(store, verify=True) == 1
    assert "__1_0.distcp is damaged" in capsys.readouterr().out


def test_checkpoints_without_checksums_are_read(run, tmp_path, capsys):
    folder = shutil.copytree(run / "checkpoints" / "step_000001", tmp_path / "old")
    for path in folder.rglob("*.sums"):
        path.unlink()
    meta = read_manifest(run / "checkpoints" / "step_000001")
    files = {name: size for name, size in meta["files"].items() if not name.endswith(".sums")}
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "step": 1, "files": files}))
    read_all(folder)
    assert list(faults(folder)) == []
    assert inspect_checkpoint.main(folder, verify=True) == 0
    assert capsys.readouterr().out == f"{folder} has no checksums; only sizes and headers were checked\n"


def test_checksums_that_were_taken_away_are_missed(run, tmp_path):
    folder = shutil.copytree(run / "checkpoints" / "step_000001", tmp_path / "step")
    (folder / STATE / "__0_0.distcp.sums").unlink()
    with pytest.raises(ValueError, match=r"__0_0.distcp.sums is missing"):
        read_manifest(folder)


@pytest.mark.parametrize("size", [0, 1, 4096, 3 * 4096, 50_000])
def test_any_run_of_bytes_is_checked(tmp_path, size):
    numbers, path = random.Random(size), tmp_path / "file"
    content, sums, start = numbers.randbytes(size), BlockSums(4096), 0
    path.write_bytes(content)
    while start < size:
        count = numbers.choice([1, 100, 4096, 9000])
        sums.update(content[start : start + count])
        start += count
    write_sums(path, 4096)
    assert sums.content() == (tmp_path / "file.sums").read_bytes()
    verify(path)
    with CheckedFile(path) as file:
        for _ in range(20 if size else 0):
            start = numbers.randrange(size)
            length = numbers.randrange(size - start) + 1
            assert file.read(start, length) == content[start : start + length]
    if size:
        place = numbers.randrange(size)
        flip(path, place)
        first = place // 4096 * 4096
        with pytest.raises(DamagedFile, match=f"its bytes {first:,} to {min(first + 4096, size) - 1:,} are not"):
            verify(path)
