"""The contract with megatron-core 0.16.1: fails when it moves what Lathe leans on."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import megatron.core
import pytest
import torch

from engine import host

ROOT = Path(__file__).resolve().parents[2]


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_version_is_the_one_that_was_checked():
    assert megatron.core.__version__ == "0.16.1"


def test_replaced_names_are_still_there():
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    assert parameters(random._get_cuda_rng_state) and parameters(random._set_cuda_rng_state)
    assert "te_general_gemm" in inspect.getsource(moe_utils)
    assert parameters(torch.distributed.all_to_all_single)[:2] == ["output", "input"]


def test_signatures_that_are_called():
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import _get_param_groups_and_buffers
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining

    expected = ["model_chunks", "model_chunk_offset", "config", "config_overrides", "filter_fn", "buffer_name"]
    assert parameters(_get_param_groups_and_buffers) == expected
    assert {"labels", "packed_seq_params", "hidden_states"} <= set(parameters(GPTModel._postprocess))
    assert {"pg_collection", "vp_stage", "share_embeddings_and_output_weights"} <= set(parameters(GPTModel.__init__))
    assert {"pg_collection", "disable_bucketing", "ddp_config"} <= set(parameters(DistributedDataParallel.__init__))
    assert "pg_collection" in parameters(finalize_model_grads)
    assert "data_parallel_group_gloo" in parameters(DistributedOptimizer.__init__)
    assert hasattr(DistributedOptimizer, "load_parameter_state_from_fully_reshardable")
    assert {"forward_only", "collect_non_loss_data"} <= set(parameters(forward_backward_no_pipelining))


def test_optimizer_state_needs_what_ours_keeps():
    """The sharded optimizer copies exactly the main parameter, exp_avg and exp_avg_sq."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    source = inspect.getsource(DistributedOptimizer._set_main_param_and_optimizer_states)
    assert 'dst_tensors = {"param": main_param, **optim_state}' in source


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("raise RuntimeError('libcudart.so.13 is not there')", "does not import (RuntimeError: libcudart.so.13 is not"),
        ("__version__ = '2.9.1'", "Transformer Engine 2.9.1 is older than 2.10"),
    ],
)
def test_a_transformer_engine_that_cannot_be_used_stops_nobody_else(tmp_path, text, fault):
    """megatron-core imports it wherever it lies, and passes on what is no ImportError."""
    (tmp_path / "transformer_engine" / "pytorch").mkdir(parents=True)
    (tmp_path / "transformer_engine" / "__init__.py").write_text(text)
    (tmp_path / "transformer_engine" / "pytorch" / "__init__.py").write_text("")
    script = "from engine import host; print(host.transformer_engine_fault())"
    if "raise" in text:
        script += "; from megatron.core.extensions import transformer_engine; print(transformer_engine.HAVE_TE)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert fault in done.stdout and done.stdout.endswith("False\n") == ("raise" in text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the host's replacements are inactive where CUDA is present")
def test_host_takes_what_is_meant_for_cuda(pool):
    assert pool.run(_devices, 1)[0] == ("cpu", "cpu", "torch.cuda.FloatTensor", True, True)


def _devices() -> tuple:
    tensor = torch.zeros(3, device="cuda")
    same = torch.ones(2)
    state = torch.cuda.get_rng_state()
    first = torch.rand(1)
    torch.cuda.set_rng_state(state)
    return (
        tensor.device.type,
        torch.ones(1).to("cuda").device.type,
        tensor.type(),
        same.cuda() is same,
        bool(torch.rand(1) == first),
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the host's replacements are inactive where CUDA is present")
def test_gathers_that_end_at_the_same_moment_do_not_kill(pool):
    """With gloo's two threads a group this ends in seconds by SIGABRT or SIGSEGV; see `host._replace_gloo`."""
    assert pool.run(_gathers, 1, 30_000)[0] == (1, 1, 30_000)


def _gathers(count: int) -> tuple[int, int, int]:
    """Threads of the world's group and of another one, and how many gathers ended that went on side by side."""
    from torch import distributed
    from torch.distributed.distributed_c10d import _coalescing_manager

    world, other, ended = distributed.group.WORLD, distributed.new_group([0]), 0
    whole, part = torch.zeros(4), torch.zeros(4)
    while ended < count:
        begun = []
        for _ in range(200):
            with _coalescing_manager(world, async_ops=True) as work:  # as megatron-core gathers weights
                distributed.all_gather_into_tensor(whole, part, group=world, async_op=True)
            begun.append(work)
        for work in begun:
            work.wait()
        ended += len(begun)
    backends = [group._get_backend(torch.device("cpu")) for group in (world, other)]
    return backends[0].options._threads, backends[1].options._threads, ended


def test_host_does_nothing_where_cuda_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.cuda.current_device
    assert host.enable() is False
    assert torch.cuda.current_device is before
