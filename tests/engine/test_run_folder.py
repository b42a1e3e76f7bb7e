"""What RUN holds is moved as a whole, on its own file system, and never lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.run_folder import RunFolder, replace_text

WRITER = """
import sys
from pathlib import Path
from engine.run_folder import replace_text
for _ in range(500):
    replace_text(Path(sys.argv[1]), sys.argv[2] * 100_000)
"""


def fill(run: RunFolder, *steps: int) -> None:
    for step in steps:
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / "lathe.json").write_text("{}")
        run.export(step).mkdir(parents=True)
    run.latest.write_text(run.checkpoint(steps[-1]).name)


def tree(run: RunFolder) -> list[str]:
    """Every file and empty directory below RUN, links followed once."""
    found = (path for path in run.path.rglob("*") if not path.is_symlink())
    return sorted(str(path.relative_to(run.path)) for path in found if path.is_file())


def test_an_earlier_run_is_one_folder(tmp_path):
    run = RunFolder(tmp_path)
    assert run.set_aside() is None
    fill(run, 1, 2)
    for name in ("config.yaml", "metrics.jsonl", "status.json", "notes.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "beyond.1").mkdir()
    assert run.set_aside() == tmp_path / "earlier.1"
    assert sorted(path.name for path in tmp_path.iterdir() if any((path, path.is_file()))) == [
        "checkpoints", "earlier.1", "hf", "notes.txt", "status.json"
    ]  # fmt: skip
    assert not list(run.checkpoints.iterdir()) and not list(run.exports.iterdir())
    aside = RunFolder(tmp_path / "earlier.1")
    assert list(aside.checkpoint_steps()) == [1, 2] and aside.latest.read_text() == "step_000002"
    assert (aside.path / "beyond.1").is_dir() and aside.metrics.read_text() == "metrics.jsonl"
    fill(run, 3)
    assert run.set_aside() == tmp_path / "earlier.2"


def test_scores_go_where_the_steps_go_that_they_are_of(tmp_path):
    run = RunFolder(tmp_path)
    fill(run, 1, 2)
    for model in ("step_000001", "step_000002", "average"):
        (run.evaluation / model).mkdir(parents=True)
        (run.evaluation / model / "results.json").write_text(model)
    beyond = run.set_beyond_aside(1, [])
    assert (beyond / "evaluation" / "step_000002" / "results.json").read_text() == "step_000002"
    assert {path.name for path in run.evaluation.iterdir()} == {"step_000001", "average"}
    earlier = run.set_aside()
    assert (earlier / "evaluation" / "average" / "results.json").exists() and not run.evaluation.exists()


@pytest.mark.parametrize("what", ["earlier", "beyond"])
def test_checkpoints_behind_a_link_stay_on_their_disk(tmp_path, what):
    run, scratch = RunFolder(tmp_path / "run"), tmp_path / "scratch"
    scratch.mkdir()
    run.path.mkdir()
    run.checkpoints.symlink_to(scratch)
    fill(run, 1, 2)
    inode = run.checkpoint(2).stat().st_ino
    aside = run.set_aside() if what == "earlier" else run.set_beyond_aside(1, ["line"])
    assert run.checkpoints.is_symlink() and os.readlink(run.checkpoints) == str(scratch)
    moved = aside / "checkpoints" / "step_000002"
    assert moved.stat().st_ino == inode and moved.resolve() == scratch / f"{what}.1" / "step_000002"
    assert list(run.checkpoint_steps()) == ([] if what == "earlier" else [1])
    if what == "beyond":  # and with the rest into an earlier run, where its link still leads to it
        earlier = run.set_aside()
        assert (earlier / "beyond.1" / "checkpoints" / "step_000002" / "lathe.json").exists()
        assert (earlier / "beyond.1" / "metrics.jsonl").read_text() == "line\n"


def test_a_promise_counts_until_latest_is_moved(tmp_path):
    run = RunFolder(tmp_path)
    fill(run, 1)
    partial = run.checkpoints / "step_000002.tmp"
    partial.mkdir()
    assert run.complete_checkpoint(partial, 2) == run.checkpoint(2)
    assert run.latest.read_text() == "step_000002\n" and run.promised() is None and not partial.exists()
    promise = run.latest.with_name("latest.tmp")
    promise.write_text("step_000003\n")
    assert run.promised() is None  # that checkpoint was not renamed yet
    run.checkpoint(3).mkdir()
    assert run.promised() == run.checkpoint(3)
    later = promise.stat().st_mtime + 1
    os.utime(run.latest, (later, later))  # someone has written into it since
    assert run.promised() is None
    promise.write_text("../../elsewhere\n")
    run.latest.unlink()
    assert run.promised() is None


def test_leftovers_go_and_other_files_stay(tmp_path):
    run = RunFolder(tmp_path)
    fill(run, 1)
    left = ("metrics.jsonl.tmp", "status.json.node1.7.tmp", "skipped.jsonl.node1.7.tmp", "lock.json.abc.tmp")
    for name in (*left, "checkpoints/latest.tmp", "own.tmp"):
        (tmp_path / name).write_text("")
    for name in ("checkpoints/step_000002.tmp", "hf/step_000001.old.tmp", "model_files.tmp"):
        (tmp_path / name).mkdir()
    run.remove_leftovers()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.tmp")] == ["own.tmp"]
    run.remove_checkpoint(1)
    assert tree(run) == ["checkpoints/latest", "own.tmp"]


def test_several_processes_write_one_file_each_as_a_whole(tmp_path):
    path = tmp_path / "status.json"
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [subprocess.Popen([*command, letter], cwd=Path(__file__).parents[2]) for letter in "ab"]
    found = set()
    while any(writer.poll() is None for writer in writers):
        found.add(path.read_text() if path.exists() else "")
    assert [writer.returncode for writer in writers] == [0, 0]
    assert found <= {"", "a" * 100_000, "b" * 100_000} and os.listdir(tmp_path) == ["status.json"]


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "status.json").mkdir()
    with pytest.raises(OSError, match="directory"):
        replace_text(tmp_path / "status.json", "{}")
    assert os.listdir(tmp_path) == ["status.json"]
