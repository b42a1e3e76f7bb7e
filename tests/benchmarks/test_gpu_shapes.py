"""What a layer keeps for its backward pass, counted, against what the GPU benchmark reckons."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.layout import Layout
from engine.step import to_device
from tests.models.layers.test_attention import flash_written_down
from tests.support.tiny import MemoryIndex, save_model
from tests.support.training import make_loader, start

SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 2}
EXPERTS = {"head_dim": 64, "intermediate_size": 256, "num_local_experts": 8, "num_experts_per_tok": 4}
BLOCK = 512  # bytes: what a GPU's allocator rounds up to; smaller tensors are not counted


def kept_bytes(folder: Path) -> float:
    """Bytes a token that a bf16 forward pass keeps, parameters left out, with the flash kernel written down."""
    documents = [(np.arange(64) + number, np.array([[0, 64]], np.int32)) for number in range(8)]
    part = start(folder, Layout(), precision="bf16")
    microbatch = make_loader(MemoryIndex(documents), part.mesh, {"seq_len": 512}).next_step()[0]
    experts = part.config.num_moe_experts is not None
    batch = to_device(microbatch, part.mesh, kernel="varlen", experts=experts)
    model = part.chunks[0]
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with flash_written_down(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        positions = batch.packed.positions[None]
        loss = model(batch.tokens, positions, None, labels=batch.targets, packed_seq_params=batch.packed)
    assert loss.requires_grad
    sizes = [tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights]
    return sum(size for size in sizes if size > BLOCK) / batch.tokens.numel()


@pytest.mark.parametrize(("name", "changes"), [("llama", {}), ("qwen2_untied", {}), ("gpt_oss", EXPERTS)])
def test_a_layer_keeps_what_is_reckoned(pool, tmp_path, name, changes, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    monkeypatch.delitem(sys.modules, "gpu_shapes", raising=False)
    from gpu_shapes import layer_activations

    shape = SIZES | changes
    one, three = (
        pool.run(kept_bytes, 1, save_model(name, tmp_path / f"{layers}", layers=layers, **shape))[0]
        for layers in (1, 3)
    )
    reckoned = layer_activations(shape, recompute=False)
    if "num_local_experts" not in shape:  # the host's activation is not fused: it keeps the gate's and one copy more
        reckoned += 4 * shape["intermediate_size"]
    # Scales of norms, logarithms of attention and the router's choices come on top.
    assert reckoned <= (three - one) / 2 <= 1.08 * reckoned
