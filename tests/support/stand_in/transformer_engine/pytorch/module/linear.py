"""Linear layers, with a norm before them or not, split over tensor-parallel ranks by output or by input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from transformer_engine.pytorch.distributed import after_row, before_column
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule, product, refuse, split
from transformer_engine.pytorch.module.norm import rms_norm


class _Linear(TransformerEngineBaseModule):
    """What both have in common."""

    def set_up(
        self,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool,
        fuse_wgrad_accumulation: bool,
        tp_group: Any,
        tp_size: int,
        bias: bool,
        return_bias: bool,
        params_dtype: torch.dtype | None,
        parallel_mode: str | None,
        device: Any,
    ) -> None:
        self.set_degree(tp_group, tp_size)
        assert parallel_mode in ("column", "row", None), parallel_mode
        over = self.tp_size
        self.in_features = in_features // (over if parallel_mode == "row" else 1)
        self.out_features = out_features // (over if parallel_mode == "column" else 1)
        self.parallel_mode, self.use_bias, self.return_bias = parallel_mode, bias, return_bias
        self.sequence_parallel = over > 1 and sequence_parallel
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        where: dict[str, Any] = {"dtype": params_dtype, "device": device}
        self.weight = Parameter(torch.empty((self.out_features, self.in_features), **where))
        split(self.weight, 1 if parallel_mode == "row" else 0)
        if not bias:
            self.bias = torch.empty(0, **where)
            return
        self.bias = Parameter(torch.zeros(self.out_features, **where))
        if parallel_mode == "row":
            self.bias.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        elif parallel_mode == "column":
            split(self.bias, 0)

    def run(self, states: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        self.init_fp8_metadata()
        if self.parallel_mode == "column":
            states = before_column(states, self.tp_group, self.sequence_parallel)
        applied = self.bias if self.use_bias and not self.return_bias else None
        row = self.parallel_mode == "row"
        early = None if row else applied
        output = product(states, self.weight, early, self.quantizers(), self.fuse_wgrad_accumulation)
        if row:
            output = after_row(output, self.tp_group, self.sequence_parallel)
            output = output if applied is None else output + applied
        return (output, self.bias) if self.return_bias else output


class Linear(_Linear):
    """A linear layer."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: tuple[str, ...] | dict[str, int] | None = None,
        device: torch.device | str = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ):
        super().__init__()
        refuse(
            parameters_split=parameters_split,
            ub_overlap=ub_overlap_ag or ub_overlap_rs or ub_overlap_rs_dgrad or ub_bulk_dgrad or ub_bulk_wgrad,
            delay_wgrad_compute=delay_wgrad_compute,
            symmetric_ar_type=symmetric_ar_type,
        )
        self.save_original_input = save_original_input
        self.set_up(
            in_features,
            out_features,
            sequence_parallel=sequence_parallel,
            fuse_wgrad_accumulation=fuse_wgrad_accumulation,
            tp_group=tp_group,
            tp_size=tp_size,
            bias=bias,
            return_bias=return_bias,
            params_dtype=params_dtype,
            parallel_mode=parallel_mode,
            device=device,
        )

    def forward(
        self,
        inp: Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        refuse(fp8_output=fp8_output, fp8_grad=fp8_grad)
        return self.run(inp)


class LayerNormLinear(_Linear):
    """A norm, and a linear layer behind it."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        init_method: Callable | None = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        parameters_split: tuple[str, ...] | dict[str, int] | None = None,
        zero_centered_gamma: bool = False,
        device: torch.device | str = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        name: str | None = None,
    ):
        super().__init__()
        refuse(
            layer_norm=normalization != "RMSNorm",
            norm_output=return_layernorm_output or return_layernorm_output_gathered,
            parameters_split=parameters_split,
            zero_centered_gamma=zero_centered_gamma,
            ub_overlap=ub_overlap_ag or ub_overlap_rs or ub_overlap_rs_dgrad or ub_bulk_dgrad or ub_bulk_wgrad,
            delay_wgrad_compute=delay_wgrad_compute,
            symmetric_ar_type=symmetric_ar_type,
        )
        self.eps = eps
        self.layer_norm_weight = Parameter(torch.ones(in_features, dtype=params_dtype, device=device))
        self.layer_norm_bias = None
        self.set_up(
            in_features,
            out_features,
            sequence_parallel=sequence_parallel,
            fuse_wgrad_accumulation=fuse_wgrad_accumulation,
            tp_group=tp_group,
            tp_size=tp_size,
            bias=bias,
            return_bias=return_bias,
            params_dtype=params_dtype,
            parallel_mode=parallel_mode,
            device=device,
        )
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(
        self,
        inp: Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        refuse(fp8_output=fp8_output, fp8_grad=fp8_grad)
        return self.run(rms_norm(inp, self.layer_norm_weight, self.eps))
