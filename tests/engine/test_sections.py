"""Sections of a recipe: what each command takes of it, what it adds, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from checkpoint_tools import average_steps, mcore_to_hf
from checkpoint_tools.common import run_script
from engine.cli import parse_run, read_recipe, read_section, take_files
from examples.evaluate import read_options
from examples.evaluation.options import EvaluationError

RECIPE = {
    "model": "HUB/MODEL",
    "output": "runs/one",
    "data": ["runs/one/data"],
    "steps": 30,
    "prepare": {"tokenizer": "HUB/CHAT", "hold-out": 5},
    "average": {"steps": [10, 20, 30], "format": "hf"},
    "to_hf": {"max_sequence_length": 64},
    "evaluate": {"data": "test.jsonl", "num-samples": 4, "temperature": "7e-1"},
    "publish": {"repo": "ours/one"},
}


@pytest.fixture
def written(tmp_path):
    def write(name: str, content: dict) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def test_training_leaves_the_sections_alone(written):
    config = parse_run([str(written("one", RECIPE)), "--steps", "4"])
    assert (config.model, config.steps, config.data) == ("HUB/MODEL", 4, ("runs/one/data",))


def test_a_section_knows_the_paths_of_the_run(written):
    recipe = [written("one", RECIPE)]
    given = {"tokenizer": "HUB/CHAT", "hold_out": 5}
    assert read_section(recipe, "prepare") == {"model": "HUB/MODEL", "output": "runs/one/data", **given}
    assert read_section(recipe, "average") == {
        "run": "runs/one", "output": "runs/one/average", "steps": [10, 20, 30], "format": "hf",
    }  # fmt: skip
    assert read_section(recipe, "to_hf") == {
        "checkpoint": "runs/one", "output": "runs/one/final", "max_sequence_length": 64,
    }  # fmt: skip
    assert read_section(recipe, "evaluate")["model"] == "runs/one/average"
    assert read_section(recipe, "publish") == {
        "hf": "runs/one/average", "evaluation": ["runs/one/evaluation"], "repo": "ours/one",
    }  # fmt: skip
    options = read_options([str(*recipe), "--seed", "3"])
    assert (options.model, options.output) == ("runs/one/average", Path("runs/one/evaluation"))
    assert (options.num_samples, options.temperature, options.seed) == (4, 0.7, 3)


@pytest.mark.parametrize(
    ("change", "model"),
    [
        ({"average": None}, "runs/one/final"),
        ({"average": {"output": "elsewhere"}}, "elsewhere"),
        ({"average": None, "to_hf": {"output": "elsewhere"}}, "elsewhere"),
        ({"evaluate": {"data": "d", "model": "given"}}, "given"),
    ],
)
def test_what_the_recipe_makes_is_evaluated(written, change, model):
    assert read_section([written("one", RECIPE | change)], "evaluate")["model"] == model


def test_what_cannot_be_known_is_left_to_flags(written):
    recipe = [written("one", {"data": ["a", "b"], "prepare": {}, "average": {"steps": 4}, "evaluate": {}})]
    assert read_section(recipe, "prepare") == {"model": None}
    assert read_section(recipe, "average") == {"steps": 4}
    assert read_section(recipe, "evaluate") == {}


def test_bases_and_later_files_win_key_by_key(written):
    written("low", RECIPE)
    written("round", {"steps": 3, "average": {"steps": "1,2"}, "prepare": {"system": ""}})
    top = written("top", {"base": ["low.yaml", "round.yaml"], "prepare": {"hold-out": 9}})
    assert (read_recipe(top)["steps"], read_recipe(top)["model"]) == (3, "HUB/MODEL")
    section = read_section([top], "prepare")
    assert (section["tokenizer"], section["system"], section["hold_out"]) == ("HUB/CHAT", "", 9)
    last = written("last", {"average": {"format": "mcore"}})
    assert read_section([top, last], "average")["format"] == "mcore"
    assert read_section([top, last], "average")["steps"] == "1,2"
    circle = written("circle", {"base": ["low.yaml", "circle.yaml"]})
    with pytest.raises(ValueError, match="recipes name each other as base"):
        read_recipe(circle)


def test_a_key_is_one_key_with_dashes_or_underscores(written):
    written("low", {"too_long": "drop", "to-hf": {"dtype": "bf16", "max-sequence-length": 64}, "output": "r"})
    written("middle", {"base": "low.yaml", "too-long": "cut"})
    top = written("top", {"base": "middle.yaml", "too_long": "truncate", "to_hf": {"dtype": "source"}})
    assert read_section([top], "to_hf") == {
        "checkpoint": "r", "output": "r/final", "dtype": "source", "max_sequence_length": 64,
    }  # fmt: skip
    assert parse_run([str(top)]).too_long == "truncate"


def test_data_are_prepared_into_the_directory_whatever_weight_it_has(written):
    assert (
        read_section([written("one", RECIPE | {"data": "runs/one/data:0.5"})], "prepare")["output"] == "runs/one/data"
    )


def test_a_section_that_is_not_there_is_named(written):
    path = written("one", {"model": "M", "average": {"steps": 1}})
    with pytest.raises(ValueError, match=r"one.yaml has no section `prepare:` .*; its sections: average$"):
        read_section([path], "prepare")
    with pytest.raises(EvaluationError, match="no section `evaluate:`"):
        read_options([str(path)])
    with pytest.raises(ValueError, match="unknown recipe key averag; the nearest is average"):
        parse_run([str(written("two", {"averag": {}}))])
    (path.parent / "latin.yaml").write_bytes("model: é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.yaml is not UTF-8 \(byte 7\)"):
        read_recipe(path.parent / "latin.yaml")


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"averge": {}}, "has no section `average:`"),
        ({"average": {"step": 3}}, "unknown recipe key average.step; the nearest is average.steps"),
        (
            {"average": {"steps": [1, 2], "format": "hff"}},
            "recipe key average.format is 'hff'; choose one of mcore, hf",
        ),
        ({"average": {"steps": [1, 2]}}, "runs/none/checkpoints has no step 1, 2; steps that exist: none"),
    ],
)
def test_a_script_names_what_is_wrong_in_its_section(written, capsys, section, sentence):
    recipe = written("one", {"output": "runs/none", **section})
    assert run_script(average_steps.main, [str(recipe)], section="average") == 2
    assert sentence in capsys.readouterr().err


def test_flags_win_over_the_section(written, capsys):
    recipe = str(written("one", RECIPE))
    assert run_script(average_steps.main, [recipe, "--steps", "5", "--run", "R"], section="average") == 2
    assert capsys.readouterr().err == "error: R/checkpoints has no step 5; steps that exist: none\n"
    assert run_script(mcore_to_hf.main, [recipe, "--max-sequence-length", "0"], section="to_hf") == 2
    assert "--max-sequence-length 0" in capsys.readouterr().err


def test_files_stand_before_the_first_flag():
    assert take_files(["a.yaml", "b.yaml", "--c", "d.yaml"]) == ([Path("a.yaml"), Path("b.yaml")], ["--c", "d.yaml"])
    assert take_files([]) == ([], [])
