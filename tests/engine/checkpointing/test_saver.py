"""A save beside the training: its writing process, what all ranks must see of it, and how its failure is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch import distributed

from engine.checkpointing.image_writer import ImageWriter
from engine.checkpointing.resume_point import find_resume_point
from engine.checkpointing.saver import CheckpointFailed
from tests.engine.checkpointing.test_resume import run
from tests.engine.test_failures import outcome
from tests.support.tiny import make_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("saver"), "qwen2_tied", 8)


def arguments(inputs: Path, output: Path, *extra: str) -> list[str]:
    paths = ["--model", inputs / "model", "--data", inputs / "data", "--output", output]
    return [*map(str, paths), *["--seq-len", "96", "--global-batch-size", "2", "--optim.lr", "1e-3"], *extra]


def blocked(folder: Path) -> Path:
    """A file that nobody reads, so that its writer waits."""
    os.mkfifo(folder / "file")
    return folder / "file"


def test_its_process_is_deaf_to_what_ends_jobs(tmp_path):
    descriptor = os.memfd_create("image")
    os.ftruncate(descriptor, 1000)
    writer = ImageWriter(descriptor, 1000, blocked(tmp_path))
    try:
        process = psutil.Process(writer._process.pid)
        deadline = time.monotonic() + 30
        while not _ignored(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
            process.send_signal(number)
        time.sleep(0.3)
        assert writer.running()
    finally:
        writer.kill()
        os.close(descriptor)


def _ignored(pid: int) -> int:
    """Whether a process ignores SIGTERM, by proc(5)."""
    line = next(one for one in Path(f"/proc/{pid}/status").read_text().splitlines() if one.startswith("SigIgn"))
    return int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1


PARENT = """
import os, sys, time
from pathlib import Path
from engine.checkpointing.image_writer import ImageWriter
descriptor = os.memfd_create("image")
os.ftruncate(descriptor, 1000)
print(ImageWriter(descriptor, 1000, Path(sys.argv[1]))._process.pid, flush=True)
time.sleep(600)
"""


def test_its_process_dies_with_its_parent(tmp_path):
    command = [sys.executable, "-c", PARENT, str(blocked(tmp_path))]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    writer = psutil.Process(int(parent.stdout.readline()))
    deadline = time.monotonic() + 30
    while not _ignored(writer.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    parent.kill()
    parent.communicate()
    _, alive = psutil.wait_procs([writer], timeout=10)
    assert not alive, "the writing process outlived its parent"


def run_with_a_lost_file(arguments: list[str]) -> str:
    """Trains; what the second rank has written is not there when the first looks."""
    original = ImageWriter.failure

    def lost(writer: ImageWriter) -> str:
        found = original(writer)
        if distributed.get_rank() == 1 and "step_000002" in str(writer.path):
            writer.path.unlink(missing_ok=True)
        return found

    ImageWriter.failure = lost
    try:
        run(arguments)
    except CheckpointFailed as error:
        return str(error)
    finally:
        ImageWriter.failure = original
    return ""


def test_a_save_of_which_a_file_is_not_seen_does_not_count(pool, inputs, tmp_path):
    given = arguments(inputs, tmp_path / "run", "--steps", "2", "--checkpoint.every", "1")
    for sentence in pool.run(run_with_a_lost_file, 2, given):
        assert "__1_0.distcp, which its rank has written, is not seen by rank 0" in sentence
    assert find_resume_point(tmp_path / "run").step == 1
    assert not (tmp_path / "run" / "checkpoints" / "step_000002").exists()


def test_a_save_that_fails_beside_the_training_is_told_long_before_the_next(pool, inputs, tmp_path):
    output = tmp_path / "run"
    given = arguments(inputs, output, "--steps", "400", "--checkpoint.every", "200", "--checkpoint.async", "on")
    for sentence in pool.run(outcome, 2, given, 400_000):  # metrics and their mirrors have less
        assert "step_000200 could not be written and nothing of it is left" in sentence
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert 200 <= steps[-1] < 400 and find_resume_point(output) is None
