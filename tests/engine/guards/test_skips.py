"""Steps that may be skipped are written down, counted, and the same after a resume."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from engine import trainer as training
from engine.checkpointing.directory import find_latest
from engine.optim import Update, update
from engine.trainer import Trainer
from tests.engine.checkpointing.test_resume import metrics, tensors
from tests.engine.test_failures import outcome
from tests.support.tiny import save_model, write_documents


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_model("qwen2_tied", folder / "model", layers=2)
    write_documents(folder / "data", 14)
    return folder


def arguments(inputs: Path, output: Path, *extra: str) -> list[str]:
    fixed = ["--model", inputs / "model", "--data", inputs / "data", "--output", output, "--precision", "fp32"]
    shape = "--seq-len 96 --global-batch-size 4 --steps 6 --optim.lr 1e-2 --on-bad-step skip"
    return [*map(str, fixed), *shape.split(), *extra]


def poisoned(arguments: list[str], bad: tuple[int, ...], stop_at: int = 0) -> str:
    """Trains with gradients that are not finite in the steps `bad`; a signal comes within step `stop_at`."""
    step = Trainer.train_step

    def not_finite(optimizer, **options):
        return Update(float("nan"), applied=False)

    def train_step(trainer: Trainer):
        training.update = not_finite if trainer.step + 1 in bad else update
        if trainer.step + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer)

    Trainer.train_step = train_step
    try:
        return outcome(arguments)
    finally:
        Trainer.train_step, training.update = step, update


def test_skipped_steps_are_written_down_and_exact_on_resume(pool, inputs, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert pool.run(poisoned, 2, arguments(inputs, whole), (2, 5)) == ["", ""]
    lines = [json.loads(line) for line in (whole / "skipped.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 5]
    assert lines[0]["reason"] == "the gradient's norm is nan" and lines[0]["suspects"] == []
    assert len(lines[0]["documents"]) == 4 and all(str(inputs / "data") in name for name in lines[0]["documents"])
    assert [line["step"] for line in metrics(whole) if line.get("skipped")] == [2, 5]
    assert [line["loss"] is None for line in metrics(whole)] == [False, True, False, False, True, False]
    assert find_latest(whole).manifest["optimizer_step"] == 4

    assert pool.run(poisoned, 2, arguments(inputs, cut), (2, 5), 2) == ["", ""]  # stopped in a skipped step
    assert find_latest(cut).step == 2 and find_latest(cut).manifest["optimizer_step"] == 1
    (cut / "skipped.jsonl").open("a").write('{"step": 5, "reason": "of a run that was killed"}\n')
    assert pool.run(poisoned, 2, arguments(inputs, cut), (2, 5)) == ["", ""]
    assert metrics(cut) == metrics(whole)
    assert (cut / "skipped.jsonl").read_text() == (whole / "skipped.jsonl").read_text()
    expected = tensors(whole, 6)
    for key, found in tensors(cut, 6).items():
        assert torch.equal(found, expected[key]), key


def test_a_skipped_step_changes_no_weight(pool, inputs, tmp_path):
    output = tmp_path / "run"
    extra = ("--checkpoint.every", "1", "--checkpoint.keep", "0")
    assert pool.run(poisoned, 1, arguments(inputs, output, *extra), (3,)) == [""]
    before, after, later = (tensors(output, step) for step in (2, 3, 4))
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert any(not torch.equal(after[key], later[key]) for key in after)


@pytest.mark.parametrize(
    ("bad", "extra", "skipped", "step"),
    [((1, 3), ("--guard.max-skips", "1"), "1", 3), ((2, 3, 4, 5), (), "2, 3, 4", 5)],
)
def test_limits_end_a_run_and_go_on_doing_so(pool, inputs, tmp_path, bad, extra, skipped, step):
    """So many in all, and three in a row."""
    flags = arguments(inputs, tmp_path / "run", *extra)
    for _ in range(2):  # a resume knows what was skipped before it
        found = pool.run(poisoned, 2, flags, bad)
        assert len(set(found)) == 1
        assert found[0].startswith(f"FloatingPointError: step {step}: the gradient's norm is nan")
        assert found[0].endswith(f"; skipped before: {skipped}")
        assert find_latest(tmp_path / "run").step == step - 1
