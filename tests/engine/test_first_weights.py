"""Master weights are the base model's own numbers, under every layout; a run at rate 0 changes nothing."""

from __future__ import annotations

import random

import pytest
import torch

from checkpoint_tools.mcore_to_hf import main as to_hf
from data.index import write_index
from engine.checkpointing.directory import STATE
from engine.checkpointing.store_reader import StoreReader
from engine.run_folder import RunFolder
from models.conversion.hf_reader import HFReader
from models.hf_config import describe
from models.model_directory import open_reader, read_shard
from tests.engine.checkpointing.test_resume import run
from tests.support.tiny import MODELS, VOCABULARY, conversations, save_model


@pytest.mark.parametrize("name", MODELS)
def test_any_box_of_a_weight_can_be_read(tmp_path, name):
    """Boxes as data-parallel ranks have them: parts of rows, odd columns, rows of padding."""
    description = describe(save_model(name, tmp_path / "model", layers=2))
    reader, drawn = open_reader(tmp_path / "model", description), random.Random(1)
    for rule in description.rules:
        whole = rule.read(reader)
        for _ in range(4):
            offsets = [drawn.randrange(size) for size in rule.shape]
            lengths = [drawn.randint(1, size - offset) for size, offset in zip(rule.shape, offsets, strict=True)]
            part = read_shard(description, reader, rule.key, offsets, lengths)
            index = tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))
            assert torch.equal(part, whole[index]), (rule.key, offsets, lengths)


def arguments(model, data, output, *extra: str) -> list[str]:
    flags = "--seq-len 96 --global-batch-size 4 --steps 1 --precision bf16 --optim.lr 0 --optim.schedule constant"
    return ["--model", str(model), "--data", str(data), "--output", str(output), *flags.split(), *extra]


def exported(checkpoint, folder, *extra) -> dict[str, torch.Tensor]:
    to_hf(checkpoint=checkpoint, output=folder, num_workers=1, **dict(extra))
    reader = HFReader(folder)
    return {name: reader.read(name) for name in reader.names()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("name", "ranks", "layout"),
    [
        ("olmo2", 1, ""),
        ("llama", 2, "--overlap on --bucket-size 2000"),
        ("qwen2_tied", 2, "--tp 2"),
        ("gpt_oss", 2, "--ep 2"),
        ("gpt_oss", 2, "--tp 2 --moe.freeze-router"),
    ],
)
def test_a_run_at_rate_0_gives_back_the_files(pool, tmp_path, dtype, name, ranks, layout):
    if name == "gpt_oss" and dtype == torch.float16:
        pytest.skip("one family with experts is enough")
    model = save_model(name, tmp_path / "model", layers=2, dtype=dtype)
    write_index(tmp_path / "data", conversations(8).documents, vocab_size=VOCABULARY)
    output = tmp_path / "run"
    pool.run(run, ranks, arguments(model, tmp_path / "data", output, *layout.split()))
    reader, found = HFReader(model), exported(RunFolder(output).checkpoint(1), tmp_path / "hf")
    assert found.keys() == set(reader.names())
    for key, tensor in found.items():
        assert tensor.dtype == dtype and torch.equal(tensor, reader.read(key)), key
    # A checkpoint as base model brings its master weights along.
    pool.run(run, 1, arguments(RunFolder(output).checkpoint(1), tmp_path / "data", tmp_path / "next"))
    one, other = (StoreReader(RunFolder(place).checkpoint(1) / STATE) for place in (output, tmp_path / "next"))
    held = [key for key in one.keys() if ".exp_avg" not in key]  # noqa: SIM118  (no dict)
    assert len(held) > 20 and [key for key in held if not torch.equal(one.read(key), other.read(key))] == []
