"""Counts what a microbatch would launch on CUDA, and the bytes that this reads and writes, on the meta device.

Every operator is counted where it is dispatched. Views cost nothing; a kernel reads its inputs and writes its outputs
once. What `models.layers.fused` makes of a function counts as the kernels that CUDA runs for it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gpu_shapes import SHAPES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = ("matrix products", "attention", "norms", "rotary", "gated unit", "residuals", "experts", "weight gradients",
         "loss", "other")  # fmt: skip
FUSED_KINDS = {"norm": "norms", "rope": "rotary", "gated": "gated unit", "loss": "loss", "experts": "experts"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm"}
ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided"}
PICKED = {"embedding", "index_select", "gather", "index"}  # read no more of the first input than they write
OVERWRITTEN = {"copy_", "fill_", "zero_"}  # write to their first input without reading it


@dataclass
class Work:
    """Kernels, the bytes that they read and write, and operations of matrix products."""

    kernels: float = 0
    bytes: float = 0
    operations: float = 0

    def plus(self, other: Work, times: float = 1.0) -> Work:
        return Work(
            self.kernels + times * other.kernels,
            self.bytes + times * other.bytes,
            self.operations + times * other.operations,
        )


Tally = dict[str, Work]


@dataclass
class Counts:
    """What a model of one layer needs beside the layer, and what each layer needs."""

    layer: Tally
    rest: Tally
    by_operator: dict[str, Work] = field(default_factory=dict)  # of a layer


def tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def size(tensor: Tensor) -> int:
    """Bytes of memory that lie behind a tensor: those of an expanded one once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class Counter(TorchDispatchMode):
    """Adds up what each operator needs, by kind and by name."""

    def __init__(self, *, parts: bool):
        super().__init__()
        self.parts = parts
        self.kinds: Tally = defaultdict(Work)
        self.operators: Tally = defaultdict(Work)
        self.inside: str | None = None  # the fused function whose parts are counted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        from models.layers.fused import FUSED

        kwargs = kwargs or {}
        space, name = function._schema.name.split("::")
        if space != "lathe":
            result = function(*args, **kwargs)
            self.count(function, name, args, kwargs, result)
            return result
        if self.parts:
            self.inside = name
            with self:
                result = FUSED[name].eager(*args, **kwargs)
            self.inside = None
            return result
        result = function(*args, **kwargs)
        work = Work(FUSED[name].kernels, sum(map(size, tensors([args, kwargs, result]))))
        named = zip(function._schema.arguments, args, strict=False)
        work.bytes += sum(size(value) for argument, value in named if argument.is_write)  # read as inputs already
        work.bytes += 8 * FUSED[name].scratch * args[0].numel()
        self.add(FUSED_KINDS[name.split("_")[0]], name, work)
        return result

    def count(self, function, name: str, args: tuple, kwargs: dict, result: Any) -> None:
        inputs, outputs = tensors([args, kwargs]), tensors(result)
        held = {tensor.untyped_storage()._cdata for tensor in inputs}
        is_view = all(tensor.untyped_storage()._cdata in held for tensor in outputs)
        if name in ALLOCATIONS or (is_view and not function._schema.is_mutable):
            return
        read = [tensor for tensor in inputs if all(tensor is not out for out in tensors(kwargs.get("out")))]
        if name in OVERWRITTEN:
            read = read[1:]
        elif name in PICKED:
            read = [*outputs, *read[1:]]
        work = Work(1, sum(map(size, read)) + sum(map(size, outputs)))
        if name in PRODUCTS:
            left, right = [tensor for tensor in inputs if tensor.ndim >= 2][-3 if "out" in kwargs else -2 :][:2]
            if name == "addmm":
                left, right = args[1], args[2]
            work.operations = 2.0 * left.numel() * right.shape[-1]
        self.add(self.kind(name, inputs, outputs), name, work)

    def kind(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> str:
        if self.inside:
            return FUSED_KINDS[self.inside.split("_")[0]]
        if name in PRODUCTS:
            return "matrix products"
        if "flash" in name or "varlen" in name:
            return "attention"
        if name == "add_" and inputs[0].dtype == torch.float32 and inputs[-1].dtype == torch.bfloat16:
            return "weight gradients"
        if name == "add" and len(inputs) == 2 and inputs[0].ndim == 3 and inputs[0].shape == inputs[1].shape:
            return "residuals"
        return "other"

    def add(self, kind: str, name: str, work: Work) -> None:
        self.kinds[kind] = self.kinds[kind].plus(work)
        self.operators[name] = self.operators[name].plus(work)


def describe_shape(name: str, layers: int):
    """The description of a shape with so many layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from models.hf_config import describe

    config = AutoConfig.for_model(**(SHAPES[name] | {"num_hidden_layers": layers}))
    architecture = AutoModelForCausalLM._model_mapping[type(config)].__name__
    return describe(config.to_dict() | {"architectures": [architecture]})


def count_step(name: str, layers: int, tokens: int, *, parts: bool) -> Counter:
    """Counts a bf16 microbatch forward and backward, all tokens supervised, on one rank of one."""
    from engine import host
    from engine.layout import Layout
    from engine.mesh import build_mesh
    from engine.rehearsal.fake_world import fake_world
    from engine.step import wrap_chunks
    from models.build import build_chunks, transformer_config
    from models.layers.packed_documents import pack_documents
    from models.layers.router import RoutedTokens, set_routers

    host.enable()
    description = describe_shape(name, layers)
    lengths = np.full(8, tokens // 8)
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    counter = Counter(parts=parts)
    with fake_world(0, 1):
        mesh = build_mesh(Layout())
        with host.on_meta():
            config = transformer_config(description, layout=Layout(), precision="bf16")
            chunks = build_chunks(description, config, backend="native", groups=mesh.groups)
            set_routers(chunks, aux_loss=0.0, frozen=False)
            (model,) = wrap_chunks(chunks, mesh)
            device = torch.device("meta")
            packed = pack_documents(bounds, lengths, cp_group=None, device=device, kernel="varlen")
            packed.supervised = torch.zeros(tokens, dtype=torch.long)
            each = torch.zeros(len(lengths))
            packed.routed = RoutedTokens(
                real=packed.positions >= 0, document=packed.positions, lengths=each, supervised=each, real_tokens=tokens
            )
            inputs = torch.zeros((1, tokens), dtype=torch.long)
            with counter:
                loss = model(inputs, packed.positions[None], None, labels=inputs[0], packed_seq_params=packed)
                loss.backward()
    return counter


def difference(more: Tally, less: Tally, times: float) -> Tally:
    """(more - less) * times, without what is nothing."""
    found = {name: Work().plus(more[name], times).plus(less.get(name, Work()), -times) for name in more}
    return {name: work for name, work in found.items() if work.kernels or work.bytes}


def count(name: str, tokens: int, *, parts: bool = False) -> Counts:
    """What a layer needs, and what the model needs besides: from models of two layers and of four."""
    two, four = (count_step(name, layers, tokens, parts=parts) for layers in (2, 4))
    layer = difference(four.kinds, two.kinds, 0.5)
    rest = difference(two.kinds, layer, 1.0)
    rest = difference(rest, layer, 1.0)
    if "num_local_experts" in SHAPES[name] and "other" in layer:  # routing, and what goes to experts and comes back
        layer["experts"] = layer.get("experts", Work()).plus(layer.pop("other"))
    return Counts(layer, rest, difference(four.operators, two.operators, 0.5))


def sum_of(tally: Tally) -> Work:
    total = Work()
    for work in tally.values():
        total = total.plus(work)
    return total
