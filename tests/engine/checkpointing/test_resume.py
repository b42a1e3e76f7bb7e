"""An interrupted run continues as if it had not been interrupted, under its own or another layout."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data.index import write_index
from engine.checkpointing.directory import STATE
from engine.checkpointing.resume_point import find_resume_point
from engine.checkpointing.store_reader import StoreReader
from engine.cli import parse_run
from engine.layout import world_from_environment
from engine.prepare import prepare_run
from engine.reporting.metrics import MEASURED
from engine.run_folder import RunFolder
from engine.train import train
from models.conversion.hf_reader import HFReader
from tests.support.marks import slow
from tests.support.tiny import VOCABULARY, conversations, save_model

LENGTHS = {"conversations": 9, "sequences": 9}
# At a higher rate tokens near the border between two experts change sides by the last digits of a sum.
EXPERT_FLAGS = ("--precision", "fp32", "--moe.aux-loss", "0.01", "--optim.lr", "1e-3")


def run(arguments: list[str], environment: dict[str, str] | None = None) -> None:
    """Trains in this process of a pool; all ranks call it."""
    os.environ.update(environment or {})
    config = parse_run(arguments)
    train(prepare_run(config, world_size=world_from_environment()[1], cuda=False))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model and two data directories of 14 and 9 documents."""
    folder = tmp_path_factory.mktemp("inputs")
    save_model("qwen2_tied", folder / "model", layers=4)
    for name, count, seed in (("first", 14, 1), ("second", 9, 2), ("held_out", 6, 3)):
        write_index(folder / name, conversations(count, seed).documents, vocab_size=VOCABULARY)
    return folder


def arguments(inputs: Path, output: Path, *extra: str) -> list[str]:
    base = ["--model", inputs / "model", "--output", output, "--data", inputs / "first", f"{inputs / 'second'}:0.5"]
    base += ["--valid", inputs / "held_out", "--valid-every", "4"]
    shape = "--seq-len 96 --global-batch-size 4 --steps 9 --pad-documents-to 4 --checkpoint.every 3"
    shape += " --overlap on --bucket-size 2000"
    rates = "--optim.lr 1e-2 --optim.schedule linear --optim.warmup-steps 2 --optim.weight-decay 0.1"
    return [*map(str, base), *shape.split(), *rates.split(), *extra]


def metrics(output: Path) -> list[dict]:
    """The lines of metrics.jsonl without what a clock or memory decides."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def tensors(output: Path, step: int) -> dict[str, torch.Tensor]:
    """Everything a checkpoint holds: weights and optimizer state by key."""
    store = StoreReader(RunFolder(output).checkpoint(step) / STATE)
    return {key: store.read(key) for key in store.keys()}  # noqa: SIM118  (no dict)


def interrupt(output: Path, copy: Path, step: int) -> None:
    """Makes `copy` what a run looked like that was killed in the save after `step`, before that got its name."""
    shutil.copytree(output, copy)
    for directory in (copy / "checkpoints").glob("step_*"):
        if int(directory.name.removeprefix("step_")) > step + 3:
            shutil.rmtree(directory)
        elif int(directory.name.removeprefix("step_")) > step:
            directory.rename(directory.with_name(directory.name + ".tmp"))
    (copy / "checkpoints" / "latest").write_text(f"step_{step:06d}\n")
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "los')  # cut off in the middle of a line


@pytest.mark.parametrize(
    ("precision", "unit"),
    [
        ("fp32", "conversations"),
        ("bf16", "sequences"),
        slow("fp32", "sequences"),
        slow("bf16", "conversations"),
    ],
)
def test_resume_is_bitwise(pool, inputs, tmp_path, unit, precision):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    extra = ("--batch-unit", unit, "--precision", precision, "--tp", "2")
    if unit == "sequences":
        extra += ("--global-batch-size", "2")
    pool.run(run, 2, arguments(inputs, whole, *extra))
    expected = metrics(whole)
    assert [line["step"] for line in expected] == list(range(1, 10))
    for step in (3, 6):  # 18.5 documents an epoch: mid-epoch and beyond the first epoch's end
        shutil.rmtree(cut, ignore_errors=True)
        interrupt(whole, cut, step)
        pool.run(run, 2, arguments(inputs, cut, *extra))
        assert metrics(cut) == expected
        found, wanted = tensors(cut, 9), tensors(whole, 9)
        assert found.keys() == wanted.keys() and any(key.startswith("optimizer.state.exp_avg") for key in wanted)
        for key, tensor in wanted.items():
            assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, ""),
        (2, "--cp 2"),
        (2, "--pp 2 --vpp 2"),
        slow(2, "--pp 2"),
        slow(2, ""),
        slow(4, "--tp 4"),
        slow(4, "--tp 2 --sp off"),
    ],
)
def test_resume_under_another_layout(pool, inputs, tmp_path, ranks, layout):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    extra = ("--precision", "fp32")
    pool.run(run, 2, arguments(inputs, whole, *extra, "--tp", "2"))
    interrupt(whole, cut, 3)
    pool.run(run, ranks, arguments(inputs, cut, *extra, *layout.split()))
    found, wanted = metrics(cut), metrics(whole)
    for key in ("tokens", "supervised_tokens", "lr"):
        assert [line[key] for line in found] == [line[key] for line in wanted]
    assert [line["step"] for line in wanted if "valid_loss" in line] == [4, 8, 9]
    np.testing.assert_allclose(*([line.get("valid_loss", 0) for line in run] for run in (found, wanted)), rtol=1e-5)
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
        np.testing.assert_allclose([f[key] for f in found], [w[key] for w in wanted], rtol=tolerance)


@pytest.fixture(scope="module")
def experts_run(pool, inputs, tmp_path_factory):
    """A run of a model with biased experts, sinks and windows, its routers balanced."""
    save_model("gpt_oss", inputs / "experts")
    output = tmp_path_factory.mktemp("experts") / "whole"
    pool.run(run, 2, arguments(inputs, output, *EXPERT_FLAGS, "--model", str(inputs / "experts"), "--ep", "2"))
    return output


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, "--ep 2"),
        (4, "--ep 2 --etp 2 --tp 2"),
        slow(1, ""),
        slow(4, "--ep 4"),
        slow(4, "--ep 2 --pp 2 --pp-layout 3,1"),
    ],
)
def test_experts_resume_under_every_split(pool, inputs, experts_run, tmp_path, ranks, layout):
    cut = tmp_path / "cut"
    interrupt(experts_run, cut, 3)
    given = arguments(inputs, cut, *EXPERT_FLAGS, "--model", str(inputs / "experts"), *layout.split())
    pool.run(run, ranks, given)
    found, wanted = metrics(cut), metrics(experts_run)
    if layout == "--ep 2":
        assert found == wanted
        states = tensors(cut, 9), tensors(experts_run, 9)
        assert all(torch.equal(states[0][key], tensor) for key, tensor in states[1].items())
    assert len(found[-1]["tokens_per_expert"]) == 8 and len(found[-1]["expert_imbalance"]) == 4
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("aux_loss", 1e-4)):
        np.testing.assert_allclose([f[key] for f in found], [w[key] for w in wanted], rtol=tolerance)


def test_a_router_stays_frozen_or_free(pool, inputs, experts_run, tmp_path):
    cut = tmp_path / "cut"
    interrupt(experts_run, cut, 3)
    given = arguments(inputs, cut, *EXPERT_FLAGS, "--model", str(inputs / "experts"), "--moe.freeze-router")
    with pytest.raises(RuntimeError, match="--moe.freeze-router was not given when the run"):
        pool.run(run, 1, given)
    frozen = tmp_path / "frozen"
    given = arguments(inputs, frozen, "--model", str(inputs / "experts"), "--moe.freeze-router", "--ep", "2")
    pool.run(run, 2, given)
    first, last = tensors(frozen, 3), tensors(frozen, 9)
    routers = [key for key in last if ".router." in key]
    states = [key for key in routers if key.startswith("optimizer")]
    assert states and all(key.startswith("optimizer.state.param.") for key in states)  # no moments
    source = HFReader(inputs / "experts")
    for number in range(4):
        kept, key = (
            source.read(f"model.layers.{number}.mlp.router.weight"),
            f"decoder.layers.{number}.mlp.router.weight",
        )
        assert torch.equal(last[key], kept.bfloat16()) and torch.equal(last[f"optimizer.state.param.{key}"], kept)
    experts = "decoder.layers.0.mlp.experts.linear_fc1.weight"
    assert not torch.equal(first[experts], last[experts])


def test_keep_and_latest(pool, inputs, tmp_path):
    output = tmp_path / "run"
    pool.run(run, 1, arguments(inputs, output, "--precision", "fp32", "--checkpoint.keep", "2"))
    assert sorted(path.name for path in (output / "checkpoints").glob("step_*")) == ["step_000006", "step_000009"]
    assert find_resume_point(output).step == 9


def test_resume_refuses_what_it_cannot_continue(pool, inputs, tmp_path):
    output = tmp_path / "run"
    pool.run(run, 1, arguments(inputs, output, "--precision", "fp32"))

    def refusal(*extra: str) -> str:
        with pytest.raises((ValueError, RuntimeError)) as caught:
            pool.run(run, 1, arguments(inputs, output, "--precision", "fp32", *extra))
        return str(caught.value)

    assert "--pad-documents-to 2: the run" in refusal("--pad-documents-to", "2")
    assert "--seq-len (was 96, is 192)" in refusal("--seq-len", "192")
    state = next((RunFolder(output).checkpoint(9) / STATE).glob("*.distcp"))
    state.write_bytes(state.read_bytes()[:-1])
    assert "is not a complete checkpoint" in refusal()
