"""What a file of this folder says of its models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from models.conversion.rules import Entry


@dataclass(frozen=True, kw_only=True)
class Family:
    """All that is particular to one model family; every file in `models/families/` makes one."""

    name: str  # transformers' model_type
    architecture: str  # the class named in config.json
    table: tuple[Entry, ...]
    # megatron TransformerConfig field -> config.json field, or that and what turns its value into megatron's
    fields: Mapping[str, str | tuple[str, Callable[[Any], Any]]]
    constants: Mapping[str, Any]  # megatron TransformerConfig field -> value
    requires: Mapping[str, Any]  # config.json field -> the only value that is understood
    harmless: tuple[str, ...] = ()  # config.json fields that never change the mathematics
    repeats: Mapping[str, str] = field(default_factory=dict)  # config.json field -> the field that it says again
    buffers: tuple[str, ...] = ()  # patterns of tensors in old files that are computed, not learned, in any dtype
    tied_copy: tuple[str, str] | None = None  # (copy, original): a tied model's files may hold both
    post_norm: bool = False  # norms after attention and feed-forward, before the residual, in place of before them
    gain_in_fp32: bool = False  # norms multiply by their gain in fp32 and round then; else they round before
    windows: bool = False  # whether config.json may give layers a sliding window
    qk_norm: str = "none"  # of queries and keys before rope: "head" by head, "projection" over all heads at once
    mxfp4: tuple[str, ...] = ()  # patterns of tensors that files may hold as `_blocks` and `_scales`
