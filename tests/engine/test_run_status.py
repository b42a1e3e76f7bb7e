"""How a run ended is written down, by whichever rank knows, and never over what another job or run has to say."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine import run_status, signals
from engine.run_folder import RunFolder
from engine.run_status import DONE, FAILED, REFUSED, RUNNING, STOPPED, read_status, tell, took_effect, write_status
from examples import pretrain_sft

ROOT = Path(__file__).parents[2]
LATE = """
import os, sys, time
if os.environ["RANK"] == "0":
    time.sleep(3)
from examples import pretrain_sft
sys.exit(pretrain_sft.main(sys.argv[1:]))
"""
# Rank 1 begins to wait, or hears that it is to end, when rank 0 has long ended.
EARLY = """
import os, sys, time
from engine import signals
from examples import pretrain_sft
signals.hear_early()
if os.environ["RANK"] == "1":
    time.sleep(1)
sys.exit(pretrain_sft.main(sys.argv[1:]))
"""
# Rank 1 fails alone, and rank 0 falls out of what it waits in.
ALONE = """
import sys
from torch import distributed
from examples import pretrain_sft

def fail(*arguments):
    distributed.init_process_group("gloo")
    distributed.barrier()
    if distributed.get_rank():
        raise OSError("the disk is gone")
    distributed.barrier()

pretrain_sft.prepare = fail
sys.exit(pretrain_sft.main(sys.argv[1:]))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    names = (
        "SLURM_JOB_ID SLURM_RESTART_COUNT TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT MASTER_ADDR MASTER_PORT RANK"
    )
    for name in names.split():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(run_status, "PATIENCE", 0.3)
    monkeypatch.setattr(run_status, "_loaded", time.time() - 2)  # status.json counts whole seconds
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    return folder


def another_start(monkeypatch, port: int) -> None:
    monkeypatch.setenv("MASTER_PORT", str(port))


def test_a_refusal_keeps_what_the_run_has_come_to(run, monkeypatch, capsys):
    write_status(run, RUNNING, step=0, total_steps=9)
    write_status(run, DONE, step=9)
    assert (read_status(run)["state"], read_status(run)["total_steps"]) == (DONE, 9)
    for port in (1, 2):
        another_start(monkeypatch, port)
        tell(run, 0, f"--tp {port} is wrong", state=REFUSED)
        status = read_status(run)
        assert (status["state"], status["reason"], status["step"]) == (REFUSED, f"--tp {port} is wrong", None)
        assert (status["run"]["state"], status["run"]["step"]) == (DONE, 9) and "run" not in status["run"]
    assert capsys.readouterr().err.splitlines() == [
        "error: --tp 1 is wrong", f"what each rank said lies in {run.errors}",
        "error: --tp 2 is wrong", f"what each rank said lies in {run.errors}",
    ]  # fmt: skip
    another_start(monkeypatch, 3)
    write_status(run, RUNNING, step=0, total_steps=12)
    assert "run" not in read_status(run)
    write_status(run, FAILED, reason="a full disk", rank=3)
    status = read_status(run)
    assert [status[name] for name in ("step", "total_steps", "rank")] == [0, 12, 3] and "run" not in status
    assert status["time"][:2] == "20" and status["time"][10] == "T"


def test_one_rank_speaks_for_all(run, capsys):
    tell(run, 0, "no such data", state=REFUSED)
    capsys.readouterr()
    tell(run, 1, "no such data", state=REFUSED)  # has heard the first
    assert capsys.readouterr().err == ""
    assert [path.name for path in sorted(run.errors.iterdir())] == ["rank_0.txt", "rank_1.txt"]
    assert (run.errors / "rank_1.txt").read_text().splitlines()[1] == "no such data"
    run.status.unlink()
    (run.errors / "rank_0.txt").unlink()
    tell(run, 1, "only this node lacks it", state=REFUSED)  # the first is fine, and waits for the others
    tell(run, 2, "only this node lacks it", state=REFUSED)
    assert capsys.readouterr().err.splitlines()[0] == "error: rank 1: only this node lacks it"
    assert read_status(run)["rank"] == 1


def test_what_a_rank_said_stands(run, monkeypatch, capsys):
    """What fails after it fails because it is gone; at another start it is a reason of its own."""
    write_status(run, RUNNING, step=4)
    for number, error in enumerate(("KeyError: 7", "RuntimeError: reset by peer")):
        rank, details = 3 - 3 * number, f"Traceback\n{error}\n"
        tell(run, rank, error, state=FAILED, alone=True, details=details)
        assert (run.errors / f"rank_{rank}.txt").read_text().endswith(details)
    first = f"Traceback\nKeyError: 7\nwhat each rank said lies in {run.errors}\n"
    assert capsys.readouterr().err == first
    assert [read_status(run)[name] for name in ("reason", "rank", "step")] == ["KeyError: 7", 3, 4]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    tell(run, 0, "a full disk", state=FAILED, alone=True)
    assert read_status(run)["reason"] == "a full disk" and "error: a full disk" in capsys.readouterr().err


def test_jobs_of_one_name_are_told_apart(run, monkeypatch, capsys):
    """torchrun calls every job of its static rendezvous `none`, and gives it the same port."""
    for name, value in (("TORCHELASTIC_RUN_ID", "none"), ("MASTER_ADDR", "node1"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    write_status(run, RUNNING, step=0, total_steps=9)
    for state, step in ((RUNNING, 5), (DONE, 9)):
        write_status(run, state, step=step)
        monkeypatch.setattr(run_status, "_parent", 1000 + step)  # another torchrun
        tell(run, 1, "--tp 3 is wrong", state=REFUSED, alone=True)
        status = read_status(run)
        assert status["step"] is None and (status["run"]["state"], status["run"]["step"]) == (state, step)
        tell(run, 0, "the same", state=REFUSED)
        assert read_status(run)["rank"] == 1
        monkeypatch.setattr(run_status, "_parent", 2000 + step)
        capsys.readouterr()
        tell(run, 0, "--tp 5 is wrong", state=REFUSED)  # nobody has spoken at this start
        assert capsys.readouterr().err.startswith("error: --tp 5 is wrong") and read_status(run)["run"] == status["run"]
    monkeypatch.setattr(run_status, "_parent", 1)
    write_status(run, RUNNING, step=0, total_steps=9)
    monkeypatch.setattr(run_status.socket, "gethostname", lambda: "node2")  # where torchrun has another number
    monkeypatch.setattr(run_status, "_parent", 2)
    write_status(run, FAILED)
    assert read_status(run)["step"] == 0
    monkeypatch.setattr(run_status.socket, "gethostname", lambda: "node1")
    monkeypatch.setattr(run_status, "_loaded", time.time() + 60)  # began long after that was written
    write_status(run, FAILED)
    assert read_status(run)["step"] is None


def test_nothing_is_written_into_what_is_no_run_or_anothers(run, tmp_path, capsys):
    model = RunFolder(tmp_path / "model")
    model.path.mkdir()
    (model.path / "config.json").write_text("{}")
    tell(model, 0, "a mistake", state=REFUSED)
    assert [path.name for path in model.path.iterdir()] == ["config.json"]
    owner = {"host": "node7", "pid": 4, "machine": "node7", "start": "other"}
    run.lock.write_text(json.dumps(owner))
    tell(run, 0, "a mistake", state=REFUSED)
    assert [path.name for path in run.path.iterdir()] == ["lock.json"]
    assert capsys.readouterr().err == "error: a mistake\n" * 2
    tell(RunFolder("/proc/no/such/place"), 0, "a mistake", state=REFUSED)
    tell(None, 0, "a mistake", state=REFUSED)
    assert capsys.readouterr().err == "error: a mistake\n" * 2


def test_a_flag_takes_effect_once_a_job(run, monkeypatch):
    flag = "--checkpoint.resume-from 2"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert not took_effect(run, flag)
    write_status(run, RUNNING, step=2, began_with=flag)
    write_status(run, RUNNING, step=4)
    assert not took_effect(run, flag)  # the same job, but no restart of it
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert took_effect(run, flag) and not took_effect(run, "--checkpoint.resume-from 3")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert not took_effect(run, flag)


def test_a_flag_that_did_its_work_is_not_forgotten_at_any_start_of_the_job(run, monkeypatch):
    flag = "--checkpoint.no-resume"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    another_start(monkeypatch, 1)
    write_status(run, RUNNING, step=0, began_with=flag)
    for port, state in enumerate((STOPPED, REFUSED, FAILED, STOPPED, DONE, REFUSED, RUNNING), start=2):
        another_start(monkeypatch, port)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(port))
        write_status(run, state)
        assert took_effect(run, flag), state
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    write_status(run, RUNNING, step=4)
    assert read_status(run)["began_with"] is None


def test_a_start_that_changes_nothing_keeps_how_the_run_stands(run, monkeypatch):
    write_status(run, DONE, step=9)
    another_start(monkeypatch, 1)
    write_status(run, STOPPED, step=0, aside=True)
    write_status(run, STOPPED, step=0, aside=True)
    assert read_status(run)["state"] == STOPPED and read_status(run)["run"]["step"] == 9
    write_status(run, RUNNING, step=0)
    assert "run" not in read_status(run)
    write_status(run, DONE, step=9)
    write_status(run, FAILED)  # at its very end
    write_status(run, FAILED)
    assert read_status(run)["step"] is None and read_status(run)["run"]["state"] == DONE


def test_a_mistake_on_the_command_line_is_written_down(run, capsys):
    assert pretrain_sft.main(["--seq-len", "0", "--output", str(run.path)]) == 2
    assert "--seq-len 0 must be above 0" in read_status(run)["reason"] and read_status(run)["state"] == REFUSED
    assert pretrain_sft.main(["--seq-lenn", "8", f"--output={run.path}"]) == 2
    assert read_status(run)["reason"] == "a flag is mistyped"
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"what each rank said lies in {run.errors}"
    recipe = run.path.parent / "recipe.yaml"
    recipe.write_text(f"output: {run.path}\nseq_lenn: 8\n")
    assert pretrain_sft.main([str(recipe)]) == 2
    assert "unknown recipe key seq_lenn" in read_status(run)["reason"]


@pytest.mark.parametrize("error", [KeyError("bias"), ImportError("no torch"), KeyboardInterrupt()])
def test_what_is_nobodys_mistake_is_written_down_too(run, monkeypatch, capsys, error):
    """Before a run is prepared; an interrupt goes on, so that a shell knows."""

    def fail(*arguments, **options):
        raise error

    left = []
    monkeypatch.setattr(signals, "hear_early", lambda: None)
    monkeypatch.setattr(pretrain_sft, "leave_at_once", left.append)
    monkeypatch.setattr(pretrain_sft, "with_input", fail)
    flags = ["--output", str(run.path)]
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            pretrain_sft.main(flags)
    else:
        pretrain_sft.main(flags)
        assert left == [1] and "in fail" in (run.errors / "rank_0.txt").read_text()
    words = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
    assert (read_status(run)["state"], read_status(run)["reason"]) == (FAILED, words)
    assert words in capsys.readouterr().err


def test_a_full_disk_is_said_with_the_folder_where_nothing_else_names_it(run, monkeypatch, capsys):
    def fail(prepared):
        raise OSError(errno.ENOSPC, "No space left on device")

    left = []
    monkeypatch.setattr(pretrain_sft, "leave_at_once", left.append)
    monkeypatch.setattr("engine.train.train", fail)
    pretrain_sft.run(SimpleNamespace(run=run), 0)
    assert left == [2]
    assert f"error: [Errno {errno.ENOSPC}] No space left on device: {run.path}" in capsys.readouterr().err


def start(script: Path, text: str, *flags: str) -> str:
    """What two ranks of a script print to standard error."""
    script.write_text(text)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *flags], env=environment, capture_output=True, text=True, timeout=120).stderr


def test_a_first_rank_that_starts_late_is_still_heard(run, tmp_path):
    said = start(tmp_path / "late.py", LATE, "--seq-len", "0", "--output", str(run.path))
    assert said.count("error: --seq-len 0 must be above 0") == 1
    assert sorted(path.name for path in run.errors.iterdir()) == ["rank_0.txt", "rank_1.txt"]
    assert read_status(run)["state"] == REFUSED


def test_without_a_place_for_it_a_mistake_is_said_once_too(tmp_path):
    """torchrun ends the other rank, before or while it waits for the first."""
    for name, text in (("early.py", EARLY), ("both.py", EARLY.replace("sleep(1)", "sleep(0)"))):
        assert start(tmp_path / name, text, "--seq-len", "0").count("--seq-len 0 must be above 0") == 1


def test_a_rank_that_fails_alone_is_the_one_that_is_named(run, tmp_path):
    said = start(tmp_path / "alone.py", ALONE, "--output", str(run.path))
    status, after = read_status(run), (run.errors / "rank_0.txt").read_text()
    assert (status["state"], status["reason"], status["rank"]) == (FAILED, "OSError: the disk is gone", 1)
    assert said.count("OSError: the disk is gone") == 1
    last = after.splitlines()[-1]
    assert "Error" in last and last not in said
