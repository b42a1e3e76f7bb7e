"""`lathe jobs RUN`: how jobs stand, and why one ended, on stand-ins of SLURM's commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.run_folder import RunFolder
from examples import jobs
from examples.cluster import job_record, slurm
from examples.cluster.job_record import Job
from tests.support.slurm_commands import SlurmCommands


@pytest.fixture
def commands(tmp_path, monkeypatch):
    found = SlurmCommands(tmp_path / "commands")
    found.put_on_path(monkeypatch)
    return found


@pytest.fixture
def run(tmp_path):
    """A run with a chain of three jobs and an average behind them."""
    found = RunFolder(tmp_path / "run")
    found.slurm.mkdir(parents=True)
    for number in (1, 2, 3):
        log = str(found.slurm / f"train-{number}.out")
        after = (str(number - 1),) if number > 1 else ()
        job_record.append(
            found, ["lathe"], Job(id=str(number), stage="train", number=number, of=3, after=after, log=log)
        )
    job_record.append(found, ["lathe"], Job(id="4", stage="average", after=("1", "2", "3")))
    return found


def printed(run: RunFolder, capsys) -> list[str]:
    """What `lathe jobs RUN` says, a line each, with one blank between words."""
    assert jobs.main([str(run.path)]) == 0
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_a_chain_under_way(commands, run, capsys):
    commands.set_queue(
        [
            "1|N/A|FAILED|NonZeroExitCode|0:10|0:50|",
            "2|N/A|RUNNING|None|0:20|3:40|node[1-2]",
            "3|N/A|PENDING|Dependency|0:00|4:00|",
            "4|N/A|PENDING|Dependency|0:00|4:00|",
            "77|N/A|RUNNING|None|0:20|3:40|node3",
        ]
    )
    run.status.write_text(json.dumps({"state": "running", "step": 1200, "total_steps": 30000, "time": "now"}))
    (run.slurm / "train-1.out").write_text(
        "error: --data is gone\nx\nlathe: it failed\nlathe: 2 left\nsrun: error: x\n"
    )
    said, _, *rows = printed(run, capsys)
    assert said == f"{run.path}: running, step 1,200 of 30,000, at now"
    assert rows == [
        "1 train 1 of 3 failed 0:10 2 left; it failed",
        "2 train 2 of 3 running 0:20 on node[1-2], 3:40 left",
        "3 train 3 of 3 pending 0:00 waits for 2",
        "4 average pending 0:00 waits for 1, 2, 3",
    ]


def test_jobs_that_slurm_has_forgotten(commands, run, capsys):
    commands.write("accounts", "1|TIMEOUT|0:0|4:00:00\n2|CANCELLED by 1000|0:15|1:00\n")
    (run.slurm / "train-3.out").write_bytes(b"\xff\nslurmstepd: error: *** STEP CANCELLED ***\nbye\n")
    said, _, *rows = printed(run, capsys)
    assert said == f"{run.path}: no training has begun"
    assert rows[0] == "1 train 1 of 3 timeout 4:00:00"
    assert rows[1] == "2 train 2 of 3 cancelled 1:00 exit status 0:15"
    assert rows[2] == "3 train 3 of 3 ended slurmstepd: error: *** STEP CANCELLED ***"


LIMIT = "slurmstepd: error: *** JOB 1 ON n CANCELLED AT 2026-01-02T03:04:05 DUE TO TIME LIMIT ***"


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("TIMEOUT|TimeLimit", f"timeout 4:00 TimeLimit; {LIMIT}"),
        ("DEADLINE|None", f"deadline 4:00 {LIMIT}"),
        ("FAILED|NonZeroExitCode", f"failed 4:00 {LIMIT}"),  # nothing that Lathe said belongs to this start
    ],
)
def test_what_slurm_ended_says_so(state, said, commands, run, capsys):
    commands.set_queue([f"1|N/A|{state}|4:00|0:00|"])
    log = ["start: job 1, start 0", "lathe: it was preempted", "start: job 1, start 1", "start: NCCL_DEBUG=WARN", LIMIT]
    (run.slurm / "train-1.out").write_text("\n".join(log) + "\n")
    assert printed(run, capsys)[2] == f"1 train 1 of 3 {said}"


def test_slurm_knows_best_why_a_node_or_memory_was_lost(commands, run, capsys):
    oom = "slurmstepd: error: Detected 1 oom_kill event in StepId=2.0"
    (run.slurm / "train-1.out").write_text("start: job 1, start 0\nlathe: step 8 was saved\n")
    (run.slurm / "train-2.out").write_text(f"start: job 2, start 0\n{oom}\nlathe: the job ends here\n")
    commands.set_queue(["1|N/A|NODE_FAIL|NodeDown|0:10|0:50|", "2|N/A|OUT_OF_MEMORY|OutOfMemory|0:10|0:50|"])
    first, second = printed(run, capsys)[2:4]
    assert first == "1 train 1 of 3 node_fail 0:10 NodeDown; step 8 was saved"
    assert second == f"2 train 2 of 3 out_of_memory 0:10 OutOfMemory; {oom}"


@pytest.mark.parametrize(
    ("named", "tasks"),
    [
        ("9_3", ["3"]),
        ("9_[0-3]", ["0", "1", "2", "3"]),
        ("9_[0-3%2]", ["0", "1", "2", "3"]),
        ("9_[0,2-3]", ["0", "2", "3"]),
        ("9_[10-14:2]", ["10", "12", "14"]),
        ("9_[1,4,...]", ["1", "4"]),
        ("9_[...]", [""]),
        ("9", [""]),
    ],
)
def test_tasks_that_were_cancelled_in_the_queue_are_named_together(named, tasks, commands):
    commands.write("accounts", f"{named}|CANCELLED by 1000|0:0|00:00:00\n")
    found = slurm.states(["9"])
    assert [one.task for one in found] == tasks
    assert {(one.id, one.state) for one in found} == {("9", "CANCELLED")}


def test_tasks_of_an_array_have_a_row_and_a_log_each(commands, tmp_path, capsys):
    run = RunFolder(tmp_path / "sweep")
    run.slurm.mkdir(parents=True)
    log = str(run.slurm / "train-9_%a.out")
    job_record.append(run, ["lathe"], Job(id="9", stage="train", log=log))
    (run.slurm / "train-9_0.out").write_text("lathe: done\n")
    (run.slurm / "train-9_1.out").write_text("error: a loss was not finite\n")
    for rate in ("1e-05", "2e-05"):
        (run.path / f"lr_{rate}").mkdir()
    commands.set_queue(["9|0|COMPLETED|None|0:10|0:50|", "9|1|FAILED|NonZeroExitCode|0:10|0:50|"])
    *said, _, first, second = printed(run, capsys)
    assert said == [f"{run.path}/lr_{rate}: no training has begun" for rate in ("1e-05", "2e-05")]
    assert first == "9_0 train completed 0:10 done"
    assert second == "9_1 train failed 0:10 error: a loss was not finite"


def test_why_a_stage_never_started(commands, run, capsys):
    commands.set_queue(["1|N/A|CANCELLED|Dependency|0:00|4:00|", "4|N/A|CANCELLED|DependencyNeverSatisfied|0:00|4:00|"])
    rows = printed(run, capsys)[2:]
    assert rows[0] == "1 train 1 of 3 cancelled 0:00"
    assert rows[3] == "4 average cancelled 0:00 of 1, 2, 3, which had to succeed, one did not"


def test_cancel_lets_the_training_job_save(commands, run, capsys):
    commands.set_queue(
        [
            "1|N/A|COMPLETED|None|1|0|",
            "2|N/A|RUNNING|None|1|9|n1",
            "3|N/A|PENDING|Dependency|0|9|",
            "4|N/A|RUNNING|None|1|9|n2",
        ]
    )
    assert jobs.main([str(run.path), "--cancel"]) == 0
    assert commands.calls("scancel") == [["3", "4"], ["--signal=TERM", "2"]]
    assert "2 saves and stops" in capsys.readouterr().out
    commands.write("deaf")  # no step runs yet
    assert jobs.main([str(run.path), "--cancel"]) == 0
    assert commands.calls("scancel")[2:] == [["3", "4"], ["--signal=TERM", "2"], ["2"]]
    commands.set_queue([])
    assert jobs.main([str(run.path), "--cancel"]) == 0
    assert capsys.readouterr().out.endswith("nothing is queued\n")


def test_a_run_without_jobs(commands, tmp_path, capsys):
    assert jobs.main([str(tmp_path)]) == 2
    assert "no jobs were queued for it by lathe submit" in capsys.readouterr().err
    (tmp_path / "jobs.json").write_text("{}")
    assert jobs.main([str(tmp_path)]) == 2
    assert "jobs.json is damaged" in capsys.readouterr().err


def test_an_answer_of_slurm_that_names_no_job(commands, tmp_path):
    (commands.folder / "sbatch").write_text("#!/bin/sh\necho hello\n")
    with pytest.raises(ValueError, match="names no job: 'hello'"):
        slurm.submit(Path("x.sh"))
    (commands.folder / "squeue").write_text(
        "#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1\n"
    )
    assert slurm.states(["7"]) == []
    (commands.folder / "squeue").write_text("#!/bin/sh\necho 'cannot contact the controller' >&2; exit 1\n")
    with pytest.raises(ValueError, match="squeue failed: cannot contact the controller"):
        slurm.states(["7"])
