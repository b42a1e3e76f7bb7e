"""Two preparations into one output: the second is refused, and what a killed one leaves is taken over."""

import os
import re
import socket
import subprocess
import sys

import pytest

from data.index import DocumentIndex
from data.preparation.lock import only_one
from tests.support.preparing import ENVIRONMENT, jsonl, prepare_in_process, rows, run

HOLD = """
import sys
from pathlib import Path
from data.preparation.lock import only_one
with only_one(Path(sys.argv[1]), Path("out")):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(parts) -> subprocess.Popen:
    """A process that holds the lock until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(parts)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT
    )
    assert process.stdout.readline() == b"held\n"
    return process


def test_the_second_is_refused_and_a_killed_one_leaves_nothing(model, tmp_path, monkeypatch):
    prepare_in_process(monkeypatch)
    source = jsonl(tmp_path / "a.jsonl", rows(5))
    parts = tmp_path / "data.parts"
    with holder(parts) as process:
        who = f"process {process.pid} on {re.escape(socket.gethostname())} since 20"
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=rf"--output .*data is being prepared by {who}.*: wait for it"):
                run(model, tmp_path / "data", source, overwrite=overwrite)
        assert not (tmp_path / "data").exists() and (parts / "lock").exists()
        process.kill()
        process.wait()
        assert (parts / "lock").exists()
        run(model, tmp_path / "data", source)
    assert len(DocumentIndex(tmp_path / "data")) == 5 and not parts.exists()


def test_a_lock_ends_with_its_block_and_leaves_what_is_not_its_own(tmp_path):
    parts = tmp_path / "some" / "data.parts"
    with only_one(parts, tmp_path / "data"):
        assert f'"pid": {os.getpid()}' in (parts / "lock").read_text()
    assert not parts.exists()
    with pytest.raises(KeyError), only_one(parts, tmp_path / "data"):
        (parts / "000000.npz").write_bytes(b"")
        raise KeyError
    assert sorted(file.name for file in parts.iterdir()) == ["000000.npz"]
    with holder(parts) as process:
        process.stdin.close()
    assert sorted(file.name for file in parts.iterdir()) == ["000000.npz"]


def test_an_output_that_is_refused_leaves_no_directory(model, tmp_path, monkeypatch):
    prepare_in_process(monkeypatch)
    source = jsonl(tmp_path / "a.jsonl", [{"prose": "a"}])
    with pytest.raises(ValueError, match="there is no such file"):
        run(model, tmp_path / "data", tmp_path / "missing.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    with pytest.raises(ValueError, match="can be used"):
        run(model, tmp_path / "data", source)
    assert (tmp_path / "data.parts" / "000000.npz").exists() and not (tmp_path / "data.parts" / "lock").exists()
