"""A whole workflow by one command, disturbed, and a second round behind it: bit for bit what is made by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.run_folder import RunFolder
from engine.run_status import DONE, read_status
from examples import jobs, lathe, submit
from examples.cluster import job_record
from tests.slurm.cluster import ROOT
from tests.support.hub import StandInHub
from tests.support.workflows import instruct, mixture, numina_cot, question, write_model, write_rows

pytestmark = pytest.mark.slow
STEPS, MORE = 400, 40  # of the first round and of the second
CLUSTER = ["--nodes", "2", "--gpus-per-node", "0", "--ranks-per-node", "1", "--time", "20", "--partition", "low"]


def write_inputs(folder: Path) -> None:
    """A model, rows of three sources, and questions."""
    write_model(folder / "model", "llama", "Llama 3.1", template=True)
    for row in (instruct, mixture, numina_cot):
        write_rows(folder / f"{row.__name__}.jsonl", row)
    write_rows(folder / "questions.jsonl", question, 4)


def write_rounds(folder: Path, runs: str) -> tuple[Path, Path]:
    """The recipes of two rounds, whose runs lie in `runs`; the second begins with the average of the first."""
    first: dict[str, Any] = {
        "model": "model",
        "output": f"{runs}/first round",
        "data": [f"{runs}/first round/data"],
        "seq_len": 512,
        "global_batch_size": 8,
        "steps": STEPS,
        "precision": "fp32",
        "optim": {"lr": 1e-3, "warmup_steps": 10},
        "checkpoint": {"every": STEPS // 2},
        "prepare": {
            "tokenizer": "model",
            "num_workers": 1,
            "sources": [{"data": f"{row.__name__}.jsonl"} for row in (instruct, mixture, numina_cot)],
        },
        "average": {"steps": [STEPS // 2, STEPS], "format": "hf", "num_workers": 1},
        "to_hf": {"num_workers": 1},
        "evaluate": {"data": "questions.jsonl", "max_new_tokens": 4, "num_workers": 2},
        "publish": {"repo": f"ours/{runs.replace(' ', '-')}-1"},
    }
    second: dict[str, Any] = {
        "base": f"{runs} first.yaml",
        "model": f"{runs}/first round/average",
        "output": f"{runs}/second round",
        "data": [f"{runs}/second round/data"],
        "steps": MORE,
        "checkpoint": {"every": MORE // 2},
        "prepare": {"model": None, "where": "expected_answer != '3'", "sources": [{"data": "instruct.jsonl"}]},
        "average": {"steps": [MORE // 2, MORE]},
        "publish": {"repo": f"ours/{runs.replace(' ', '-')}-2"},
    }
    paths = folder / f"{runs} first.yaml", folder / f"{runs} second.yaml"
    for path, content in zip(paths, (first, second), strict=True):
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return paths


def by_hand(cluster, recipe: Path, *behind: str) -> None:
    """The same stages one after the other, on this machine."""
    assert lathe.main(["prepare", str(recipe)]) == 0
    script = str(ROOT / "examples" / "pretrain_sft.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", script, str(recipe)]
    subprocess.run(torchrun, check=True, capture_output=True, env=cluster.environment | {"PYTHONPATH": str(ROOT)})
    for command in behind:
        assert lathe.main([command, str(recipe)]) == 0


def made(run: Path) -> dict[str, bytes | float]:
    """What a round has made: data, weights, answers and scores."""
    kinds = ("data/tokens.*", "average/*.safetensors", "final/*.safetensors", "evaluation/generations.jsonl")
    found = {path.relative_to(run).as_posix(): path.read_bytes() for kind in kinds for path in run.glob(kind)}
    return found | {"score": json.loads((run / "evaluation" / "results.json").read_text())["score"]}


def disturb(cluster, run: RunFolder, training: list[str]) -> None:
    """The first job of a chain is told to stop, the second is preempted, goes on, and is told to stop, too."""
    first, second, _ = training
    cluster.reach(run, 40)
    cluster.call("scancel", "--signal=USR1", first)
    assert cluster.end_of(first) == ("COMPLETED", 0), cluster.log(first)
    steps = read_status(run)["step"]
    assert 40 <= steps < STEPS
    cluster.reach(run, steps + 40)
    cluster.preempt()
    cluster.wait(lambda: cluster.show(second)["Restarts"] == "1", "the second job's preemption")
    steps = read_status(run)["step"]
    cluster.reach(run, steps + 40)
    cluster.call("scancel", "--signal=USR1", second)
    assert cluster.end_of(second) == ("COMPLETED", 0)
    assert read_status(run)["step"] < STEPS


@pytest.fixture
def hub(monkeypatch):
    """A stand-in of the hub, to which this process and the jobs that it queues publish."""
    with StandInHub() as hub:
        for name, value in hub.environment.items():
            monkeypatch.setenv(name, value)
        hub.serve_library(monkeypatch)
        yield hub


def published(hub: StandInHub, repo: str) -> dict[str, bytes]:
    """The files of a published model that do not name the run that made it."""
    return {name: data for name, data in hub.files(repo).items() if name not in ("README.md", "provenance.json")}


def test_two_rounds(cluster, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    write_inputs(tmp_path)
    first, second = write_rounds(tmp_path, "it is queued")
    stages = "prepare,train,average,export,evaluate,publish"
    assert submit.main([str(first), *CLUSTER, "--jobs", "3", "--stages", stages]) == 0
    run, behind = RunFolder("it is queued/first round"), RunFolder("it is queued/second round")
    after = ["--after", str(run.path), "--stages", "prepare,train,average,evaluate,publish"]
    assert submit.main([str(second), *CLUSTER, *after]) == 0
    first.write_text("its author goes on writing")
    record = {stage: [job.id for job in job_record.read(run).jobs if job.stage == stage] for stage in stages.split(",")}
    disturb(cluster, run, record["train"])
    ends = {stage: cluster.end_of(ids[-1]) for stage, ids in record.items()}
    assert ends == dict.fromkeys(ends, ("COMPLETED", 0)), [cluster.show(ids[-1]) for ids in record.values()]
    last = [cluster.end_of(job.id) for job in job_record.read(behind).jobs]
    assert last == [("COMPLETED", 0)] * 5
    capsys.readouterr()
    assert jobs.main([str(run.path)]) == 0
    said = capsys.readouterr().out
    assert f"done, step {STEPS} of {STEPS}" in said and "SIGUSR1 was received" in said

    first, second = write_rounds(tmp_path, "by hand")
    by_hand(cluster, first, "average", "to-hf", "evaluate", "publish")
    by_hand(cluster, second, "average", "evaluate", "publish")
    for number, name in enumerate(("first round", "second round"), 1):
        queued, hand = made(tmp_path / "it is queued" / name), made(tmp_path / "by hand" / name)
        assert queued.keys() == hand.keys() and len(hand) > 4
        assert [key for key in hand if queued[key] != hand[key]] == []
        sent = published(hub, f"ours/it-is-queued-{number}")
        assert sent == published(hub, f"ours/by-hand-{number}") and len(sent) > 4
        assert sent["model.safetensors"] == queued["average/model.safetensors"]
        card = hub.files(f"ours/it-is-queued-{number}")["README.md"].decode()
        assert f"{queued['score']:.3f}" in card or f"{100 * queued['score']:.1f}" in card
    assert read_status(behind)["state"] == DONE
