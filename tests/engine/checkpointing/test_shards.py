"""Optimizer state written where it lies: boxes of flat runs, every layout to every other, and what a save holds."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed

from data.index import write_index
from engine.checkpointing.boxes import Box, boxes_of_run, flat_start, place_of
from engine.checkpointing.directory import STATE
from engine.checkpointing.store_reader import StoreReader
from engine.cli import parse_run
from engine.mesh import build_mesh
from engine.prepare import prepare_run
from engine.run_folder import RunFolder
from engine.trainer import Trainer
from tests.engine.checkpointing.test_resume import run
from tests.support.marks import slow
from tests.support.tiny import VOCABULARY, conversations, save_model

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@given(SHAPES, st.data())
def test_a_run_of_elements_is_a_few_boxes(shape, data):
    array = np.arange(math.prod(shape)).reshape(shape)
    start = data.draw(st.integers(0, array.size))
    stop = data.draw(st.integers(start, array.size))
    boxes = list(boxes_of_run(shape, start, stop))
    found = [number for box in boxes for number in array[box.slices].reshape(-1)]
    assert found == list(range(start, stop)) and len(boxes) <= 2 * len(shape) - 1
    for box in boxes:
        assert place_of(shape, flat_start(shape, box.offsets)) == box.offsets


def test_boxes_cut_each_other():
    assert Box((0, 2), (4, 4)).cut(Box((3, 0), (5, 3))) == Box((3, 2), (1, 1))
    assert Box((0, 2), (4, 4)).cut(Box((4, 0), (5, 3))) is None


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    save_model("qwen2_tied", folder / "dense", layers=4)
    save_model("gpt_oss", folder / "experts", layers=2)
    write_index(folder / "data", conversations(24).documents, vocab_size=VOCABULARY)
    return folder


def arguments(inputs: Path, model: str, output: Path, steps: int, *extra: str) -> list[str]:
    paths = ["--model", inputs / model, "--data", inputs / "data", "--output", output, "--steps", steps]
    shape = "--seq-len 96 --global-batch-size 4 --pad-documents-to 4 --overlap on --bucket-size 2000"
    rates = "--optim.lr 1e-2 --optim.schedule constant"
    return [*map(str, paths), *shape.split(), *rates.split(), *extra]


def load_and_save(arguments: list[str], output: str) -> tuple[int, int, int]:
    """Resumes and saves at once into another run; returns bytes of this rank's state, of its file, and that it read."""
    read: list[int] = []
    original = StoreReader.read_into

    def counted(self, key, offsets, out):
        read.append(out.numel() * self.dtype(key).itemsize)
        original(self, key, offsets, out)

    config = parse_run(arguments)
    prepared = prepare_run(config, world_size=distributed.get_world_size(), cuda=False)
    mesh = build_mesh(config.layout)
    StoreReader.read_into = counted
    try:
        trainer = Trainer(prepared, mesh)
    finally:
        StoreReader.read_into = original
    other = RunFolder(output)
    if mesh.rank == 0:
        shutil.copytree(prepared.run.model_files, other.model_files)
    distributed.barrier()
    trainer.saver._run = other
    trainer.start_save()
    trainer.saver.finish()
    held = sum(tensor.nbytes for shard in trainer.saver._shards for _, tensor in shard.tensors() if shard.written)
    size = trainer.saver._image.size
    trainer.saver.close()
    return held, size, sum(read)


def all_tensors(output: Path, step: int) -> dict[str, torch.Tensor]:
    store = StoreReader(RunFolder(output).checkpoint(step) / STATE)
    return {key: store.read(key) for key in store.keys()}  # noqa: SIM118  (no dict)


LAYOUTS = {
    "dense": ("", "--tp 2 --pp 2", "--cp 2", "--pp 2 --vpp 2"),
    "experts": ("--ep 2 --tp 2", "--etp 2 --tp 2", "--ep 2"),
}


@pytest.mark.parametrize(
    ("precision", "model"),
    [
        ("bf16", "dense"),
        ("fp32", "experts"),
        slow("fp32", "dense"),
        slow("bf16", "experts"),
    ],
)
def test_every_layout_gives_back_the_same_bits(pool, inputs, tmp_path, model, precision):
    """A chain through all layouts, each of which loads what the one before it wrote; buckets are small and padded."""
    output = tmp_path / "run"
    flags = ("--precision", precision)
    pool.run(run, 2, arguments(inputs, model, output, 2, *flags))
    wanted = all_tensors(output, 2)
    masters = [key for key in wanted if key.startswith("optimizer.state.param.")]
    assert bool(masters) == (precision == "bf16")
    for key in masters:  # weights are the rounded master weights, whichever bucket they are in
        assert torch.equal(wanted[key].bfloat16(), wanted[key.removeprefix("optimizer.state.param.")])
    for number, layout in enumerate(LAYOUTS[model]):
        given = arguments(inputs, model, output, 9, *flags, *layout.split())
        for held, size, read in pool.run(load_and_save, 4, given, str(tmp_path / f"run{number}")):
            assert held <= size <= held + 2500 * 400  # what stands around the data, and nothing else
            assert read < 1.7 * sum(tensor.nbytes for tensor in wanted.values()) / 2
        output = tmp_path / f"run{number}"
        found = all_tensors(output, 2)
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert torch.equal(found[key], tensor), (layout, key)
        (output / "config.yaml").write_text("{}")


def test_loading_reads_each_byte_once(pool, inputs, tmp_path):
    output = tmp_path / "run"
    pool.run(run, 2, arguments(inputs, "dense", output, 1, "--precision", "bf16"))
    total = sum(tensor.nbytes for tensor in all_tensors(output, 1).values())
    given = arguments(inputs, "dense", output, 9, "--precision", "bf16")
    results = pool.run(load_and_save, 4, given, str(tmp_path / "other"))
    assert sum(read for _, _, read in results) == total
    assert max(held for held, _, _ in results) < 1.2 * total / 4 + 64 * 2**10


def test_three_ranks_and_two_give_each_other_the_same_bits(pool, inputs, tmp_path):
    output = tmp_path / "run"
    pool.run(run, 3, arguments(inputs, "dense", output, 2, "--precision", "bf16"))
    wanted = all_tensors(output, 2)
    for number, ranks in enumerate((2, 3)):
        given = arguments(inputs, "dense", output, 9, "--precision", "bf16")
        pool.run(load_and_save, ranks, given, str(tmp_path / f"run{number}"))
        output = tmp_path / f"run{number}"
        found = all_tensors(output, 2)
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
        (output / "config.yaml").write_text("{}")
