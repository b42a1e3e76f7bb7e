"""What all modules share: their group, FP8 state, and one matrix product forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from transformer_engine.common.recipe import DelayedScaling
from transformer_engine.pytorch.fp8 import DelayedScale, FP8GlobalStateManager, rounded


class TransformerEngineBaseModule(torch.nn.Module):
    """A module with a tensor-parallel group and FP8 state."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False, "fp8_group": None, "num_gemms": 1}
        self.tp_group: Any = None
        self.tp_size = 1

    def set_tensor_parallel_group(self, tp_group: Any) -> None:
        self.tp_group = tp_group

    def set_degree(self, tp_group: Any, tp_size: int) -> None:
        """As every constructor does it: a group says its own size."""
        self.tp_size = tp_size if tp_group is None else tp_group.size()
        if tp_group is not None or tp_size == 1:
            self.set_tensor_parallel_group(tp_group)

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """Takes up the recipe that is in force, and makes the scales that it keeps."""
        self.fp8 = FP8GlobalStateManager.is_fp8_enabled()
        if not self.fp8:
            return
        recipe = FP8GlobalStateManager.get_fp8_recipe()
        self.fp8_meta |= {"recipe": recipe, "num_gemms": num_gemms, "fp8_checkpoint": True}
        if isinstance(recipe, DelayedScaling) and "scaling_fwd" not in self.fp8_meta:
            self.fp8_meta["scaling_fwd"] = DelayedScale(3 * num_gemms, recipe, torch.float8_e4m3fn)
            self.fp8_meta["scaling_bwd"] = DelayedScale(2 * num_gemms, recipe, torch.float8_e5m2)
            FP8GlobalStateManager.forward.append(self.fp8_meta["scaling_fwd"])
            FP8GlobalStateManager.backward.append(self.fp8_meta["scaling_bwd"])

    def quantizers(self, number: int = 0) -> tuple[Callable, Callable, Callable] | None:
        """Of product `number`: what rounds its input, its weight and its gradient; None where FP8 is off."""
        if not self.fp8:
            return None
        recipe = self.fp8_meta["recipe"]
        if isinstance(recipe, DelayedScaling):
            there, back = self.fp8_meta["scaling_fwd"], self.fp8_meta["scaling_bwd"]
            return (
                lambda states: there.rounded(states, 3 * number, torch.float8_e4m3fn),
                lambda states: there.rounded(states, 3 * number + 1, torch.float8_e4m3fn),
                lambda states: back.rounded(states, 2 * number, torch.float8_e5m2),
            )
        return (
            lambda states: rounded(states, recipe, backward=False),
            lambda states: rounded(states, recipe, backward=False, weight=True),
            lambda states: rounded(states, recipe, backward=True),
        )

    def get_extra_state(self) -> Tensor:
        """Empty without FP8; what FP8 keeps is for those to save who use it."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        assert state is None or state.numel() == 0


class _Product(torch.autograd.Function):
    """states [rows, in] times weight [out, in] transposed, perhaps in FP8; gradients perhaps straight to main_grad."""

    @staticmethod
    def forward(ctx, states: Tensor, weight: Parameter, quantizers, fused: bool) -> Tensor:
        ctx.quantizers, ctx.fused = quantizers, fused
        ctx.last = quantizers is not None and FP8GlobalStateManager.take_first()
        ctx.group = FP8GlobalStateManager.group
        ctx.main_grad = lambda: weight.main_grad  # as the real one, which sees what is saved without its attributes
        read, used = (states, weight) if quantizers is None else (quantizers[0](states), quantizers[1](weight))
        ctx.save_for_backward(read, used, weight)
        return read @ used.t()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        read, used, weight = ctx.saved_tensors
        if ctx.quantizers is not None:
            gradient = ctx.quantizers[2](gradient)
        own = gradient.t() @ read
        if ctx.last:
            for scale in FP8GlobalStateManager.backward:
                scale.update(ctx.group)
        if ctx.fused:
            ctx.main_grad().add_(own)
            if not hasattr(weight, "grad_added_to_main_grad"):
                return gradient @ used, None, None, None
            weight.grad_added_to_main_grad = True
            own = torch.full_like(own, torch.nan)  # of the real one nobody knows what is in it
        return gradient @ used, own, None, None


def product(states: Tensor, weight: Parameter, bias: Tensor | None, quantizers, fused: bool) -> Tensor:
    """A linear layer over the last dimension of `states`."""
    flat = _Product.apply(states.reshape(-1, states.shape[-1]), weight, quantizers, fused)
    output = flat.view(*states.shape[:-1], flat.shape[-1])
    return output if bias is None else output + bias


def split(parameter: Parameter, dimension: int) -> None:
    """Marks a parameter as split over tensor-parallel ranks."""
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.partition_dim = dimension  # type: ignore[attr-defined]
    parameter.partition_stride = 1  # type: ignore[attr-defined]


def refuse(**asked: Any) -> None:
    """What the real package offers and the stand-in does not compute."""
    for name, value in asked.items():
        if value:
            raise NotImplementedError(f"the stand-in has no {name}")
