"""Linear layers of several experts, and the padding that FP8 asks of each expert's rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule, product, refuse, split


class GroupedLinear(TransformerEngineBaseModule):
    """A linear layer for each run of rows."""

    def __init__(
        self,
        num_gemms: int,
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
        device: torch.device | str = "cuda",
        ub_overlap_rs: bool = False,
        ub_overlap_ag: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        save_original_input: bool = False,
        name: str | None = None,
    ):
        super().__init__()
        refuse(ub_overlap=ub_overlap_rs or ub_overlap_ag, delay_wgrad_compute=delay_wgrad_compute)
        self.save_original_input = save_original_input
        self.set_degree(tp_group, tp_size)
        if self.tp_size > 1 and bias:
            raise ValueError("no biases where the rows are split over ranks")
        self.num_gemms, self.use_bias, self.return_bias = num_gemms, bias, return_bias
        self.parallel_mode, self.fuse_wgrad_accumulation = parallel_mode, fuse_wgrad_accumulation
        self.in_features = in_features // (self.tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (self.tp_size if parallel_mode == "column" else 1)
        where: dict[str, Any] = {"dtype": params_dtype, "device": device}
        for number in range(num_gemms):
            weight = Parameter(torch.empty((self.out_features, self.in_features), **where))
            split(weight, 1 if parallel_mode == "row" else 0)
            self.register_parameter(f"weight{number}", weight)
            if not bias:
                setattr(self, f"bias{number}", torch.empty(0, **where))
                continue
            self.register_parameter(f"bias{number}", Parameter(torch.zeros(self.out_features, **where)))
            if parallel_mode == "column":
                split(getattr(self, f"bias{number}"), 0)

    def forward(
        self, inp: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        assert len(m_splits) == self.num_gemms and sum(m_splits) == len(inp), (m_splits, inp.shape)
        self.init_fp8_metadata(self.num_gemms)
        outputs = []
        biases = [getattr(self, f"bias{number}") for number in range(self.num_gemms)]
        for number, rows in enumerate(torch.split(inp, m_splits)):
            bias = biases[number] if self.use_bias and not self.return_bias else None
            weight = getattr(self, f"weight{number}")
            outputs.append(product(rows, weight, bias, self.quantizers(number), self.fuse_wgrad_accumulation))
        output = torch.cat(outputs)
        return (output, biases) if self.return_bias else output


class Fp8Padding(torch.nn.Module):
    """Zero rows below each expert's."""

    def __init__(self, num_gemms: int, align_size: int | None = None):
        super().__init__()
        self.num_gemms, self.align_size = num_gemms, align_size

    def padded(self, m_splits: list[int]) -> list[int]:
        assert len(m_splits) == self.num_gemms
        if self.align_size is None:
            self.align_size = 32 if FP8GlobalStateManager.get_fp8_recipe().mxfp8() else 16
        return [-(-rows // self.align_size) * self.align_size for rows in m_splits]

    def forward(self, inp: Tensor, m_splits: list[int]) -> tuple[Tensor, list[int]]:
        wanted = self.padded(m_splits)
        parts = zip(torch.split(inp, m_splits), wanted, strict=True)
        rows = [torch.cat((part, part.new_zeros((count - len(part), part.shape[-1])))) for part, count in parts]
        return torch.cat(rows), wanted


class Fp8Unpadding(Fp8Padding):
    """The way back."""

    def forward(self, inp: Tensor, m_splits: list[int]) -> Tensor:  # type: ignore[override]
        parts = zip(torch.split(inp, self.padded(m_splits)), m_splits, strict=True)
        return torch.cat([part[:count] for part, count in parts])
