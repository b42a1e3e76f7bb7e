"""What `lathe submit` refuses before training because a stage behind it could not work."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from engine.config import CheckpointConfig, RunConfig
from engine.run_folder import MANIFEST, RunFolder
from examples import submit
from examples.cluster.options import SubmitOptions
from examples.cluster.stage_checks import check_files, check_steps
from tests.examples.test_recipes import FOLDER

REASONING = str(FOLDER / "openmathreasoning-qwen2.5-math-1.5b.yaml")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--steps", "10000"], "average.steps 15000,22500,30000: the run ends at --steps 10000; name earlier steps"),
        (
            ["--checkpoint.keep", "1"],
            "average.steps 7500,15000,22500: removed before training ends, as --checkpoint.keep 1 keeps",
        ),
        (["--checkpoint.every", "5000"], "average.steps 7500,22500: not saved, as --checkpoint.every 5000 saves"),
    ],
)
def test_a_recipe_whose_average_cannot_work_is_refused(flags, sentence, capsys):
    assert submit.main([REASONING, "--dry-run", "--", *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --stages prepare,train,average,evaluate: average.steps ") and said.count("\n") == 1
    assert sentence in said


def run_config(*, steps: int | None = 8, epochs: float | None = None, **checkpoint) -> RunConfig:
    return replace(RunConfig(), steps=steps, epochs=epochs, checkpoint=CheckpointConfig(**checkpoint))


def checkpoints(run: RunFolder, *steps: int, rescues: tuple[int, ...] = ()) -> None:
    for step in (*steps, *rescues):
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / MANIFEST).write_text(json.dumps({"rescue": step in rescues}))


@pytest.mark.parametrize(
    ("wanted", "settings", "refused"),
    [
        ([2, 8], {"every": 2}, ""),
        ([8], {"every": 0}, ""),
        ([3, 8], {"every": 3}, ""),
        ([4, 8], {"every": 0}, "4: not saved, as --checkpoint.every 0 saves the last step alone"),
        ([0, 8], {"every": 2}, "0: "),
        ([6, 8], {"every": 2, "keep": 2}, ""),
        ([4, 6, 8], {"every": 2, "keep": 2}, "4: removed before training ends"),
        ([4, 8], {"every": 2, "keep": 1, "keep_every": 4}, ""),
        ([4, 6, 8], {"every": 2, "keep": 1, "keep_every": 4}, "6: removed"),
        ([2, 8], {"every": 2, "keep": 1, "keep_best": 1}, ""),  # it may be the best
        ([2, 9], {"every": 2, "steps": None, "epochs": 1}, ""),  # 9 may be the last
        ([3, 9], {"every": 2, "steps": None, "epochs": 1}, "3: not saved"),
        ([2, 8], {"every": 2, "keep": 2, "steps": None, "epochs": 1}, "2: removed"),
    ],
)
def test_steps_must_be_reached_saved_and_kept(wanted, settings, refused):
    run, config = RunFolder("run"), run_config(**settings)
    if not refused:
        check_steps(wanted, run, config)
        return
    with pytest.raises(ValueError, match=f"average.steps {refused}"):
        check_steps(wanted, run, config)


def test_a_run_that_goes_on_counts_what_it_has():
    run = RunFolder("run")
    checkpoints(run, 3, rescues=(5,))
    config = run_config(every=2)
    check_steps([3, 6, 8], run, config)
    with pytest.raises(ValueError, match="average.steps 4,5: the run has come to step 5 .*; its checkpoints: 3$"):
        check_steps([4, 5, 8], run, config)
    with pytest.raises(ValueError, match="average.steps 3: removed"):
        check_steps([3, 8], run, run_config(every=2, keep=2))
    check_steps([6, 8], run, run_config(every=2, keep=2))
    check_steps([4, 8], run, run_config(every=2, resume_from=3))
    with pytest.raises(ValueError, match="average.steps 3: not saved"):
        check_steps([3, 8], run, run_config(every=2, resume=False))


def test_without_training_the_checkpoints_decide_that_are_there(capsys):
    behind = [REASONING, "--jobs", "0", "--dry-run"]
    assert submit.main(behind) == 2
    assert "has no step 7500, 15000, 22500, 30000; steps that exist: none" in capsys.readouterr().err
    checkpoints(RunFolder("runs/openmathreasoning-qwen2.5-math-1.5b"), 7500, 15000, 22500, 30000)
    assert submit.main([*behind, "--", "--checkpoint.keep", "1", "--checkpoint.every", "1"]) == 0


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([7500, 15000, 22500, 30000], ""),
        (30000, ""),
        ("7500;30000", "average.steps 7500;30000: give step numbers separated by commas"),
        ("7500,7500", "average.steps 7500,7500: a step is named twice"),
    ],
)
def test_steps_are_read_as_average_reads_them(given, sentence, capsys):
    Path("own.yaml").write_text(yaml.safe_dump({"average": {"steps": given}}))
    assert submit.main([REASONING, "own.yaml", "--dry-run"]) == (2 if sentence else 0)
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"evaluate": {"data": "questons.jsonl"}}, "evaluate.data questons.jsonl: there is no such file; name one"),
        ({"evaluate": {"data": "here.jsonl"}}, ""),
        ({"evaluate": {"data": "runs/openmathreasoning-qwen2.5-math-1.5b/data/valid.jsonl"}}, ""),
        ({"prepare": {"sources": ["gone.jsonl:0.5"]}}, "prepare.sources gone.jsonl: there is no such file"),
        ({"prepare": {"sources": ["here.jsonl:0.5", "owner/name:config:test"]}}, ""),
        ({"prepare": {"decontaminate": ["gone.parquet"]}}, "prepare.decontaminate gone.parquet: there is no such"),
        ({"prepare": {"output": "made"}, "evaluate": {"data": "made/questions.json"}}, ""),
    ],
)
def test_local_files_must_be_there(sections, sentence, capsys):
    Path("here.jsonl").touch()
    Path("own.yaml").write_text(yaml.safe_dump(sections))
    assert submit.main([REASONING, "own.yaml", "--dry-run"]) == (2 if sentence else 0)
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("name", ["/gone", "./gone", "../gone", "~/gone-here", "a/b/c", "x/*.jsonl", "./gone::test"])
def test_what_can_only_be_a_file_is_looked_for(name):
    with pytest.raises(ValueError, match=f"^data {re.escape(name)}: there is no such file"):
        check_files("data", [name], SubmitOptions(), [])


def test_files_that_are_there_and_names_of_the_hub_pass(folder):
    (folder / "x").mkdir()
    (folder / "x" / "rows.jsonl").touch()
    names = ["x/*.jsonl", "./x/rows.jsonl", "./x::test", str(folder), "gsm8k", "openai/gsm8k:main"]
    check_files("data", names, SubmitOptions(), [])
    check_files("data", ["later/rows.jsonl"], SubmitOptions(), [Path("later")])


def test_a_container_may_call_a_file_otherwise(folder):
    (folder / "outside").mkdir()
    (folder / "outside" / "rows.jsonl").touch()
    options = SubmitOptions(container="image", mounts=(f"{folder}/outside:/inside",))
    check_files("data", ["/inside/rows.jsonl", "/in/the/image.jsonl"], options, [])
    for name in ("/inside/gone.jsonl", "gone.jsonl"):
        with pytest.raises(ValueError, match=f"data {name}: there is no such file"):
            check_files("data", [name], options, [])
