"""How long before its job's end a run saves and stops: what saves take decides, once that is known."""

from __future__ import annotations

import math
import time

import pytest

from engine.run_folder import RunFolder
from engine.run_status import FAILED, RUNNING, STOPPED, save_seconds, write_status
from engine.signals import StopRequest
from engine.time_limit import NO_LIMIT, TimeLimit, time_limit


def test_when_a_job_has_to_stop(monkeypatch):
    for name in ("SLURM_JOB_START_TIME", "SLURM_JOB_END_TIME"):
        monkeypatch.delenv(name, raising=False)
    assert time_limit(None) == time_limit(0) == NO_LIMIT and NO_LIMIT.stop_at(100, 5) == math.inf
    for value in (None, "", "Unknown"):
        if value is not None:
            monkeypatch.setenv("SLURM_JOB_END_TIME", value)
        assert time_limit(None) == NO_LIMIT
        with pytest.raises(ValueError, match="minutes-before-end 5 needs the time limit of a SLURM job"):
            time_limit(5)
    monkeypatch.setenv("SLURM_JOB_END_TIME", "100000")
    monkeypatch.setenv("SLURM_JOB_START_TIME", "94000")
    assert time_limit(None).stop_at() == 100_000 - 600
    assert time_limit(5).stop_at() == time_limit(5).stop_at(1000, 30) == 100_000 - 300
    assert time_limit(0).stop_at() == math.inf
    monkeypatch.setenv("SLURM_JOB_START_TIME", "99400")  # ten minutes
    assert time_limit(None).stop_at() == 100_000 - 60
    with pytest.raises(ValueError, match="end 10 is not shorter than the job itself, which has 10 minutes"):
        time_limit(10)


@pytest.mark.parametrize(
    ("save", "step", "notice"),
    [
        (10, 5, 90),  # twice 15, and a minute
        (96, 5, 262),
        (1440, 60, 3060),  # more than ten minutes: the work would be lost
        (7200, 60, 7200),  # half of the job, which else would make no step
    ],
)
def test_four_hours_stop_as_saves_take(save, step, notice):
    assert TimeLimit(end=20_000, length=14_400).stop_at(save, step) == 20_000 - notice


def test_steps_that_take_long_are_waited_for_before_any_save():
    assert TimeLimit(end=20_000, length=1_200).stop_at(None, 100) == 20_000 - 200
    assert TimeLimit(end=20_000, length=14_400).stop_at(None, 100) == 20_000 - 600
    stop = StopRequest(TimeLimit(end=time.time() + 700, length=14_400))
    assert not stop.number()
    stop.learn(None, 400)
    assert stop.number()


def test_a_short_job_keeps_most_of_its_time():
    assert TimeLimit(end=1_000, length=60).stop_at(1, 1) == 1_000 - 2 * 2 - 6


def test_a_run_learns_what_its_saves_take():
    in_five_minutes = TimeLimit(end=time.time() + 300, length=14_400)
    assert StopRequest(in_five_minutes).number(), "ten minutes before the end, as no save's time is known"
    assert not StopRequest(in_five_minutes, save=20).number()
    stop = StopRequest(in_five_minutes, save=20)
    stop.learn(None, 10)  # no save of this job yet: that of an earlier one holds
    assert not stop.number()
    stop.learn(None, 150)  # twice 170, and a minute
    assert stop.number()
    stop.learn(100, 30)
    assert stop.number()
    stop.learn(20, 5)
    assert not stop.number()
    assert not StopRequest(TimeLimit(in_five_minutes.end, 14_400, notice=60), save=1000).number()


def test_later_jobs_know_what_saves_took(tmp_path):
    run = RunFolder(tmp_path)
    assert save_seconds(run) is None
    write_status(run, RUNNING, step=0)
    assert save_seconds(run) is None
    write_status(run, STOPPED, step=5, save=12.5)
    write_status(run, RUNNING, step=5)
    write_status(run, FAILED, reason="a rank was killed")
    assert save_seconds(run) == 12.5
    write_status(run, RUNNING, step=9, save=8.0)
    assert save_seconds(run) == 8.0
