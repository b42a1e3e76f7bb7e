"""How much a forward pass keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from engine.layout import Layout
from engine.step import to_device
from models.layers import recompute as layers_hooks
from tests.models.layers.test_attention import flash_written_down
from tests.support.tiny import MemoryIndex
from tests.support.training import make_loader, start

SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 2}
EXPERTS = {"head_dim": 64, "intermediate_size": 256, "num_local_experts": 8, "num_experts_per_tok": 4}
BLOCK = 512  # bytes: what a GPU's allocator rounds up to; smaller tensors are not counted


@contextmanager
def counted(kept: dict[int, torch.Tensor]) -> Iterator[None]:
    """Puts every tensor that is kept into `kept`, by its address; what the layers' own hooks leave out is not kept."""
    pack = layers_hooks._pack

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def keep_what_is_left(tensor: torch.Tensor):
        left = pack(tensor)
        return keep(left) if isinstance(left, torch.Tensor) else left

    # Of hooks within hooks only the inner ones are called.
    with (
        mock.patch.object(layers_hooks, "_pack", keep_what_is_left),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        yield


def has_hooks(folder: Path, parts: str, backend: str) -> bool:
    """Whether a layer looks at every tensor that it keeps."""
    return start(folder, Layout(), recompute=parts, backend=backend).chunks[0].decoder.layers[0].marks


def kept_bytes(folder: Path, recompute: str = "none", backend: str = "native") -> float:
    """Bytes a token that a bf16 forward pass keeps, parameters left out, with the flash kernel written down."""
    documents = [(np.arange(64) + number, np.array([[0, 64]], np.int32)) for number in range(8)]
    part = start(folder, Layout(), precision="bf16", recompute=recompute, backend=backend)
    microbatch = make_loader(MemoryIndex(documents), part.mesh, {"seq_len": 512}).next_step()[0]
    experts = part.config.num_moe_experts is not None
    batch = to_device(microbatch, part.mesh, kernel="varlen", experts=experts)
    model = part.chunks[0]
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}
    with flash_written_down(), counted(kept):
        positions = batch.packed.positions[None]
        loss = model(batch.tokens, positions, None, labels=batch.targets, packed_seq_params=batch.packed)
    assert loss.requires_grad
    sizes = [tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights]
    return sum(size for size in sizes if size > BLOCK) / batch.tokens.numel()
