"""However a job on two nodes ends, its run goes on, and ends with an undisturbed run's weights, bit for bit."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from engine.run_folder import RunFolder
from engine.run_lock import now
from engine.run_status import read_status
from examples import submit
from examples.cluster import job_record
from examples.cluster.job_record import Job
from tests.slurm.cluster import ROOT, STEPS, TRAIN_JOB, flags, kill, kill_node, weights


@pytest.fixture
def run(tmp_path, cluster):
    yield RunFolder(tmp_path / "run")
    cluster.clear()


def record(run: RunFolder, job: str, stage: str, *after: str) -> str:
    """Notes a job in RUN/jobs.json, as submitting does."""
    run.path.mkdir(exist_ok=True)
    job_record.append(run, ["lathe", "submit"], Job(id=job, stage=stage, after=after, submitted=now()))
    return job


def goes_on(cluster, job: str, run: RunFolder, undisturbed) -> None:
    """The job ends well after its second start, with the undisturbed run's weights."""
    assert cluster.end_of(job) == ("COMPLETED", 0), cluster.log(job)
    assert cluster.show(job)["Restarts"] == "1"
    assert weights(run) == weights(undisturbed[0])


def test_a_whole_run(cluster, undisturbed):
    run, job = undisturbed
    assert len(weights(run)) == 1
    log = cluster.log(job)
    assert f"lathe: the run is done, step {STEPS} of {STEPS}" in log and "Traceback" not in log
    assert "2 nodes with 1 processes each, 1 threads a process" in log  # the user's own OMP_NUM_THREADS
    assert "saves and stops at" in log, "the time limit is known, also where SLURM does not tell the job"
    printed = {path.relative_to(run.logs).parts[:2] for path in run.logs.rglob("stdout.log")}
    assert printed == {(f"{job}.0", "node1"), (f"{job}.0", "node2")}


@pytest.mark.slow
def test_preempted_at_once(cluster, inputs, undisturbed, run):
    job = cluster.submit(*flags(inputs, run), flags=["--partition=low"])
    cluster.reach(run, 20)
    cluster.preempt()
    goes_on(cluster, job, run, undisturbed)
    assert re.search(rf"saved and stopped after step \d+ of {STEPS}: SIG\w+ was received", cluster.log(job))


@pytest.mark.slow
def test_preempted_with_grace(cluster, inputs, undisturbed, run):
    """SLURM 22.05 does not put such a job back: the job does."""
    job = cluster.submit(*flags(inputs, run), flags=["--partition=grace"])
    cluster.reach(run, 20)
    cluster.preempt()
    goes_on(cluster, job, run, undisturbed)
    assert "the job was preempted, so it goes back to the queue" in cluster.log(job)
    assert "Traceback" not in cluster.log(job)


@pytest.mark.slow
def test_a_killed_rank(cluster, inputs, undisturbed, run):
    job = cluster.submit(*flags(inputs, run))
    cluster.reach(run, 30, checkpoint=20)
    kill(cluster.processes(job, "node2", "RANK")[:1])
    goes_on(cluster, job, run, undisturbed)
    assert "it made progress, so the job goes back to the queue" in cluster.log(job)


@pytest.mark.slow
def test_a_rank_that_is_killed_before_a_checkpoint(cluster, inputs, run):
    """What fails before it has come anywhere would fail again."""
    job = cluster.submit(*flags(inputs, run, "--checkpoint.every", "1000"))
    cluster.reach(run, 10)
    kill(cluster.processes(job, "node1", "RANK")[:1])
    assert cluster.end_of(job) == ("FAILED", 4)
    assert "it wrote no new checkpoint, so the job ends here" in cluster.log(job)


@pytest.mark.slow
def test_a_dead_node(cluster, inputs, undisturbed, run):
    job = cluster.submit(*flags(inputs, run))
    cluster.reach(run, 30, checkpoint=20)
    kill_node(cluster, job)
    goes_on(cluster, job, run, undisturbed)


@pytest.mark.slow
def test_requeued_by_hand(cluster, inputs, undisturbed, run):
    job = cluster.submit(*flags(inputs, run))
    cluster.reach(run, 20)
    cluster.call("scontrol", "requeue", job)
    goes_on(cluster, job, run, undisturbed)


@pytest.mark.slow
def test_a_chain_over_time_limits(cluster, inputs, undisturbed, run):
    """Two jobs of a minute that stop at its start: each makes a step or more. The third one has time."""
    given = flags(inputs, run, "--checkpoint.minutes-before-end", "0.9")
    jobs = [cluster.submit(*given, flags=["--time=1"])]
    for time in ("1", "20"):
        jobs.append(cluster.submit(*given, flags=[f"--time={time}", f"--dependency=afterany:{jobs[-1]}"]))
    assert [cluster.end_of(job) for job in jobs] == [("COMPLETED", 0)] * 3
    assert all("before the job's time limit; the next job of the chain" in cluster.log(job) for job in jobs[:2])
    assert weights(run) == weights(undisturbed[0])


@pytest.mark.slow
def test_a_chain_that_is_done_in_its_first_job(cluster, inputs, run):
    """Jobs of the record leave the queue, others end at once, and the stage behind all begins."""
    given = flags(inputs, run)
    first = record(run, cluster.submit(*given), "train")
    behind = f"--dependency=afterany:{first}"
    second = record(run, cluster.submit(*given, flags=[behind]), "train", first)
    by_hand = cluster.submit(*given, flags=[behind])
    after = [f"--dependency=afterany:{first}:{second}", "--nodes=1"]
    script = ROOT / "examples" / "slurm" / "stage_job.sh"
    home = {"LATHE_RUN": str(run.path), "LATHE_HOME": str(ROOT)}
    stage = record(run, cluster.submit("--help", script=script, flags=after, **home), "average", first, second)
    assert cluster.end_of(first) == cluster.end_of(by_hand) == cluster.end_of(stage) == ("COMPLETED", 0)
    assert cluster.end_of(second)[0] == "CANCELLED"
    assert f"the run was done by job {first} at step {STEPS}" in cluster.log(by_hand)
    assert not (run.logs / f"{by_hand}.0").exists() and "usage: lathe COMMAND" in cluster.log(stage)
    assert "to step" not in cluster.log(by_hand)
    more = cluster.submit(*given, "--steps", str(STEPS + 1))  # which is no job of that chain
    assert cluster.end_of(more) == ("COMPLETED", 0) and read_status(run)["step"] == STEPS + 1


@pytest.mark.slow
def test_two_jobs_in_one_run(cluster, inputs, run):
    """One node each, with both ranks on it: the port is each job's own, and one of the two is refused."""
    given = flags(inputs, run, "--steps", "400")  # so that it is still at work when the other one has been refused
    jobs = [cluster.submit(*given, flags=["--nodes=1"], LATHE_RANKS="2") for _ in range(2)]
    ends = {job: cluster.end_of(job) for job in jobs}
    assert sorted(ends.values()) == [("COMPLETED", 0), ("FAILED", 3)]
    status, refused = read_status(run), next(job for job in jobs if ends[job][1])
    assert f"is in use by process {status['pid']} on" in cluster.log(refused)
    assert (status["state"], status["step"], status["job"]) == (
        "done",
        400,
        next(job for job in jobs if job != refused),
    )


@pytest.mark.slow
def test_a_mistake_stops_a_chain(cluster, inputs, run):
    given = flags(inputs, run, "--seq-len", "0")
    first = record(run, cluster.submit(*given), "train")
    behind = f"--dependency=afterany:{first}"
    jobs = [record(run, cluster.submit(*given, flags=[behind]), stage, first) for stage in ("train", "average")]
    assert cluster.end_of(first) == ("FAILED", 3)
    assert [cluster.end_of(job)[0] for job in jobs] == ["CANCELLED"] * 2
    log = cluster.log(first)
    assert log.count("error: --seq-len 0") == 1 and "the run has refused and would do so again: --seq-len 0" in log


@pytest.mark.slow
def test_a_node_that_lacks_something_is_left_out(cluster, inputs, run):
    given = flags(inputs, run, "--steps", "5")
    lacks = {"LATHE_SETUP": '[ "$SLURMD_NODENAME" != node1 ]', "LATHE_RANKS": "2"}
    first = record(run, cluster.submit(*given, flags=["--nodes=1"], **lacks), "train")
    behind = ["--nodes=1", f"--dependency=afterany:{first}"]
    second = record(run, cluster.submit(*given, flags=behind, **lacks), "train", first)
    assert cluster.end_of(first) == ("FAILED", 4) and cluster.end_of(second) == ("COMPLETED", 0)
    assert "the setup or the check of node1 has failed, see above; the training jobs behind" in cluster.log(first)
    assert cluster.show(second)["BatchHost"] == "node2" and read_status(run)["step"] == 5


@pytest.mark.slow
def test_a_killed_task_of_a_sweep_leaves_the_others_alone(cluster, inputs, undisturbed, run, monkeypatch):
    """SLURM calls one of the tasks by the number of all."""
    monkeypatch.chdir(inputs)
    for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    given = flags(inputs, run)
    small = ["--gpus-per-node", "0", "--ranks-per-node", "2", "--no-check-nodes", "--time", "10"]
    assert submit.main([*small, "--lrs", "1e-2,2e-2", "--", *given]) == 0
    number = job_record.read(run).jobs[0].id
    tasks = [f"{number}_{task}" for task in (0, 1)]
    runs = [RunFolder(run.path / name) for name in ("lr_0.01", "lr_0.02")]
    for one in runs:
        cluster.reach(one, 30, checkpoint=20)
    shown = [cluster.show(task) for task in tasks]
    last = next(index for index in (0, 1) if shown[index]["JobId"] == number)
    kill(cluster.processes(number, shown[last]["BatchHost"], "RANK")[:1])
    assert [cluster.end_of(task) for task in tasks] == [("COMPLETED", 0)] * 2
    assert [cluster.show(task)["Restarts"] for task in tasks] == [str(int(index == last)) for index in (0, 1)]
    assert weights(runs[0]) == weights(undisturbed[0]) and weights(runs[1]) != weights(undisturbed[0])


@pytest.mark.slow
def test_ranks_are_an_explicit_number(cluster, inputs, run):
    nothing = {"LATHE_RANKS": ""}
    job = cluster.submit(*flags(inputs, run), script=TRAIN_JOB, flags=["--export=ALL"], LATHE_HOME=str(ROOT), **nothing)
    assert cluster.end_of(job) == ("FAILED", 3)
    assert "error: LATHE_RANKS=: SLURM counts no GPUs for this job" in cluster.log(job) and not run.path.exists()


@pytest.mark.slow
def test_salloc(cluster, inputs, undisturbed, run):
    said = cluster.call("salloc", "--nodes=2", "--time=20", TRAIN_JOB, *flags(inputs, run))
    assert f"lathe: the run is done, step {STEPS} of {STEPS}" in said
    assert weights(run) == weights(undisturbed[0])


@pytest.mark.slow
def test_signals_that_ask_a_run_to_stop(cluster, inputs, undisturbed, run):
    """To the nodes, to the script alone, and to both."""
    reached = 0
    for number, who in ((1, ["--signal=USR1"]), (2, ["--batch", "--signal=USR1"]), (3, ["--full", "--signal=USR2"])):
        job = cluster.submit(*flags(inputs, run))
        cluster.reach(run, reached + 20)
        cluster.call("scancel", *who, job)
        assert cluster.end_of(job) == ("COMPLETED", 0), cluster.log(job)
        status = read_status(run)
        reached = status["step"]
        assert status["state"] == "stopped" and max(run.checkpoint_steps()) == reached < STEPS, number
        log = cluster.log(job)
        assert f"the run was told to stop at step {reached} of {STEPS}: SIGUSR" in log and "Traceback" not in log
    assert cluster.end_of(cluster.submit(*flags(inputs, run))) == ("COMPLETED", 0)
    assert weights(run) == weights(undisturbed[0])


@pytest.mark.slow
def test_a_first_node_that_starts_late(cluster, inputs, undisturbed, run):
    """Longer than the 60 seconds that torchrun waits by itself."""
    job = cluster.submit(*flags(inputs, run), LATHE_SETUP='[ "$SLURM_NODEID" != 0 ] || sleep 65')
    assert cluster.end_of(job) == ("COMPLETED", 0), cluster.log(job)
    assert cluster.show(job)["Restarts"] == "0" and weights(run) == weights(undisturbed[0])


@pytest.mark.slow
def test_one_job_that_goes_back_until_the_run_is_done(cluster, inputs, undisturbed, run):
    given = flags(inputs, run, "--checkpoint.minutes-before-end", "0.9")
    job = cluster.submit(*given, flags=["--time=1"], LATHE_UNTIL_DONE="1")
    cluster.wait(lambda: cluster.show(job)["Restarts"] == "1", "a second start")
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=20")
    goes_on(cluster, job, run, undisturbed)


def test_scripts_are_clean():
    scripts = [*(ROOT / "examples" / "slurm").iterdir(), ROOT / "tests" / "slurm" / "cluster.sh", ROOT / ".ci" / "run"]
    if subprocess.run(["which", "shellcheck"], capture_output=True).returncode:
        pytest.skip("no shellcheck here (apt-get install shellcheck)")
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and os.access(TRAIN_JOB, os.X_OK), done.stdout
