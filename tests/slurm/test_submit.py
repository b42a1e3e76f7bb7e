"""`lathe submit` and `lathe jobs` on a real cluster: what SLURM makes of the scripts, the chain and the cancelling."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from engine.run_folder import RunFolder
from engine.run_status import DONE, read_status
from examples import jobs, submit
from examples.cluster import job_record, slurm
from examples.cluster.options import SubmitOptions
from examples.cluster.script import Place, script_path, script_text
from examples.cluster.stages import Stage
from tests.examples.test_recipes import EXPECTED, FOLDER
from tests.examples.test_submit import NASTY, shown
from tests.support.workflows import instruct, question, write_model, write_rows

SMALL = ["--gpus-per-node", "0", "--ranks-per-node", "1", "--no-check-nodes", "--time", "10"]


@pytest.fixture(autouse=True)
def environment(cluster, monkeypatch):
    """This process, and with it what it queues, talks to the cluster of the session."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])


def states(run: RunFolder) -> dict[str, list[str]]:
    """The states of a run's jobs, by their stage."""
    stages = {job.id: job.stage for job in job_record.read(run).jobs}
    found: dict[str, list[str]] = {}
    for one in slurm.states(list(stages)):
        found.setdefault(stages[one.id], []).append(one.state)
    return found


def is_over(run: RunFolder, stage: str = "") -> bool:
    """Whether no job of a stage, or of any, may still do something."""
    ids = [job.id for job in job_record.read(run).jobs if job.stage == stage or not stage]
    return not any(map(slurm.is_queued, slurm.states(ids)))


def logs(run: RunFolder) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in sorted(run.slurm.glob("*.out")))


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_slurm_takes_the_scripts_of_every_recipe(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert submit.main([str(FOLDER / f"{name}.yaml"), "--dry-run", "--time", "4:00:00"]) == 0
    scripts = {Path(path).stem: text for path, text in shown(capsys.readouterr().out).items() if path.endswith(".sh")}
    assert len(scripts) == 4
    for stem, text in scripts.items():
        nodes = int(re.search(r"--nodes=(\d+)", text)[1])
        (tmp_path / "script.sh").write_text(text, encoding="utf-8")
        # Two nodes are all that there is.
        asked = ["sbatch", "--test-only", f"--nodes={min(nodes, 2)}", "script.sh"]
        done = subprocess.run(asked, capture_output=True, text=True)
        assert done.returncode == 0 and "to start at" in done.stderr, f"{stem}: {done.stderr}"


def test_slurm_reads_its_lines_as_they_were_meant(cluster, tmp_path):
    working = tmp_path / f"{NASTY.replace('/', '')} %j"
    working.mkdir()
    place = Place(home=tmp_path, working=working, run=working, scripts=tmp_path / "100% s", python="p", job_name=NASTY)
    place.scripts.mkdir()
    stage = Stage(name="prepare", command=())
    options = SubmitOptions(sbatch=(f"--comment={NASTY}",), check_nodes=False)
    text = script_text(options, place, stage, 1, "bf16")
    header = text[: text.index("set -euo")]
    show = 'pwd\nsqueue -h -j "$SLURM_JOB_ID" -o "%j"\nsqueue -h -j "$SLURM_JOB_ID" -o "%k"\n'
    script_path(place, stage).write_text(header + show, encoding="utf-8")
    number = slurm.submit(script_path(place, stage))
    log = place.scripts / f"prepare-{number}.out"
    cluster.end_of(number)
    assert log.read_text(encoding="utf-8").splitlines() == [str(working), f"{NASTY}-prepare", NASTY]


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Job scripts in the place of Lathe's: training sleeps until it is told to stop, a stage named in FAIL fails."""
    helper = tmp_path / "home" / "examples" / "slurm"
    helper.mkdir(parents=True)
    on_node = "trap 'echo saved; exit 0' TERM; echo begun; while sleep 0.2; do :; done"
    train = f'status=0\nsrun bash -c "{on_node}" || status=$?\necho "lathe: stopped"\nexit "$status"\n'
    (helper / "train_job.sh").write_text(train, encoding="utf-8")
    (helper / "stage_job.sh").write_text('[ "$1" != average ] || exit 3\necho "lathe: $1 done"\n')
    monkeypatch.setattr(submit, "HOME", tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    sections = {"average": {"steps": "2"}, "to_hf": {"dtype": "source"}, "evaluate": {"data": "q"}}
    Path("recipe.yaml").write_text(yaml.safe_dump({"output": "a run", "steps": 2, **sections}), encoding="utf-8")


@pytest.mark.usefixtures("stand_ins")
def test_a_chain_is_refused_twice_and_cancelled(cluster, capsys):
    run = RunFolder("a run")
    chain = ["recipe.yaml", *SMALL, "--nodes", "2", "--jobs", "2", "--stages", "train,average,evaluate"]
    assert submit.main(chain) == 0
    cluster.wait(lambda: logs(run).count("begun") == 2, "the first training job")
    assert states(run) == {"train": ["RUNNING", "PENDING"], "average": ["PENDING"], "evaluate": ["PENDING"]}
    assert submit.main(chain) == 2
    assert "are still queued or running" in capsys.readouterr().err
    assert jobs.main(["a run"]) == 0
    first = job_record.read(run).jobs[0].id
    said = capsys.readouterr().out
    assert re.search(rf"{first}\s+train 1 of 2\s+running .* on node\[1-2\]", said) and f"waits for {first}" in said
    assert jobs.main(["a run", "--cancel"]) == 0
    cluster.wait(lambda: is_over(run), "the end of all jobs")
    assert states(run) == {"train": ["COMPLETED", "CANCELLED"], "average": ["CANCELLED"], "evaluate": ["CANCELLED"]}
    assert logs(run).count("saved") == 2
    capsys.readouterr()
    assert jobs.main(["a run"]) == 0
    assert re.search(r"train 1 of 2\s+completed\s+\S+\s+stopped\n", capsys.readouterr().out)


@pytest.mark.usefixtures("stand_ins")
def test_a_stage_behind_one_that_failed_leaves_the_queue(cluster, capsys):
    run = RunFolder("a run")
    run.checkpoint(2).mkdir(parents=True)
    assert submit.main(["recipe.yaml", *SMALL, "--jobs", "0", "--stages", "average,evaluate"]) == 0
    cluster.wait(lambda: is_over(run), "the end of all jobs")
    assert states(run) == {"average": ["FAILED"], "evaluate": ["CANCELLED"]}
    capsys.readouterr()
    assert jobs.main(["a run"]) == 0
    assert "which had to succeed, one did not" in capsys.readouterr().out


@pytest.mark.slow
def test_a_preempted_stage_goes_back(cluster, tmp_path):
    """With grace, too, after which SLURM 22.05 would drop it."""
    begun = tmp_path / "begun"
    once = f"[ -e {begun} ] || {{ touch {begun}; sleep 120; }}"
    script = submit.HOME / "examples" / "slurm" / "stage_job.sh"
    names = {"LATHE_AT_ONCE": "1", "LATHE_HOME": str(submit.HOME), "LATHE_SETUP": once}
    again = ["--requeue", "--open-mode=append"]
    job = cluster.submit("--help", script=script, flags=["--nodes=1", "--partition=grace", *again], **names)
    cluster.wait(begun.exists, "the stage")
    cluster.preempt()
    assert cluster.end_of(job) == ("COMPLETED", 0), cluster.log(job)
    log = cluster.log(job)
    assert cluster.show(job)["Restarts"] == "1" and "usage: lathe COMMAND" in log
    assert "lathe: the job was preempted, so it goes back to the queue" in log


def write_workflow(folder: Path) -> Path:
    """A whole workflow at toy size, of which RUN bears a name that must be quoted."""
    write_model(folder / "model", "llama", "Llama 3.1", template=True)
    write_rows(folder / "rows.jsonl", instruct)
    write_rows(folder / "questions.jsonl", question, 4)
    content = {
        "model": "model",
        "output": "it's a run",
        "data": ["it's a run/data"],
        "seq_len": 512,
        "global_batch_size": 8,
        "steps": 4,
        "precision": "fp32",
        "checkpoint": {"every": 2},
        "prepare": {"num_workers": 1, "sources": [{"data": "rows.jsonl"}]},
        "average": {"steps": "2,4", "format": "hf", "num_workers": 1},
        "to_hf": {"num_workers": 1},
        "evaluate": {"data": "questions.jsonl", "max_new_tokens": 4},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_whole_workflow_by_one_command(cluster, tmp_path, monkeypatch, capsys):
    recipe = write_workflow(tmp_path)
    monkeypatch.chdir(tmp_path)
    run = RunFolder("it's a run")
    stages = "prepare,train,average,evaluate"
    assert submit.main([str(recipe), *SMALL, "--nodes", "2", "--jobs", "2", "--stages", stages]) == 0
    recipe.write_text("the user goes on writing")
    for stage in ("prepare", "train", "average", "evaluate"):
        cluster.wait(lambda stage=stage: is_over(run, stage), f"the end of {stage}")
    said = logs(run)
    assert read_status(run)["state"] == DONE, said
    found = states(run)
    assert [found[stage] for stage in ("prepare", "average", "evaluate")] == [["COMPLETED"]] * 3, said
    assert found["train"][0] == "COMPLETED" and found["train"][1] in ("CANCELLED", "COMPLETED")
    assert json.loads((run.path / "evaluation" / "results.json").read_text())["made_of"]
    by_hand = [sys.executable, "-m", "examples.lathe", "average", str(run.slurm / "recipe.yaml"), "--output", "by hand"]
    environment = os.environ | {"PYTHONPATH": str(submit.HOME)}
    subprocess.run(by_hand, check=True, capture_output=True, env=environment)
    for path in Path("by hand").glob("*.safetensors"):
        assert path.read_bytes() == (run.path / "average" / path.name).read_bytes()
    capsys.readouterr()
    assert jobs.main([str(run.path)]) == 0
    assert "done, step 4 of 4" in capsys.readouterr().out
    shutil.rmtree("by hand")
