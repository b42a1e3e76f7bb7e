"""The model card: its metadata as the hub's library reads it, its tables, and what it does not tell."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from checkpoint_tools import publish
from checkpoint_tools.common import run_script
from checkpoint_tools.fingerprint import weights_fingerprint
from checkpoint_tools.hub.card import is_untouched, model_card
from engine.checkpointing.provenance import complete, read_provenance, write_provenance
from engine.run_folder import RunFolder
from tests.checkpoint_tools.test_publish import write_model

MADE_OF = {
    "lathe": "1.2.3",
    "base_model": {"name": "someone/base-7b", "hub": True},
    "steps": [7500, 15000],
    "data": [
        {
            "name": "data",
            "weight": 0.5,
            "rows": 1010,
            "filtered": 4,
            "documents": 1000,
            "tokens": 2_000_000,
            "supervised_tokens": 1_500_000,
            "prompts": [{"system": "", "user": "Solve this:\n```\n{problem}"}],
            "dropped": {"no | answer <b>": 5, "not JSON": 1},
            "sources": [
                {"name": "maths", "hub": "lab/maths", "rows": 910, "documents": 900, "tokens": 1_900_000},
                {"name": "own", "hub": None, "rows": 100, "documents": 100, "tokens": 100_000},
            ],
        }
    ],
    "settings": {
        "seq_len": 32768,
        "precision": "bf16",
        "fp8": "tensorwise",
        "optim": {"lr": 0.0002, "weight_decay": 0.0},
        "override": {"rope_theta": None, "resize_embeddings": False},
        "moe": {"aux_loss": 0.0, "dispatcher": "alltoall"},
    },
    "course": {
        "steps": 15000,
        "skipped_steps": 0,
        "tokens": 3_000_000,
        "supervised_tokens": 2_000_000,
        "first_loss": 1.25,
        "last_loss": 0.5,
        "valid_loss": 0.625,
        "valid_step": 14000,
        "best_valid_loss": 0.6,
        "best_valid_step": 12000,
    },
}
RESULTS = {
    "data": "lab/questions:main:test",
    "dataset_name": "questions",
    "questions": 500,
    "scores": {"pass@1": 0.61284, "maj@16": 0.7},
    "temperature": 0.7,
    "num_samples": 16,
    "max_new_tokens": 2048,
}


def test_the_metadata_parses_back():
    card = ModelCard(model_card("model", MADE_OF, [RESULTS], license="apache-2.0"))
    data = card.data.to_dict()
    results = data.pop("model-index")[0]["results"]
    assert data == {
        "base_model": "someone/base-7b",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lathe", "sft"],
        "datasets": ["lab/maths"],
    }
    (entry,) = results
    assert entry["dataset"] == {"name": "questions", "type": "lab/questions"}
    assert [(one["type"], one["value"]) for one in entry["metrics"]] == [("pass@1", 0.6128), ("maj@16", 0.7)]


def test_the_text_tells_what_the_model_was_made_of():
    text = ModelCard(model_card("model", MADE_OF, [RESULTS])).text
    for line in (
        "# model",
        "A finetune of [someone/base-7b](https://huggingface.co/someone/base-7b), made with Lathe 1.2.3.",
        "| questions | 500 | pass@1 | 0.6128 | 16 a question, at temperature 0.7, at most 2,048 tokens |",
        "| tokens | 3,000,000 |",
        "| last loss | 0.5000 |",
        "| held-out loss | 0.6250, after step 14,000 |",
        "| best held-out loss | 0.6000, after step 12,000 |",
        "| source | rows read | left out by a condition | documents | tokens | supervised tokens |",
        "| lab/maths | 910 |  | 900 | 1,900,000 |  |",
        "| data, taken 0.5 times an epoch | 1,010 | 4 | 1,000 | 2,000,000 | 1,500,000 |",
        "Of 1,010 rows 6 were dropped: 5 x no \\| answer &lt;b>; 1 x not JSON.",
        "The system turn around a question:\n\n    (empty)",
        "The user turn around a question:\n\n    Solve this:\n    ```\n    {problem}",
        "| seq_len | 32768 |",
        "| optim.lr | 0.0002 |",
        "| optim.weight_decay | 0.0 |",
    ):
        assert f"\n{line}\n" in text, line
    assert "the mean of those after steps 7,500, 15,000 of one run" in text
    for silent in ("skipped", "fp8", "moe", "override", "round before"):
        assert silent not in text


def test_an_earlier_round_and_a_base_model_without_a_name():
    second = copy.deepcopy(MADE_OF) | {"steps": [40], "data": [{"name": "hard", "sources": []}], "earlier": MADE_OF}
    second["base_model"] = {"name": "my|base", "hub": False}
    card = ModelCard(model_card("model", second))
    assert "base_model" not in card.data.to_dict() and card.data.license == "unknown"
    assert card.data.datasets == ["lab/maths"], "what the earlier round was trained on counts, too"
    assert "A finetune of my\\|base, made" in card.text and "hard; its counts are not recorded." in card.text
    first, before = card.text.split("## The round before")
    assert "These are the weights after step 40." in first and "| lab/maths |" not in first
    assert "### Training" in before and "| lab/maths |" in before
    assert ModelCard(model_card("model", second, base_model="someone/else")).data.base_model == "someone/else"


def test_a_card_knows_whether_it_was_edited():
    card = model_card("model", {})
    assert "How it was trained is not recorded." in card
    assert is_untouched(card)
    assert not is_untouched(card.replace("# model", "# Model"))
    assert not is_untouched(card + "More.\n") and not is_untouched("# Mine\n")


@pytest.fixture
def model(tmp_path) -> Path:
    folder = write_model(tmp_path / "hf")
    write_provenance(folder, MADE_OF)
    return folder


def evaluation(folder: Path, model: Path, path: str = "/somewhere/else", **made_of) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made_of = {"model": f"{path} [{weights_fingerprint(str(model))}]"} | made_of
    (folder / "results.json").write_text(json.dumps(RESULTS | {"made_of": made_of}))
    return folder


def test_results_are_those_of_this_model(model, tmp_path, capsys):
    results = evaluation(tmp_path / "results", model)
    publish.main(model, "ours/model", evaluation=(results,), dry_run=True)
    assert "| questions | 500 | pass@1 | 0.6128 |" in capsys.readouterr().out
    many = tmp_path / "run" / "evaluation"
    for place, of in (("step_000001/questions", tmp_path), ("average/questions", model), ("earlier.1", model)):
        evaluation(many / place, of)
    publish.main(model, "ours/model", evaluation=(many,), dry_run=True)
    assert capsys.readouterr().out.count("| questions | 500 | pass@1 |") == 1
    other = evaluation(tmp_path / "other", write_model(tmp_path / "another", seed=1))
    for path, sentence in (
        (other, "has results of other weights, /somewhere/else ["),
        (model, "holds no results.json: give the --output of lathe evaluate"),
    ):
        with pytest.raises(ValueError, match="--evaluation") as caught:
            publish.main(model, "ours/model", evaluation=(path,), dry_run=True)
        assert sentence in str(caught.value)
    (results / "results.json").write_text("[]")
    with pytest.raises(ValueError, match="is not what lathe evaluate writes"):
        publish.main(model, "ours/model", evaluation=(results,), dry_run=True)


def test_results_that_cannot_be_read_or_stand_twice_are_left_out(model, tmp_path, capsys):
    """One of another step, damaged, must not keep a model from being published."""
    many = tmp_path / "run" / "evaluation"
    evaluation(many / "average" / "questions", model, "runs/average", seed=0)
    evaluation(many, model, "/here/runs/average", seed=0)  # the same by another path
    evaluation(many / "sampled", model, seed=1)
    for step, text in ((10, "{"), (20, json.dumps(RESULTS))):  # of which the second is of an older version
        evaluation(many / f"step_0000{step}" / "questions", tmp_path)
        (many / f"step_0000{step}" / "questions" / "results.json").write_text(text)
    publish.main(model, "ours/model", evaluation=(many, many / "sampled"), dry_run=True)
    printed = capsys.readouterr().out
    assert printed.count("| questions | 500 | pass@1 |") == 2
    first = many / "step_000010" / "questions" / "results.json"
    assert f"not read, as they are damaged or of an older version: {first} (2 in all)\n" in printed


RUN_SETTINGS = {"seq_len": 64, "seed": 7, "optim": {"lr": 1e-5}}


def trained(run: RunFolder, loss: float, steps: int = 2, lr: float = 1e-5, fingerprint: str = "rows") -> RunFolder:
    """A run as training leaves it; again into the same folder, as with --no-resume."""
    run.model_files.mkdir(parents=True, exist_ok=True)
    data = {"name": "data", "weight": 1.0, "fingerprint": fingerprint, "sources": []}
    write_provenance(run.model_files, {"lathe": "1", "base_model": {"name": "base", "hub": False}, "data": [data]})
    run.config.write_text(yaml.safe_dump(RUN_SETTINGS | {"optim": {"lr": lr}}))
    lines = [{"step": step, "loss": loss / step, "tokens": 9, "supervised_tokens": 4} for step in range(1, steps + 1)]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def card_of(capsys, *arguments, **options) -> str:
    publish.main(*arguments, "ours/model", dry_run=True, **options)
    return capsys.readouterr().out


def test_what_a_model_says_of_itself_wins_over_a_run_that_was_trained_anew(tmp_path, capsys):
    run = trained(RunFolder(tmp_path / "run"), loss=3.0)
    average = write_model(run.path / "average")
    write_provenance(average, complete(read_provenance(run.model_files), run.config, run.metrics, [1, 2]))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output: {run.path}\naverage: {{steps: [1, 2]}}\npublish: {{repo: ours/model, dry_run: true}}\n")
    first = card_of(capsys, average, run=run.path)
    assert "| optim.lr | 1e-05 |" in first and "| last loss | 1.5000 |" in first
    trained(run, loss=3.0, lr=9e-5)  # which went on with other settings
    assert card_of(capsys, average, run=run.path) == first
    trained(run, loss=0.2, lr=9e-5)
    assert run_script(publish.main, [str(recipe)], section="publish") == 0
    assert capsys.readouterr().out == first
    trained(run, loss=0.2, lr=9e-5, fingerprint="others")
    with pytest.raises(ValueError, match=r"says otherwise than .*average of how it was made") as caught:
        card_of(capsys, average, run=run.path)
    assert "(data, course.first_loss, course.last_loss): give its own run" in str(caught.value)


def test_a_run_fills_what_a_model_does_not_say_and_makes_up_no_step(tmp_path, capsys):
    run = trained(RunFolder(tmp_path / "run"), loss=3.0)
    silent = write_model(tmp_path / "strangers")
    said = card_of(capsys, silent, run=run.path)
    assert "Which step they are of is not recorded." in said and "weights after step" not in said
    assert "| seed | 7 |" in said and "| last loss | 1.5000 |" in said
    early = write_model(tmp_path / "step_000001")
    said = card_of(capsys, early, run=run.path)
    assert "These are the weights after step 1." in said and "| last loss | 3.0000 |" in said
    moved = complete(read_provenance(run.model_files), run.config, tmp_path / "no metrics", [2])
    write_provenance(silent, moved)
    said = card_of(capsys, silent, run=run.path)
    assert "These are the weights after step 2." in said and "| last loss | 1.5000 |" in said
    late = write_model(tmp_path / "step_000003")
    with pytest.raises(ValueError, match=r"has made no step 3, of which .*step_000003 is: give its own run"):
        card_of(capsys, late, run=run.path)
