"""Which tokens of a conversation are trained, beyond what its messages say of themselves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from data.preparation.conversation import Conversation, RowError
from data.preparation.turns import Turn

# What a program that was run inside an assistant's turn printed, as math data with code has it.
_OUTPUT = re.compile(
    r"```(?:output|system)\n(?:.*?\n)??```\n?|<tool_response>.*?</tool_response>\n?|<interpreter>.*?</interpreter>\n?",
    re.DOTALL,
)


@dataclass(frozen=True, kw_only=True)
class TrainedOn:
    """The choice for all rows of a preparation."""

    turns: Literal["assistant", "last", "all"] = "assistant"
    """Every assistant turn, the last one, or every token, headers and questions included, but of turns left out."""
    mask_tool_output: bool = False
    """Leave what an executed program printed inside an assistant turn (a ```output block) untrained."""
    stripped_thinking: bool = False
    """Train turns whose thinking the template leaves out as well, as if they had never thought."""
    template_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template, such as enable_thinking=False; a row's own win."""


def choose_turns(
    text: str, turns: Sequence[Turn], conversation: Conversation, options: TrainedOn
) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """The characters [start, end) of a text that are trained, in order, and counts of what was found and left out.

    Raises RowError where nothing is left.
    """
    last = max((turn.message for turn in turns), default=-1)
    chosen, unwanted, stripped = [], [], []
    for turn in turns:
        if turn.message in conversation.untrained or (options.turns == "last" and turn.message != last):
            unwanted.append(turn)
        elif turn.stripped and not options.stripped_thinking:
            stripped.append(turn)
        else:
            chosen.append(turn)
    if not chosen:
        if stripped:
            raise RowError("thinking left out by the chat template", "no turn is left; --stripped-thinking trains them")
        raise RowError("nothing to supervise", "no assistant turn of the row is to be trained")
    kept = [(turn.start, turn.end) for turn in chosen]
    if options.turns == "all":
        kept = _without((0, len(text)), sorted([*unwanted, *stripped]))
    masked = 0
    if options.mask_tool_output:
        kept, masked = _without_outputs(text, kept)
    counts = {
        "open_turns": sum(not turn.closed for turn in chosen),
        "rewritten": sum(turn.rewritten for turn in chosen),
        "untrained_turns": len(unwanted),
        "stripped_turns": len(stripped),
        "masked_tool_outputs": masked,
    }
    return kept, counts


def _without_outputs(text: str, kept: list[tuple[int, int]]) -> tuple[list[tuple[int, int]], int]:
    pieces, masked = [], 0
    for start, end in kept:
        outputs = list(_OUTPUT.finditer(text, start, end))
        pieces += _without((start, end), [output.span() for output in outputs])
        masked += len(outputs)
    return pieces, masked


def _without(whole: tuple[int, int], left_out: Iterable[Sequence[Any]]) -> list[tuple[int, int]]:
    """What is left of characters [start, end) without others, which begin with their own start and end, in order."""
    start, end = whole
    pieces = []
    for first, last, *_ in left_out:
        pieces.append((start, first))
        start = last
    return [(first, last) for first, last in [*pieces, (start, end)] if first < last]
