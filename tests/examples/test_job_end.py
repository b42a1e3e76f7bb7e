"""How a training job ends, for everything that can have happened; on a cluster, see tests/slurm."""

from __future__ import annotations

import json
from datetime import datetime, timedelta

import pytest

from engine import run_lock
from engine.run_folder import RunFolder
from engine.run_status import write_status
from engine.signals import LIMIT_NEAR
from examples.cluster import job_end, job_record, slurm
from examples.cluster.endings import Start, decide

DONE = {"state": "done", "step": 9, "total_steps": 9}
LIMIT = {"state": "stopped", "step": 4, "total_steps": 9, "reason": LIMIT_NEAR}
TOLD = LIMIT | {"reason": "SIGTERM was received"}
BAD_LOSS = {"state": "failed", "reason": "step 5: the loss is not finite", "lasting": True}
MISTAKE = {"state": "refused", "reason": "--tp 3 does not fit", "lasting": True}
CRASH = {"state": "failed", "reason": "RuntimeError: Connection closed by peer", "lasting": False}
KILLED = {"state": "running", "step": 4}

# status.json, srun's status, what is true of the start -> exit status, requeued, cancelled, a part of the sentence
CASES = [
    (DONE, 0, {}, (0, False, "chain"), "the run is done, step 9 of 9"),
    (DONE, 137, {"preempted": True}, (0, False, "chain"), "done"),  # preempted in its last moment
    (MISTAKE, 1, {}, (3, False, "all"), "has refused and would do so again: --tp 3 does not fit"),
    (BAD_LOSS, 1, {"progress": True}, (3, False, "all"), "the loss is not finite"),
    (LIMIT, 0, {"progress": True}, (0, False, ""), "saved at step 4 of 9 before the job's time limit; the next job"),
    (LIMIT, 0, {"progress": True, "until_done": True, "failures": 9}, (0, True, ""), "goes back to the queue"),
    (LIMIT, 0, {"until_done": True}, (4, False, ""), "made no step in all of its time"),
    (TOLD, 0, {"progress": True}, (0, False, ""), "told to stop at step 4 of 9: SIGTERM was received"),
    (TOLD, 0, {"progress": True, "preempted": True, "fruitless": 9}, (4, True, ""), "was preempted, so it goes back"),
    (TOLD, 0, {"preempted": True, "fruitless": 2}, (4, True, ""), "was preempted, so it goes back"),
    (TOLD, 0, {"preempted": True, "fruitless": 3}, (4, False, ""), "preempted without a new checkpoint, as 3 times"),
    ({}, 0, {}, (0, False, ""), "told to stop before it began"),  # a signal before the ranks were there
    ({}, 0, {"preempted": True}, (4, True, ""), "was preempted"),
    (KILLED, 137, {"preempted": True, "progress": True}, (4, True, ""), "was preempted"),
    (KILLED, 137, {"progress": True}, (4, True, ""), "srun ended with status 137; it made progress"),
    (KILLED, 137, {"progress": True, "failures": 3}, (4, False, ""), "has failed 3 times before, so it ends here"),
    (KILLED, 137, {"progress": True, "failures": 2}, (4, True, ""), "goes back to the queue"),
    (KILLED, 137, {}, (4, False, ""), "wrote no new checkpoint, so the job ends here"),
    (CRASH, 1, {"progress": True}, (4, True, ""), "RuntimeError: Connection closed by peer; it made progress"),
    (CRASH, 1, {}, (4, False, ""), "no new checkpoint"),
    ({}, 1, {}, (4, False, ""), "srun ended with status 1; it wrote no new checkpoint"),
    ({}, 1, {"lacking": ("n3", "n7"), "nodes": 64}, (4, False, ""), "the setup or the check of n3,n7 has failed"),
    ({}, 1, {"lacking": ("n3", "n7"), "nodes": 2}, (3, False, "all"), "has failed, see above, and would fail again"),
    ({}, 1, {"lacking": ("n3",), "nodes": 1, "lacked_before": 1}, (4, False, ""), "the check of n3 has failed"),
    ({}, 1, {"lacking": ("n3",), "nodes": 1, "lacked_before": 2}, (3, False, "all"), "and would fail again"),
]


@pytest.mark.parametrize(("status", "srun", "true", "expected", "words"), CASES)
def test_how_a_job_ends(status, srun, true, expected, words):
    end = decide(status, Start(**{"preempted": False, "progress": False} | true), srun)
    assert (end.exit_status, end.requeue, end.cancel) == expected and words in end.sentence


@pytest.fixture
def called(monkeypatch):
    """What would be asked of SLURM; `shown` is what it says of the job."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    others = ("SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "TORCHELASTIC_RUN_ID")
    for name in (*others, "LATHE_RETRIES", "LATHE_UNTIL_DONE"):
        monkeypatch.delenv(name, raising=False)
    said = "JobId=7 Restarts=0 BatchFlag=1 JobState=RUNNING SubmitTime=2026-01-01T00:00:00 PreemptTime=None"
    commands = [said]

    def call(*words: str) -> str:
        commands.append(words)
        return commands[0]

    monkeypatch.setattr(slurm, "call", call)
    monkeypatch.setattr(job_end, "PATIENCE", 0)
    return commands


def asked(called) -> list[str]:
    return [" ".join(words) for words in called[1:] if words[1] not in ("show", "--version")]


def begun(tmp_path, flags=("--steps", "9")) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    assert job_end.begin(run, flags) == 0
    run.checkpoints.mkdir(exist_ok=True)
    return run


def checkpoint(run: RunFolder, step: int) -> None:
    run.latest.write_text(f"{run.checkpoint(step).name}\n")


def test_a_killed_run_goes_back_while_it_makes_progress(tmp_path, called, capsys):
    run = begun(tmp_path)
    write_status(run, "running", step=4)
    assert job_end.end(run, 137) == 4 and asked(called) == []
    checkpoint(run, 4)
    assert job_end.end(run, 137) == 4 and asked(called) == ["scontrol requeue 7"]
    assert "goes back to the queue" in capsys.readouterr().out


def test_only_failures_count_as_failures(tmp_path, called, monkeypatch):
    """A job goes through time limits and preemptions as often as they come, and is killed three times."""
    run, kills = begun(tmp_path), 0
    for restart in range(12):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        called[0] = f"JobId=7 Restarts={restart} BatchFlag=1 JobState=RUNNING PreemptTime=None"
        assert job_end.begin(run, ()) == 0
        checkpoint(run, restart)
        if restart % 3:
            write_status(run, "stopped", step=restart, reason=LIMIT_NEAR)
            monkeypatch.setenv("LATHE_UNTIL_DONE", "1")
            assert job_end.end(run, 0) == 0
        else:
            write_status(run, "running", step=restart)
            kills += 1
            assert job_end.end(run, 137) == 4
            assert len(asked(called)) == restart + (kills < 4), "the fourth time it ends"


def test_only_preemptions_without_a_checkpoint_in_a_row_end_a_job(tmp_path, called, monkeypatch):
    run = begun(tmp_path)
    for restart in range(8):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        called[0] = f"JobId=7 Restarts={restart} BatchFlag=1 JobState=RUNNING PreemptTime=2026-01-01T00:00:00"
        assert job_end.begin(run, ()) == 0
        if restart == 2:
            checkpoint(run, 4)
        assert job_end.end(run, 0) == 4
        assert len(asked(called)) == min(restart + 1, 6), "three times more after it made a checkpoint"


def test_a_task_of_an_array_is_called_by_a_name_of_its_own(tmp_path, called, monkeypatch):
    """Its number alone may mean all tasks."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    run = begun(tmp_path)
    checkpoint(run, 4)
    assert job_end.end(run, 137) == 4
    assert ("scontrol", "show", "job", "-o", "5_2") in called and asked(called) == ["scontrol requeue 5_2"]


def test_a_node_that_lacks_something_is_left_out_by_the_jobs_behind(tmp_path, called, capsys):
    run = begun(tmp_path)
    (run.logs / "7.0" / "n3.lacking").touch()
    assert job_end.end(run, 1) == 4 and asked(called) == []
    assert "the setup or the check of n3 has failed, see above; to leave it out: --sbatch=--exclude=n3" in (
        capsys.readouterr().out
    )
    chain(run)
    called[0] += " ExcNodeList=n[1-2]"
    assert job_end.end(run, 1) == 4
    assert asked(called) == [f"scontrol update JobId={job} ExcNodeList=n[1-2],n3" for job in (8, 9)]


def test_a_setup_that_fails_everywhere_is_a_mistake(tmp_path, called, monkeypatch, capsys):
    """A chain of jobs on one node each does not try it on every node there is."""
    for job in ("7", "8", "9"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        run = begun(tmp_path)
        if job == "7":
            chain(run)
        (run.logs / f"{job}.0" / f"n{job}.lacking").touch()
        assert job_end.end(run, 1) == (3 if job == "9" else 4)
    assert "would fail again" in capsys.readouterr().out and asked(called)[-1].startswith("scancel")


def test_a_preempted_stage_goes_back_and_others_end_as_they_are(called, capsys):
    assert job_end.stage(0) == 0 and called[1:] == []
    assert job_end.stage(2) == 2 and asked(called) == []
    called[0] = called[0].replace("PreemptTime=None", "PreemptTime=2026-01-01T00:00:00")
    assert job_end.stage(143) == 143 and asked(called) == ["scontrol requeue 7"]
    assert "was preempted, so it goes back" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("release", "mode", "by_itself"),
    [
        ("22.05.8", "REQUEUE", False),
        ("24.05.0", "REQUEUE", True),
        ("25.11.1", "REQUEUE", True),
        ("25.11.1", "CANCEL", False),
    ],
)
def test_newer_releases_put_a_preempted_job_back_themselves(called, capsys, monkeypatch, release, mode, by_itself):
    shown = called[0].replace("PreemptTime=None", f"PreemptTime=2026-01-01T00:00:00 Partition=p PreemptMode={mode}")
    asked = []

    def call(*words: str) -> str:
        asked.append(words)
        return f"slurm-wlm {release}\n" if words == ("scontrol", "--version") else shown

    monkeypatch.setattr(slurm, "call", call)
    assert job_end.stage(143) == 143 and (("scontrol", "requeue", "7") in asked) != by_itself
    assert ("SLURM puts it there itself" in capsys.readouterr().out) == by_itself


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        ("Restarts=1", "SLURM has put it there itself"),
        ("BatchFlag=0", "it is an interactive one"),
        ("JobState=CANCELLED", "it is cancelled"),
    ],
)
def test_when_a_job_does_not_go_back(tmp_path, called, capsys, shown, words):
    run = begun(tmp_path)
    checkpoint(run, 4)
    called[0] = called[0] + f" {shown}"
    assert job_end.end(run, 137) == 4 and asked(called) == [] and words in capsys.readouterr().out


def chain(run: RunFolder) -> None:
    after = {"7": (), "8": ("7",), "9": ("8",), "10": ("7", "8", "9"), "11": ("10",), "12": ("3",)}
    for id, before in after.items():
        stage = "train" if int(id) < 10 else "average"
        job_record.append(run, ["lathe"], job_record.Job(id=id, stage=stage, after=before))


def test_what_leaves_the_queue_with_a_run(tmp_path, called):
    run = begun(tmp_path)
    chain(run)
    write_status(run, "done", step=9, total_steps=9)
    assert job_end.end(run, 0) == 0
    write_status(run, "failed", reason="a bad loss", lasting=True)
    assert job_end.end(run, 1) == 3
    assert asked(called) == [
        "scancel --quiet --state=PENDING 8 9",
        "scancel --quiet --state=PENDING 8 9 10 11",
    ]


def test_a_status_of_an_earlier_start_says_nothing_of_this_one(tmp_path, called, monkeypatch):
    run = begun(tmp_path)
    write_status(run, "done", step=9, total_steps=9)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert job_end.end(run, 1) == 4


def test_a_run_that_another_job_owns(tmp_path, called, capsys):
    run = begun(tmp_path)
    chain(run)
    run.lock.write_text(json.dumps({"host": "node9", "pid": 3, "job": None, "since": "noon", "token": "x"}))
    assert job_end.end(run, 1) == 3 and asked(called) == []
    assert "is in use by process 3 on node9, since noon" in capsys.readouterr().out


def test_a_job_that_is_put_back_after_it_has_ended_ends_at_once(tmp_path, called, monkeypatch, capsys):
    run = begun(tmp_path, ["--steps", "9"])
    checkpoint(run, 9)
    write_status(run, "done", step=9, total_steps=9)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    called[0] = called[0].replace("2026-01-01", "2126-01-01")  # the time of its return to the queue
    assert job_end.begin(run, ["--steps", "9"]) == 10 and "done by job 7 at step 9" in capsys.readouterr().err


def test_what_later_links_of_a_chain_find(tmp_path, called, monkeypatch, capsys):
    run = begun(tmp_path)
    checkpoint(run, 9)
    write_status(run, "done", step=9, total_steps=9)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    later = (datetime.now() + timedelta(hours=1)).isoformat(timespec="seconds")
    assert job_end.begin(run, ["--steps", "9"]) == 10 and "done by job 7 at step 9" in capsys.readouterr().err
    assert job_end.begin(run, ["--steps", "12"]) == 0, "other flags may ask for more"
    called[0] = called[0].replace("2026-01-01T00:00:00", later)
    assert job_end.begin(run, ["--steps", "9"]) == 0, "submitted since then: the run itself looks"
    checkpoint(run, 6)
    called[0] = called[0].replace(later, "2026-01-01T00:00:00")
    assert job_end.begin(run, ["--steps", "9"]) == 0, "somebody has gone back"
    write_status(run, "failed", reason="a bad loss", lasting=True)
    assert job_end.begin(run, ["--steps", "9"]) == 3 and "a bad loss" in capsys.readouterr().err
    write_status(run, "failed", reason="a dead node")
    assert job_end.begin(run, ["--steps", "9"]) == 0


def test_a_stage_begins_once_the_run_is_done(tmp_path, called, capsys):
    run = RunFolder(tmp_path / "run")
    assert job_end.check(run) == 3 and "was never begun" in capsys.readouterr().err
    begun(tmp_path)
    write_status(run, "stopped", step=4)
    run.unfinished.write_text("saved and stopped after step 4 of 9: SIGTERM was received\n")
    assert job_end.check(run) == 3 and "saved and stopped after step 4 of 9" in capsys.readouterr().err
    write_status(run, "done", step=9)
    assert job_end.check(run) == 0
    write_status(run, "refused", reason="--tp 3 does not fit")
    assert job_end.check(run) == 0, "a later start that was refused has changed nothing"


def test_an_old_end_does_not_begin_a_stage_behind_new_training(tmp_path, called, capsys, monkeypatch):
    run = begun(tmp_path)
    write_status(run, "done", step=9)
    earlier, later = (datetime.now().astimezone() + timedelta(hours=hours) for hours in (-1, 1))
    for id, stage, after, at in (
        ("20", "train", (), later),
        ("21", "average", ("20",), later),
        ("22", "x", ("21",), later),
    ):
        job_record.append(run, ["lathe"], job_record.Job(id=id, stage=stage, after=after, submitted=at.isoformat()))
    assert job_end.check(run) == 0, "a stage by itself"
    for id in ("21", "22"):
        monkeypatch.setenv("SLURM_JOB_ID", id)
        assert job_end.check(run) == 3 and "has not come to its end" in capsys.readouterr().err
    job_record.append(run, ["lathe"], job_record.Job(id="30", stage="train", submitted=earlier.isoformat()))
    job_record.append(run, ["lathe"], job_record.Job(id="31", stage="average", after=("30",)))
    monkeypatch.setenv("SLURM_JOB_ID", "31")
    assert job_end.check(run) == 0


def test_a_dead_jobs_lock_is_freed_before_ranks_start(tmp_path, called, monkeypatch, capsys):
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.lock.write_text(json.dumps({"host": "node9", "pid": 3, "job": "3", "since": "noon", "token": "x"}))
    monkeypatch.setattr(run_lock, "_slurm_knows", lambda job: True)
    assert job_end.begin(run, ()) == 0 and run.lock.exists()
    monkeypatch.setattr(run_lock, "_slurm_knows", lambda job: False)
    assert job_end.begin(run, ()) == 0 and not run.lock.exists()
    assert "process 3 on node9, SLURM job 3, since noon: SLURM runs no job 3 any more" in capsys.readouterr().err


def test_where_a_run_is(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output: {tmp_path / 'mine'}\n")
    assert job_end.where([str(recipe)]) == tmp_path / "mine"
    assert job_end.where([str(recipe), "--output", "/other"]).as_posix() == "/other"
    assert job_end.where([]).as_posix().endswith("runs/default")


def test_no_logs_are_written_into_a_model(tmp_path, called, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert job_end.begin(RunFolder(tmp_path), []) == 3 and not (tmp_path / "logs").exists()
    assert "give a directory of the run's own" in capsys.readouterr().err
