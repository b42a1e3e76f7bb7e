"""What exports say of how they were made: two rounds of real training, after base, data and RUN are gone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from checkpoint_tools import average_steps, hf_to_mcore, mcore_to_hf, publish
from engine.checkpointing.provenance import FILE, course, hub_name, provenance_at_start, read_provenance
from engine.run_folder import RunFolder
from tests.engine.checkpointing.test_resume import metrics
from tests.engine.test_failures import arguments, outcome
from tests.support.tiny import edit_meta, make_inputs

SOURCES = [
    {"name": "maths", "data": "lab/maths:main", "files": [{"name": "lab/maths:main", "rows": 9}], "rows": 9},
    {"name": "own", "data": "rows/own.jsonl", "files": [{"name": "rows/own.jsonl", "rows": 3}], "rows": 3},
]
OPTIONS = {
    "prompt": {"user": "Solve: {}", "system": "Think."},
    "system": None,
    "sources": [{"system": "Be brief."}, {}],
}
DROPPED = {"not JSON": {"count": 2, "first": "rows/own.jsonl:1: secret"}}


@pytest.fixture(scope="module")
def rounds(pool, tmp_path_factory):
    """The folder of two rounds of training: `run` of three steps, `average` of its last two, `second` from that."""
    folder = make_inputs(tmp_path_factory.mktemp("rounds"))
    edit_meta(folder / "data", sources=SOURCES, dropped=DROPPED, rows=1200, options=OPTIONS)
    saving = ("--checkpoint.every", "1", "--checkpoint.export-hf", "--seed", "7")
    run = arguments(folder, folder / "run", *saving, "--steps", "2")
    assert pool.run(outcome, 1, run) == [""]
    assert pool.run(outcome, 1, [*run, "--steps", "3"]) == [""], "a run that goes on says the same of its start"
    shutil.move(folder / "model", folder / "gone")
    average_steps.main(folder / "run", "2,3", folder / "average", format="hf")
    average_steps.main(folder / "run", "2,3", folder / "mean")
    second = arguments(folder, folder / "second", "--steps", "1", "--model", str(folder / "average"))
    assert pool.run(outcome, 1, second) == [""]
    return folder


def test_an_export_says_what_its_run_knew(rounds):
    mcore_to_hf.main(checkpoint=rounds / "run", output=rounds / "last")
    said, lines = read_provenance(rounds / "last"), metrics(rounds / "run")
    assert (rounds / "last" / FILE).read_bytes() == (RunFolder(rounds / "run").export(3) / FILE).read_bytes()
    assert said["base_model"] == {"name": "model", "hub": False} and said["steps"] == [3]
    (data,) = said["data"]
    assert data["dropped"] == {"not JSON": 2} and data["rows"] == 1200
    assert data["prompts"] == [{"system": "Think.", "user": "Solve: {}"}, {"system": "Be brief."}]
    assert [source["hub"] for source in data["sources"]] == ["lab/maths", None]
    assert data["documents"] == 10 and data["tokens"] > data["supervised_tokens"] > 0
    assert said["settings"]["seed"] == 7 and "tp" not in said["settings"]
    assert said["course"]["tokens"] == sum(line["tokens"] for line in lines)
    assert (said["course"]["first_loss"], said["course"]["last_loss"]) == (lines[0]["loss"], lines[-1]["loss"])
    assert str(rounds) not in (rounds / "last" / FILE).read_text(), "no path of this machine travels"
    early = read_provenance(RunFolder(rounds / "run").export(2))
    assert early["course"]["tokens"] == sum(line["tokens"] for line in lines[:2]) and early["steps"] == [2]


def test_a_second_round_knows_the_first(rounds, tmp_path):
    """From an average of either form; and a conversion there and back keeps what it does not understand."""
    average = read_provenance(rounds / "average")
    assert average["steps"] == [2, 3] and average["base_model"]["name"] == "model"
    mcore_to_hf.main(checkpoint=rounds / "mean", output=tmp_path / "mean")
    assert (tmp_path / "mean" / FILE).read_bytes() == (rounds / "average" / FILE).read_bytes()
    checkpoint = shutil.copytree(RunFolder(rounds / "second").checkpoint(1), tmp_path / "alone")
    mcore_to_hf.main(checkpoint=checkpoint, output=tmp_path / "second")
    said = read_provenance(tmp_path / "second")
    assert said["earlier"] == average and said["base_model"]["name"] == "model" and said["steps"] == [1]
    assert said["course"] == {}, "the checkpoint was moved out of its run"
    hf_to_mcore.main(hf=tmp_path / "second", output=tmp_path / "back")
    mcore_to_hf.main(checkpoint=tmp_path / "back", output=tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "second" / FILE).read_bytes()


def test_a_run_that_begins_with_a_checkpoint_knows_its_run(pool, rounds, tmp_path):
    checkpoint = RunFolder(rounds / "run").checkpoint(2)
    third = arguments(rounds, tmp_path / "third", "--steps", "1", "--model", str(checkpoint))
    assert pool.run(outcome, 1, third) == [""]
    mcore_to_hf.main(checkpoint=tmp_path / "third", output=tmp_path / "hf")
    earlier = read_provenance(tmp_path / "hf")["earlier"]
    assert earlier["steps"] == [2] and earlier == read_provenance(RunFolder(rounds / "run").export(2))


def test_the_run_fills_the_card_of_an_export_that_says_nothing(rounds, tmp_path, capsys):
    silent = shutil.copytree(RunFolder(rounds / "run").export(3), tmp_path / "step_000003")
    (silent / FILE).unlink()
    publish.main(silent, "ours/model", dry_run=True)
    assert "does not say what it was made of" in capsys.readouterr().out
    publish.main(silent, "ours/model", run=rounds / "run", dry_run=True)
    printed = capsys.readouterr().out
    assert "These are the weights after step 3." in printed and "| seed | 7 |" in printed and "- lab/maths" in printed
    other = shutil.copytree(rounds / "run", tmp_path / "other", ignore=shutil.ignore_patterns("checkpoints", "hf"))
    begun = json.loads((other / "model_files" / FILE).read_text())
    begun["data"][0]["fingerprint"] = "another"
    (other / "model_files" / FILE).write_text(json.dumps(begun))
    with pytest.raises(ValueError, match=r"says otherwise than .* of how it was made \(data\): give its own"):
        publish.main(RunFolder(rounds / "run").export(3), "ours/model", run=other, dry_run=True)
    with pytest.raises(ValueError, match="is no run that has made a step"):
        publish.main(silent, "ours/model", run=tmp_path, dry_run=True)


def test_the_course_is_summed_up():
    lines = [
        {"step": 1, "loss": 2.0, "tokens": 10, "supervised_tokens": 4, "valid_loss": 1.5},
        {"step": 2, "loss": 1.0, "tokens": 20, "supervised_tokens": 5, "valid_loss": 1.75},
        {"step": 3, "loss": None, "tokens": 30, "supervised_tokens": 6, "skipped": True},
    ]
    assert course(lines) == {
        "steps": 3,
        "skipped_steps": 1,
        "tokens": 60,
        "supervised_tokens": 15,
        "first_loss": 2.0,
        "last_loss": 1.0,
        "valid_loss": 1.75,
        "valid_step": 2,
        "best_valid_loss": 1.5,
        "best_valid_step": 1,
    }
    assert course([]) == {}


def test_names_on_the_hub_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "average").mkdir(parents=True)
    names = ["lab/model", "lab/data:main:train", "lab/v1.5", "runs/average", "rows/a.jsonl.gz", "/lab/model", "model"]
    assert [hub_name(name) for name in names] == ["lab/model", "lab/data", "lab/v1.5", None, None, None, None]
    cached = Path("/cache/models--lab--base-7b/snapshots/0123")
    at_start = provenance_at_start({}, "/links/base", cached, [], [])
    assert at_start["base_model"] == {"name": "lab/base-7b", "hub": True}
    foreign = tmp_path / FILE
    foreign.write_text(json.dumps({"made": "by others"}))
    assert read_provenance(tmp_path) == {}
