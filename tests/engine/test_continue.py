"""What a second start may change, what it is refused, and what a run that stops leaves behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from data.index import DocumentIndex, write_index
from engine import trainer as training
from engine.checkpointing.resume_point import find_resume_point
from engine.cli import parse_run
from engine.optim import Update, update
from engine.prepare import prepare_run
from engine.run_folder import RunFolder
from tests.engine.checkpointing.test_resume import metrics
from tests.engine.test_failures import arguments, outcome, refusal
from tests.support.marks import slow
from tests.support.tiny import VOCABULARY, conversations, make_inputs

SAVE = ("--checkpoint.every", "1")


@pytest.fixture
def inputs(tmp_path):
    return make_inputs(tmp_path)


def second(inputs: Path, output: Path, *extra: str) -> str:
    """The sentence that refuses to continue the run in `output`."""
    with pytest.raises(ValueError) as caught:
        prepare_run(parse_run(arguments(inputs, output, *extra)), world_size=1, cuda=False)
    return str(caught.value)


def test_a_run_continues_from_itself_alone(pool, inputs):
    """Weights, config and tokenizer of a resumed run come from its checkpoint; what differs is refused."""
    output = inputs / "run"
    assert pool.run(outcome, 1, arguments(inputs, output)) == [""]
    sentence = second(inputs, output, "--steps", "3", "--override.rope-theta", "5000")
    assert "differs from the model of the run" in sentence and "rope" in sentence
    shutil.rmtree(inputs / "model")
    assert pool.run(outcome, 1, arguments(inputs, output, "--steps", "3")) == [""]
    assert find_resume_point(output).step == 3


def test_a_new_start_sets_the_earlier_run_aside(pool, inputs):
    """All of it, also when one of its exports is the model that the new one starts from."""
    output = inputs / "run"
    export = (*SAVE, "--checkpoint.export-hf")
    assert pool.run(outcome, 1, arguments(inputs, output, *export, "--steps", "3")) == [""]
    first = metrics(output)
    (output / "hf" / "step_000004.tmp").mkdir()
    (output / "job.out").write_text("kept")
    model = ("--model", str(output / "hf" / "step_000003"))
    anew = arguments(
        inputs, output, *export, "--steps", "1", "--checkpoint.no-resume", "--checkpoint.keep", "1", *model
    )
    assert pool.run(outcome, 1, anew) == [""]
    assert find_resume_point(output).step == 1 and [line["step"] for line in metrics(output)] == [1]
    for folder in ("checkpoints", "hf"):
        assert [path.name for path in (output / folder).glob("step_*")] == ["step_000001"]
    aside = output / "earlier.1"
    assert metrics(aside) == first and find_resume_point(aside).step == 3
    exports = sorted((aside / "hf").iterdir())
    assert [path.name for path in exports] == ["step_000001", "step_000002", "step_000003"]
    names = {"config.yaml", "report.html", "tensorboard", "model_files", "status.json", "checkpoints", "hf"}
    assert {path.name for path in aside.iterdir()} == names | {"metrics.jsonl"}
    again = output / "checkpoints" / "step_000001" / "hf" / "config.json"
    assert again.read_bytes() == (exports[2] / "config.json").read_bytes()
    assert (output / "job.out").read_text() == "kept" and not list(output.rglob("*.tmp"))
    assert json.loads((aside / "status.json").read_text())["step"] == 3


def test_going_back_sets_aside_what_lies_beyond(pool, inputs):
    output = inputs / "run"
    flags = (*SAVE, "--optim.schedule", "constant")
    assert pool.run(outcome, 1, arguments(inputs, output, *flags, "--steps", "5", "--checkpoint.export-hf")) == [""]
    whole = metrics(output)
    assert "holds no checkpoint of that step; it has steps 1, 2, 3, 4, 5" in second(
        inputs, output, "--checkpoint.resume-from", "9"
    )
    back = ("--checkpoint.resume-from", "2", "--checkpoint.keep", "2", "--steps", "4")
    assert pool.run(outcome, 1, arguments(inputs, output, *flags, *back)) == [""]
    run = RunFolder(output)
    assert find_resume_point(output).step == 4 and list(run.checkpoint_steps()) == [3, 4]
    assert metrics(output) == whole[:4]
    aside = output / "beyond.1"
    assert sorted(path.name for path in (aside / "checkpoints").iterdir()) == [f"step_{n:06d}" for n in (3, 4, 5)]
    assert len(list((aside / "hf").iterdir())) == 3 and metrics(aside) == whole[2:]
    assert "one was moved to" in second(inputs, output, "--checkpoint.resume-from", "5")
    run.latest.write_text("step_000003\n")  # by hand
    assert pool.run(outcome, 1, arguments(inputs, output, *flags, "--steps", "5")) == [""]
    assert metrics(output) == whole and find_resume_point(output).step == 5
    assert [path.name for path in (output / "beyond.2" / "checkpoints").iterdir()] == ["step_000004"]


def test_a_lost_latest_never_begins_anew(pool, inputs):
    output = inputs / "run"
    assert pool.run(outcome, 1, arguments(inputs, output, *SAVE)) == [""]
    latest = RunFolder(output).latest
    latest.unlink()
    sentence = second(inputs, output)
    assert "latest is missing" in sentence and "--checkpoint.resume-from 2" in sentence
    # A process that is killed between the two moves of a save has left its promise.
    latest.with_name("latest.tmp").write_text("step_000002\n")
    assert pool.run(outcome, 1, arguments(inputs, output, "--steps", "3")) == [""]
    assert [line["step"] for line in metrics(output)] == [1, 2, 3] and not list(output.glob("beyond.*"))


def test_a_checkpoint_without_optimizer_is_no_place_to_resume(inputs):
    from checkpoint_tools import hf_to_mcore

    run = RunFolder(inputs / "run")
    run.checkpoints.mkdir(parents=True)
    hf_to_mcore.main(inputs / "model", run.checkpoint(7), 1)
    run.latest.write_text("step_000007\n")
    sentence = second(inputs, run.path)
    assert "has no optimizer state and no place in the data" in sentence
    assert f"start a new run from it with --model {run.checkpoint(7)}" in sentence


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_at_its_end_is_done(pool, inputs, ranks):
    """Without a model, also where a kill came between the last save and the end."""
    output = inputs / "run"
    assert pool.run(outcome, ranks, arguments(inputs, output)) == [""] * ranks
    run = RunFolder(output)
    run.report.unlink()
    run.unfinished.write_text("running, or killed\n")
    before = run.metrics.read_bytes()
    again = arguments(inputs, output, "--checkpoint.export-hf")
    assert pool.run(outcome, ranks, again) == [""] * ranks
    assert run.report.exists() and not run.unfinished.exists() and run.metrics.read_bytes() == before
    assert (run.export(2) / "model.safetensors").exists() and not run.lock.exists()
    assert json.loads(run.status.read_text())["state"] == "done"


def stop_at_second_step(arguments: list[str]) -> str:
    """Trains with a gradient that is not finite from the second step on."""
    calls: list[int] = []

    def poisoned(optimizer, **options):
        calls.append(1)
        return update(optimizer, **options) if len(calls) == 1 else Update(float("nan"), applied=False)

    training.update = poisoned
    try:
        return outcome(arguments)
    finally:
        training.update = update


@pytest.mark.parametrize("ranks", [slow(1), 2])
def test_a_bad_gradient_names_all_samples_and_saves_the_step_before(pool, inputs, ranks):
    whole, output = inputs / "whole", inputs / "run"
    assert pool.run(outcome, ranks, arguments(inputs, whole, "--steps", "2")) == [""] * ranks
    found = pool.run(stop_at_second_step, ranks, arguments(inputs, output, "--steps", "2"))
    assert len(set(found)) == 1
    assert found[0].startswith("FloatingPointError: step 2: the gradient's norm is nan, the update was not made")
    assert found[0].count(f"{inputs / 'data'}:") == 4  # the whole batch, whichever rank it was on
    assert find_resume_point(output).step == 1
    assert (output / "report.html").exists() and "nan" in (output / "unfinished").read_text()
    assert pool.run(outcome, ranks, arguments(inputs, output, "--steps", "2")) == [""] * ranks
    assert metrics(output) == metrics(whole)


def test_data_that_does_not_belong(inputs, tmp_path):
    write_index(tmp_path / "large", conversations(4).documents, vocab_size=VOCABULARY + 1)
    sentence = refusal(inputs, tmp_path / "run", "--data", str(tmp_path / "large"))
    assert "a vocabulary of 132 tokens and the model has 131" in sentence
    for name, template in (("one", "a"), ("two", "b")):
        meta = {"chat_template": template}
        write_index(tmp_path / name, conversations(4).documents, vocab_size=VOCABULARY, meta=meta)
    sentence = refusal(inputs, tmp_path / "run", "--data", str(tmp_path / "one"), str(tmp_path / "two"))
    assert "different chat templates" in sentence
    (tmp_path / "one" / "meta.json").write_text("{}")
    with pytest.raises(ValueError, match=r"one: meta.json is damaged"):
        DocumentIndex(tmp_path / "one")


def test_wandb_that_is_missing_is_said_before_anything_starts(inputs, tmp_path):
    assert "--log.wandb needs Weights & Biases" in refusal(inputs, tmp_path / "run", "--log.wandb")


def test_a_checkpoint_as_base_model_brings_its_master_weights(pool, inputs):
    first = inputs / "first"
    bf16 = arguments(inputs, first, "--precision", "bf16", "--optim.schedule", "constant", "--steps", "1")
    assert pool.run(outcome, 1, bf16) == [""]
    again = [*arguments(inputs, inputs / "second"), "--model", str(RunFolder(first).checkpoint(1)), "--optim.lr", "0"]
    assert pool.run(outcome, 1, [*again, "--steps", "1"]) == [""]
    from engine.checkpointing.store_reader import StoreReader

    stores = [StoreReader(RunFolder(inputs / name).checkpoint(1) / "state") for name in ("first", "second")]
    for key in ("decoder.final_layernorm.weight", "decoder.layers.1.mlp.linear_fc1.weight"):
        master = stores[0].read(f"optimizer.state.param.{key}")
        assert torch.equal(stores[1].read(key), master)
        assert not torch.equal(stores[0].read(key).float(), master)
