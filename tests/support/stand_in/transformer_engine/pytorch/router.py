"""Fused routing, which Lathe does not ask for: megatron-core wants the names."""

from typing import NoReturn


def _refuse(*_: object, **__: object) -> NoReturn:
    raise NotImplementedError("the stand-in has no fused routing")


fused_compute_score_for_moe_aux_loss = fused_moe_aux_loss = fused_topk_with_score_function = _refuse
