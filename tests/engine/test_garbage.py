"""The garbage collector runs when it is told to, and no step leaves anything large to it."""

from __future__ import annotations

import gc
from unittest import mock

import pytest
import torch

from data.index import write_index
from engine.config import MoeConfig, OptimConfig
from engine.garbage import EVERY, collect, collected_by_hand
from engine.layout import Layout
from engine.optim import build_optimizer, update
from engine.step import run_microbatches, wrap_chunks
from models.backend import attention_kernel
from tests.engine.test_failures import arguments, outcome
from tests.support.tiny import VOCABULARY, conversations, make_inputs, save_model
from tests.support.training import make_loader, start


class Cycle:
    """Garbage that only the collector frees, and that says so."""

    freed = 0

    def __init__(self):
        self.itself = self

    def __del__(self):
        Cycle.freed += 1


def test_it_runs_when_it_is_told_to(monkeypatch):
    monkeypatch.setattr(Cycle, "freed", 0)
    assert gc.isenabled()
    kept = Cycle()
    with collected_by_hand():
        assert not gc.isenabled() and gc.get_freeze_count() > 1000
        Cycle()
        collected = [collect(step, pause=False) for step in range(1, EVERY)]
        assert not any(collected) and Cycle.freed == 0
        assert collect(EVERY, pause=False) and Cycle.freed == 1
        Cycle()
        assert collect(EVERY + 1, pause=True) and Cycle.freed == 2
    assert gc.isenabled() and gc.get_freeze_count() == 0 and Cycle.freed == 2
    assert kept.itself is kept


def test_it_is_left_as_it_was_where_a_run_fails():
    with pytest.raises(FloatingPointError), collected_by_hand():
        raise FloatingPointError
    assert gc.isenabled()


def tensors_in_cycles(folder, steps: int) -> list[str]:
    """The tensors that training steps left in cycles, which only the collector would have freed."""
    part = start(folder, Layout(), moe=MoeConfig(aux_loss=0.01), recompute="full")
    wrapped = wrap_chunks(part.chunks, part.mesh)
    optimizer = build_optimizer(OptimConfig(lr=1e-3, schedule="constant"), wrapped, part.mesh, bf16=False)
    loader = make_loader(conversations(30), part.mesh, {})
    kernel = attention_kernel("native", part.mesh.device, part.config.params_dtype, part.description)
    garbage: list[str] = []
    for step in range(steps):
        gc.collect()
        gc.disable()
        try:
            for chunk in wrapped:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            run_microbatches(wrapped, loader.next_step(), part.mesh, kernel=kernel)
            update(optimizer, lr=1e-3, clip_grad=1.0)
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            if step:  # the first one makes what stays
                garbage += [str(tuple(one.shape)) for one in gc.garbage if isinstance(one, torch.Tensor)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
    return garbage


@pytest.mark.parametrize("name", ["gpt_oss", "olmo3"])
def test_no_step_leaves_tensors_to_the_collector(pool, tmp_path, name):
    """With it off they would pile up, on a GPU to gigabytes, until it is run."""
    assert pool.run(tensors_in_cycles, 1, save_model(name, tmp_path / "model"), 3)[0] == []


def collections(argv: list[str]) -> list[tuple[int, bool, bool]]:
    """(step, whether it was a pause, whether the automatic collector was on) of each step of a run."""
    from engine import train as loop

    seen = []

    def noted(step: int, *, pause: bool) -> bool:
        seen.append((step, pause, gc.isenabled()))
        return collect(step, pause=pause)

    with mock.patch.object(loop, "collect", noted):
        failure = outcome(argv)
    assert not failure, failure
    return seen


def test_all_ranks_collect_at_saves_and_held_out_losses(pool, tmp_path):
    inputs = make_inputs(tmp_path)
    write_index(inputs / "valid", conversations(9, 7).documents, vocab_size=VOCABULARY)
    measured = ("--valid", str(inputs / "valid"), "--valid-every", "2")
    argv = arguments(inputs, inputs / "run", "--steps", "5", "--checkpoint.every", "3", *measured)
    first, second = pool.run(collections, 2, argv)
    assert (
        first == second == [(1, False, False), (2, True, False), (3, True, False), (4, True, False), (5, True, False)]
    )
    assert gc.isenabled()
