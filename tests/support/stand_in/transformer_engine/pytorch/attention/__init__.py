"""Causal attention over packed documents, whole sequences gathered over context-parallel ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_engine.pytorch.distributed import gather
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule, refuse


class DotProductAttention(TransformerEngineBaseModule):
    """The core of attention: of the real one's many ways just the one that Lathe takes."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool | None = False,
    ):
        super().__init__()
        refuse(
            dropout=attention_dropout,
            windows=window_size,
            sinks=softmax_type != "vanilla",
            return_max_logit=return_max_logit,
            other_exchange=cp_comm_type != "p2p",
        )
        self.scale, self.cp_group = softmax_scale, cp_group

    def set_context_parallel_group(
        self, cp_group: Any, cp_global_ranks: list[int], cp_stream: Any, cp_comm_type: str = "p2p"
    ) -> None:
        self.cp_group = cp_group

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | tuple[Tensor, Tensor] | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None,
        checkpoint_core_attention: bool = False,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        fast_zero_fill: bool = True,
        inference_params: Any = None,
        pad_between_seqs: bool | None = None,
        fp8_output: bool | None = False,
        num_splits: int | None = 1,
    ) -> Tensor:
        refuse(window=window_size, mask=attention_mask is not None, bias=core_attention_bias, fp8_output=fp8_output)
        refuse(other_padding=cu_seqlens_q_padded is not None or cu_seqlens_kv_padded is not None)
        assert qkv_format == "thd" and attn_mask_type == "padding_causal", (qkv_format, attn_mask_type)
        assert cu_seqlens_q is not None and cu_seqlens_kv is not None and torch.equal(cu_seqlens_q, cu_seqlens_kv)
        assert max_seqlen_q == max_seqlen_kv == int(cu_seqlens_q.diff().max())
        bounds = cu_seqlens_q.tolist()
        states = (query_layer, key_layer, value_layer)
        if self.cp_group is None or self.cp_group.size() == 1:
            return self._attend(*states, bounds)
        order = _zigzag(bounds, self.cp_group.size()).to(query_layer.device)
        back = torch.argsort(order)
        whole = self._attend(*(gather(part, self.cp_group).index_select(0, back) for part in states), bounds)
        rows = len(order) // self.cp_group.size()
        rank = self.cp_group.rank()
        return whole.index_select(0, order[rank * rows : (rank + 1) * rows])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bounds: list[int]) -> Tensor:
        outputs = []
        for start, stop in itertools.pairwise(bounds):
            parts = [part[start:stop].transpose(0, 1)[None] for part in (query, key, value)]
            gqa = query.shape[1] != key.shape[1]
            output = F.scaled_dot_product_attention(*parts, is_causal=True, scale=self.scale, enable_gqa=gqa)
            outputs.append(output[0].transpose(0, 1))
        return torch.cat(outputs).flatten(1)


def _zigzag(bounds: list[int], ranks: int) -> Tensor:
    """The tokens of all ranks, rank after rank: of each document's 2 * ranks chunks, rank r has r and the one as far
    from the end.
    """
    rows: list[Tensor] = []
    for rank in range(ranks):
        for start, stop in itertools.pairwise(bounds):
            chunks = torch.arange(start, stop).chunk(2 * ranks) if stop > start else ()
            rows += [chunks[rank], chunks[-1 - rank]] if chunks else []
    return torch.cat(rows)
