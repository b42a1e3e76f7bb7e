"""How a run ended is written down, by whichever rank knows, and never over what another job or run has to say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine import run_status
from engine.run_folder import RunFolder
from engine.run_status import DONE, FAILED, REFUSED, RUNNING, read_status, tell, took_effect, write_status
from examples import pretrain_sft

ROOT = Path(__file__).parents[2]
LATE = """
import os, sys, time
if os.environ["RANK"] == "0":
    time.sleep(3)
from examples import pretrain_sft
sys.exit(pretrain_sft.main(sys.argv[1:]))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    names = "SLURM_JOB_ID SLURM_RESTART_COUNT TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT MASTER_ADDR MASTER_PORT"
    for name in names.split():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(run_status, "PATIENCE", 0.3)
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
    tell(run, 3, "KeyError: 7", state=FAILED, alone=True, details="Traceback\nKeyError: 7\n")
    assert capsys.readouterr().err.startswith("Traceback\nKeyError: 7\nwhat each rank said")
    assert read_status(run)["reason"] == "KeyError: 7"


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


def test_a_first_rank_that_starts_late_is_still_heard(run, tmp_path):
    script = tmp_path / "late.py"
    script.write_text(LATE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    flags = ["--seq-len", "0", "--output", str(run.path)]
    done = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stderr.count("error: --seq-len 0 must be above 0") == 1
    assert sorted(path.name for path in run.errors.iterdir()) == ["rank_0.txt", "rank_1.txt"]
    assert read_status(run)["state"] == REFUSED
