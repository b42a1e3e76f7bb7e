"""One job owns RUN; who is gone is succeeded, who may live is not."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engine import run_lock
from engine.run_folder import RunFolder
from engine.run_lock import held, is_anothers, read_lock, this_process

HOLD = """
import sys, time
from pathlib import Path
from engine.run_folder import RunFolder
from engine.run_lock import held
with held(RunFolder(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return RunFolder(tmp_path / "run")


def elsewhere(run: RunFolder, *, silent: float = 0, **changes) -> None:
    """Leaves the lock of a process on another machine, which gave a sign of life some seconds ago."""
    run.path.mkdir(exist_ok=True)
    owner = this_process() | {"host": "node7", "pid": 41, "machine": "node7", "start": "other", "token": "t"} | changes
    run.lock.write_text(json.dumps(owner))
    then = time.time() - silent
    os.utime(run.lock, (then, then))


def test_a_living_process_is_named_and_a_dead_one_succeeded(run):
    command = [sys.executable, "-c", HOLD, str(run.path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        words = rf"is in use by process {process.pid} on .*, since 20\d\d-.*: wait"
        with pytest.raises(ValueError, match=words), held(run):
            pass
        assert is_anothers(run) and read_lock(run)["pid"] == process.pid
        process.kill()
    assert not is_anothers(run)
    with held(run) as said:
        assert f"from process {process.pid} on" in said and said.endswith("that process is gone")
        assert read_lock(run)["pid"] == os.getpid() and not is_anothers(run)
    assert list(run.path.iterdir()) == []


def test_it_is_released_after_an_error_and_only_by_its_owner(run):
    with pytest.raises(RuntimeError), held(run) as said:
        assert said is None
        raise RuntimeError
    assert not run.lock.exists()
    with held(run):
        elsewhere(run)  # another one took it over
    assert read_lock(run)["host"] == "node7"


def test_a_later_process_of_the_same_number_is_another(run):
    elsewhere(run, machine=run_lock._machine(), pid=os.getppid(), born="1")
    with held(run) as said:
        assert "that process is gone" in said
    elsewhere(run, machine=run_lock._machine(), pid=os.getppid(), born=run_lock._birth(os.getppid()))
    with pytest.raises(ValueError, match="is in use"), held(run):
        pass


def test_an_owner_elsewhere_lives_until_it_is_silent(run):
    elsewhere(run, silent=500)
    with pytest.raises(ValueError, match="in use by process 41 on node7, since"), held(run):
        pass
    elsewhere(run, silent=700)
    with held(run) as said:
        assert "it gave no sign of life for 12 minutes" in said


@pytest.mark.parametrize(
    ("answer", "lives"),
    [("echo RUNNING", True), ("true", False), ("echo PENDING", False), ("echo Invalid job id specified >&2; exit 1", 0),
     ("echo cannot connect >&2; exit 1", True)],
)  # fmt: skip
def test_slurm_says_whether_a_job_is_there(run, tmp_path, monkeypatch, answer, lives):
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\n{answer}\n")
    squeue.chmod(squeue.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    elsewhere(run, job="77")
    if lives:
        with pytest.raises(ValueError, match="process 41 on node7, SLURM job 77, since"), held(run):
            pass
    else:
        with held(run) as said:
            assert "SLURM runs no job 77 any more" in said


def test_our_own_job_started_again(run, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    elsewhere(run, job="77", restart="0")
    with held(run) as said:
        assert "the job was requeued since" in said
    monkeypatch.setattr(run_lock, "BEAT", 0.05)
    monkeypatch.setattr(run_lock, "OWN_SILENCE", 100.2)
    elsewhere(run, job="77", restart="1", silent=100)  # torchrun went on elsewhere: waits for a sign of life
    with held(run) as said:
        assert "it gave no sign of life" in said


def test_torchruns_own_job_started_again_on_another_node(run, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT", 0.05)
    monkeypatch.setattr(run_lock, "OWN_SILENCE", 100.2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun's word for a job without a name
    elsewhere(run, elastic=this_process()["elastic"], silent=101)
    with pytest.raises(ValueError, match="is in use"), held(run):
        pass
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    elsewhere(run, elastic="b", silent=101)
    assert is_anothers(run)
    elsewhere(run, elastic=this_process()["elastic"], silent=100)
    assert is_anothers(run)  # it may live
    with held(run) as said:
        assert "it gave no sign of life" in said
    elsewhere(run, elastic=this_process()["elastic"], silent=101)
    assert not is_anothers(run)


def test_a_machine_that_was_started_anew(run, monkeypatch):
    host, _, space = run_lock._machine().split()
    monkeypatch.setattr(run_lock, "_seconds_up", lambda: 50.0)
    monkeypatch.setattr(run_lock, "BEAT", 0.05)
    elsewhere(run, host=host, machine=f"{host} before {space}", silent=40)  # another machine of this name lives
    refreshed = threading.Timer(0.5, os.utime, [run.lock])
    refreshed.start()
    with pytest.raises(ValueError, match="is in use"), held(run):
        pass
    refreshed.join()
    elsewhere(run, host=host, machine=f"{host} before {space}", silent=60)
    with held(run) as said:
        assert said.endswith("its machine was started anew since")


@pytest.mark.parametrize("links", [True, False])
def test_a_lock_that_changed_hands_is_put_back(run, monkeypatch, links):
    """Also where the file system has no hard links: RUN never stands without its owner's lock."""

    def without(*_: object) -> None:
        raise PermissionError("Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", without)
    elsewhere(run, token="of the one who took it over")
    assert not run_lock._remove(run.lock, {"token": "of a dead owner"})
    assert [path.name for path in run.path.iterdir()] == ["lock.json"]
    assert read_lock(run)["token"] == "of the one who took it over"
    assert run_lock._remove(run.lock, read_lock(run)) and not list(run.path.iterdir())


def race(path: Path, barrier, results) -> None:
    run = RunFolder(path)
    barrier.wait()
    try:
        with held(run):
            results.put(True)
            time.sleep(1)
    except ValueError:
        results.put(False)


def test_of_many_one_takes_over(run):
    elsewhere(run, silent=700)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(6), context.Queue()
    racers = [context.Process(target=race, args=(run.path, barrier, results)) for _ in range(6)]
    for racer in racers:
        racer.start()
    found = [results.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join()
    assert sorted(found) == [False] * 5 + [True]


def test_signs_of_life(run, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT", 0.02)
    with held(run):
        os.utime(run.lock, (1, 1))
        deadline = time.monotonic() + 20
        while run.lock.stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - run.lock.stat().st_mtime < 20
        run.lock.unlink()  # by hand
        while not run.lock.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert read_lock(run)["pid"] == os.getpid()
    assert not run.lock.exists()
