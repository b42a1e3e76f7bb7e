"""What a model is, without its weights and whatever file said so."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.conversion.rules import Rule


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """A model without its weights; `rules` say where these lie, one rule per global megatron tensor."""

    family: str
    hf_config: dict[str, Any]  # every field, defaults included, after overrides
    transformer: dict[str, Any]  # fields for megatron's TransformerConfig; functions are given by name
    vocab_size: int  # as the tokenizer and the exports know it
    padded_vocab_size: int  # the next multiple of 128
    tied: bool
    max_position_embeddings: int
    rope: tuple[dict[str, Any], ...]  # one dict of transformers' rope_parameters per layer
    post_norm: bool  # norms after attention and feed-forward, before the residual
    gain_in_fp32: bool  # norms multiply by their gain before they round, not after
    qk_norm: str  # "none", "head" or "projection"
    mxfp4: tuple[str, ...]  # tensors that files hold as `_blocks` and `_scales`; empty for plain files
    rules: tuple[Rule, ...]
    # Fields of config.json that say nothing of the model; whoever wrote them, the model is the same.
    ignored_fields: tuple[str, ...] = field(default=(), compare=False)

    @cached_property
    def rule(self) -> dict[str, Rule]:
        """Rules by megatron key."""
        return {rule.key: rule for rule in self.rules}
