"""Steps whose loss or gradient is not finite: skipped as asked, written down, and exact on resume."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from engine import trainer as training
from engine.cli import parse_run
from engine.guards.skips import SkippedSteps
from tests.engine.checkpointing.test_resume import metrics, tensors
from tests.engine.test_failures import arguments, outcome, refusal
from tests.support.marks import slow
from tests.support.tiny import make_inputs

SKIP = ("--on-bad-step", "skip", "--steps", "6", "--checkpoint.every", "2", "--optim.lr", "1e-2")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def test_how_many_steps_may_be_skipped():
    skipped = SkippedSteps(4, [])
    for step in (3, 4, 5):
        assert skipped.may_skip(step)
        skipped.steps.append(step)
    assert not skipped.may_skip(6)  # a fourth in a row
    assert skipped.may_skip(7)
    skipped.steps.append(7)
    assert not skipped.may_skip(20)  # a fifth in all
    assert skipped.account() == "; skipped before: 3, 4, 5, 7"
    assert not SkippedSteps(0, []).may_skip(1) and SkippedSteps(0, []).account() == ""


def poisoned(arguments: list[str], gradients: tuple[int, ...], losses: tuple[int, ...] = (), first: int = 1) -> str:
    """Trains; in these steps one gradient of the last rank, or the loss, is not finite. Steps count from first."""
    run, step = training.run_microbatches, first - 1

    def poison(chunks, microbatches, mesh, *, forward_only: bool = False, **options):
        nonlocal step
        totals = run(chunks, microbatches, mesh, forward_only=forward_only, **options)
        if forward_only:
            return totals
        step += 1
        if step in gradients and mesh.rank == mesh.world_size - 1:
            for buffer in chunks[0].buffers:
                for bucket in buffer.buckets:  # all of it: which part is this rank's own does not matter
                    bucket.grad_data.fill_(math.nan)
        return dataclasses.replace(totals, loss_sum=math.nan) if step in losses else totals

    training.run_microbatches = poison
    try:
        return outcome(arguments)
    finally:
        training.run_microbatches = run


def back_to(output: Path, copy: Path, step: int) -> Path:
    """Makes `copy` what `output` looked like after it was killed somewhere behind `step`."""
    shutil.copytree(output, copy)
    for directory in (copy / "checkpoints").glob("step_*"):
        if int(directory.name.removeprefix("step_")) > step:
            shutil.rmtree(directory)
    (copy / "checkpoints" / "latest").write_text(f"step_{step:06d}\n")
    return copy


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


BUCKETS = "--overlap on --bucket-size 2000 --precision bf16"


@pytest.mark.parametrize(
    ("ranks", "layout"), [(2, BUCKETS), slow(2, "--tp 2"), slow(2, "--pp 2"), slow(1, "--optim.moments bf16")]
)
def test_a_skipped_step_changes_nothing_and_resumes_exactly(pool, inputs, tmp_path, ranks, layout):
    flags = (*SKIP, "--checkpoint.every", "1", *layout.split())
    whole = tmp_path / "whole"
    assert pool.run(poisoned, ranks, arguments(inputs, whole, *flags), (3,), (5,)) == [""] * ranks
    for before, after in ((2, 3), (4, 5)):
        assert equal(tensors(whole, before), tensors(whole, after))  # weights, masters and moments
    assert not equal(tensors(whole, 5), tensors(whole, 6))
    lines = metrics(whole)
    assert [line.get("skipped", False) for line in lines] == [False, False, True, False, True, False]
    assert lines[2]["loss"] is None and lines[2]["grad_norm"] is None and lines[2]["tokens"] > 0
    skipped = [json.loads(line) for line in (whole / "skipped.jsonl").read_text().splitlines()]
    assert [(line["step"], line["reason"]) for line in skipped] == [
        (3, "the gradient's norm is nan"),
        (5, "the loss is not finite"),
    ]
    assert [len(line["documents"]) for line in skipped] == [2, 4]  # an epoch's last batch is short
    assert all(document.startswith(f"{inputs / 'data'}:") for line in skipped for document in line["documents"])
    # Killed after the first skip, and before it: both go on to the same end.
    for step, again in ((4, ((), (5,))), (2, ((3,), (5,)))):
        cut = back_to(whole, tmp_path / f"cut_{step}", step)
        assert pool.run(poisoned, ranks, arguments(inputs, cut, *flags), *again, step + 1) == [""] * ranks
        assert metrics(cut) == lines
        assert (cut / "skipped.jsonl").read_text() == (whole / "skipped.jsonl").read_text()
        assert equal(tensors(cut, 6), tensors(whole, 6))


def test_too_many_skips_stop_the_run(pool, inputs, tmp_path):
    """Also when some of them lie before a resume."""
    flags = arguments(inputs, tmp_path / "run", *SKIP, "--guard.max-skips", "1", "--steps", "4")
    found = pool.run(poisoned, 2, flags, (2, 4))
    assert found[0] == found[1]
    assert found[0].startswith("FloatingPointError: step 4: the gradient's norm is nan, the update was not made")
    assert found[0].endswith("; skipped before: 2")
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]
    (again,) = set(pool.run(poisoned, 2, flags, (4,), (), 4))
    assert again == found[0]


def test_guards_that_cannot_be_meant(inputs, tmp_path):
    run = tmp_path / "run"
    assert "--guard.max-skips -1 must be 0 or more" in refusal(inputs, run, "--guard.max-skips", "-1")
    assert "--guard.patience -2.0 must be 0 or more" in refusal(inputs, run, "--guard.patience", "-2")
    assert "--guard.spike 0.5 must be above 1, or 0" in refusal(inputs, run, "--guard.spike", "0.5")
    assert parse_run(arguments(inputs, run)).on_bad_step == "stop"
