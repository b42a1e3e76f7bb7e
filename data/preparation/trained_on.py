"""Which tokens of a conversation are trained, beyond what its messages say of themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class TrainedOn:
    """The choice for all rows of a preparation."""

    turns: Literal["assistant", "last", "all"] = "assistant"
    """Every assistant turn, the last one, or every token of the conversation, headers and questions included."""
    mask_tool_output: bool = False
    """Leave what an executed program printed inside an assistant turn (a ```output block) untrained."""
    stripped_thinking: bool = False
    """Train turns whose thinking the template leaves out as well, as if they had never thought."""
    template_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template, such as enable_thinking=False; a row's own win."""
