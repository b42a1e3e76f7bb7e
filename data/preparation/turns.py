"""Where the assistant's turns lie in the text of a chat template.

A template is a program, so turns are not guessed from patterns. Which characters are a message's own is known
(`tracked`); what the template writes around them was learned once, from short conversations made up for it:

- a turn starts after its header, which is what the generation prompt and the template's headers of turns share:
  what follows is what the model has to write;
- a turn ends with the first token after its content that was seen to end turns (`<|im_end|>`, `</s>`, ...), or,
  where the template ends turns with words that are no token, with those words.

Where a template has {% generation %} markers, they are the turns instead. Conversations of plain messages need no
rendering at all where the template was seen to write their contents without looking into them.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from data.preparation.chat_template import (
    CALL_ARGUMENTS,
    CALL_NAME,
    GENERATION_ENDS,
    GENERATION_STARTS,
    NEEDED,
    THINKING,
    ChatTemplate,
    Part,
    Rendered,
)
from data.preparation.conversation import Conversation, Messages, RowError
from data.preparation.headers import UNKNOWN, Learned, learn
from data.preparation.tracked import Inspected, Run, Watched, missing

_HELD = 10_000  # shapes, and sets of arguments, that are remembered
_THOUGHT = re.compile(r"(?:<think>)?(.*?)</think>", re.DOTALL)


class Turn(NamedTuple):
    """Characters [start, end) of an assistant's turn."""

    start: int
    end: int
    message: int
    closed: bool = True  # an end token or end text is among them
    rewritten: bool = False  # the text lacks something that the message says
    stripped: bool = False  # its thinking is left out, though the next turn may think


@dataclass(frozen=True)
class Shape:
    """What a template writes around the contents of plain messages with given roles."""

    literals: list[str]  # one before each content and one at the end
    stripped: list[bool]  # whether a content loses the spaces at its ends
    turns: list[tuple[int, int, int, bool]]  # message, characters before and after its content, closed


@dataclass
class TurnFinder:
    """Locates turns for one template and one tokenizer's added tokens.

    Raises ValueError for a template with which no turn can be located.
    """

    template: ChatTemplate
    added_tokens: Iterable[str]
    arguments: dict[str, Any] = field(default_factory=dict)  # of the template, for every row

    def __post_init__(self) -> None:
        longest_first = sorted(filter(None, self.added_tokens), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._learned: dict[str, Learned] = {}
        self._shapes: dict[tuple[str, tuple[str, ...]], Shape | None] = {}
        try:
            self.learned = self._know(self.arguments)
        except RowError as error:
            raise ValueError(f"the chat template shows no assistant turn to train on: {error}") from error

    def locate(self, conversation: Conversation) -> tuple[str, list[Turn]]:
        """The text of a conversation and its assistant's turns. Raises RowError."""
        messages = self.template.prepared(conversation.messages)
        arguments = {**self.arguments, **(conversation.template_args or {})}
        plain = conversation.tools is None and all(
            len(message) == 2 and message["content"].strip() for message in messages
        )
        if plain:
            shape = self._shape(messages, arguments)
            if shape is not None:
                return _interleaved(shape, [message["content"] for message in messages])
        rendered = self.template.render(messages, conversation.tools, arguments)
        return rendered.text, self._turns(rendered, messages, arguments)

    def _know(self, arguments: dict[str, Any]) -> Learned:
        """What was learned of the template under these arguments."""
        key = _key(arguments)
        if key not in self._learned:
            if len(self._learned) > _HELD:  # arguments of rows may all be different
                self._learned.clear()
            self._learned[key] = learn(self.template, self._added, arguments)
        return self._learned[key]

    def _shape(self, messages: Messages, arguments: dict[str, Any]) -> Shape | None:
        roles = tuple(message["role"] for message in messages)
        key = (_key(arguments), roles)
        if key not in self._shapes:
            if len(self._shapes) > _HELD:  # long conversations rarely share their roles
                self._shapes.clear()
            self._shapes[key] = self._learn_shape(roles, arguments)
        return self._shapes[key]

    def _learn_shape(self, roles: tuple[str, ...], arguments: dict[str, Any]) -> Shape | None:
        """The shape of these roles, None where what this template writes may depend on the contents."""
        if len(self._know(arguments).headers) > 1:  # a content may continue the generation prompt
            return None
        contents = [f" Alpha {index}. " for index in range(len(roles))]
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        try:
            text, runs, parts = self.template.render(messages, None, arguments, string=Watched.whole)
            turns = self._turns(Rendered(text, runs, parts), messages, arguments)
        except (RowError, Inspected):
            return None
        runs = tuple(run for run in runs if run.stop > run.start)
        if [run.part for run in runs] != list(range(len(roles))) or any(run.offset < 0 for run in runs):
            return None
        if any(turn.start > runs[turn.message].start for turn in turns):
            return None
        stripped = [run.stop - run.start < len(content) for run, content in zip(runs, contents, strict=True)]
        ends = [0, *(run.stop for run in runs)]
        starts = [*(run.start for run in runs), len(text)]
        literals = [text[end:start] for end, start in zip(ends, starts, strict=True)]
        relative = [
            (turn.message, starts[turn.message] - turn.start, turn.end - ends[turn.message + 1], turn.closed)
            for turn in turns
        ]
        return Shape(literals, stripped, relative)

    def _turns(self, rendered: Rendered, messages: Messages, arguments: dict[str, Any]) -> list[Turn]:
        _check_all_written(rendered, messages)
        learned = self._know(arguments)
        if self.template.has_markers:
            return _marked_turns(rendered, learned)
        text = rendered.text
        runs = sorted((run for run in rendered.runs if run.stop > run.start), key=lambda run: run.start)
        owners = [rendered.parts[run.part].message for run in runs]
        turns: list[Turn] = []
        said = _Said(rendered)
        for index, first, last in _blocks(runs, owners, rendered.parts, messages):
            before = runs[first - 1].stop if first else 0
            after = runs[last + 1].start if last + 1 < len(runs) else len(text)
            start = before + learned.header_length(
                text[before : runs[first].start], text[runs[first].start : runs[last].stop], index
            )
            length, closed = learned.ending(
                text[runs[last].stop : after], index, called=bool(messages[index].get("tool_calls"))
            )
            if turns and turns[-1].end > start:
                raise RowError(UNKNOWN, f"the turn of message {index} overlaps the one before")
            end = runs[last].stop + length
            changes = said.changes(index, text[before:end], learned)  # a header may have begun the thinking
            turns.append(Turn(start, end, index, closed, *changes))
        return turns


def _key(arguments: dict[str, Any]) -> str:
    return json.dumps(arguments, sort_keys=True, default=str) if arguments else ""


def _blocks(runs: list[Run], owners: list[int], parts: list[Part], messages: Messages) -> list[tuple[int, int, int]]:
    """(message, first, last): the runs of each assistant message.

    A call's name counts where it stands first: templates repeat it in the header of the tool's answer.
    """
    own: dict[int, list[int]] = {}
    named: set[int] = set()
    for place, (run, owner) in enumerate(zip(runs, owners, strict=True)):
        if owner < 0 or messages[owner]["role"] != "assistant":
            continue
        if parts[run.part].key == CALL_NAME:
            if run.part in named:
                continue
            named.add(run.part)
        own.setdefault(owner, []).append(place)
    blocks = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        places = own.get(index, [])
        if not places:
            raise RowError("left out by the chat template", f"message {index} (assistant)")
        if any(owners[place] != index for place in range(places[0], places[-1] + 1)):
            raise RowError(UNKNOWN, f"other messages are written inside message {index}")
        blocks.append((index, places[0], places[-1]))
    return blocks


def _check_all_written(rendered: Rendered, messages: Messages) -> None:
    """Raises RowError where a content, a call or a tool is nowhere in the text."""
    written = {run.part for run in rendered.runs}
    for number, part in enumerate(rendered.parts):
        if number in written:
            continue
        if part.message < 0:
            raise RowError("left out by the chat template", f"tool {part.number} of the row's tools")
        if part.key == CALL_NAME:
            raise RowError("left out by the chat template", f"call {part.number} of message {part.message}")
        if part.key == CALL_ARGUMENTS:
            if messages[part.message]["tool_calls"][part.number]["function"]["arguments"]:
                what = f"the arguments of call {part.number} of message {part.message}"
                raise RowError("left out by the chat template", what)
        elif part.key in NEEDED and part.text.strip():
            role = messages[part.message]["role"]
            raise RowError("left out by the chat template", f"the {part.key} of message {part.message} ({role})")


class _Said:
    """What each message says, and where it is written: looked up once for a conversation."""

    def __init__(self, rendered: Rendered):
        self.parts: dict[int, list[tuple[int, Part]]] = {}
        for number, part in enumerate(rendered.parts):
            if part.key in (*NEEDED, *THINKING) and part.text.strip():
                self.parts.setdefault(part.message, []).append((number, part))
        self.runs: dict[int, list[Run]] = {}
        for run in rendered.runs:
            self.runs.setdefault(run.part, []).append(run)

    def changes(self, message: int, turn: str, learned: Learned) -> tuple[bool, bool]:
        """(rewritten, stripped): whether the text lacks something of a message, and whether that is its thinking."""
        rewritten = stripped = False
        own = self.parts.get(message, [])
        if any(part.key in THINKING for _, part in own):  # one thought under two names
            stripped = not any(part.key in THINKING and number in self.runs for number, part in own)
        for number, part in own:
            runs = self.runs.get(number, [])
            whole = part.key in THINKING or any(run.offset < 0 for run in runs)  # written by way of JSON or the like
            lost = [] if whole else missing(runs, len(part.text))
            if not any(part.text[start:stop].strip() for start, stop in lost):
                continue
            rewritten = rewritten or part.text.strip() not in turn
            thought = _THOUGHT.match(part.text)
            start, stop = thought.span(1) if thought else (0, 0)
            inside = [(max(start, first), min(stop, last)) for first, last in lost if first < stop]
            stripped = stripped or any(part.text[first:last].strip() for first, last in inside)
        return rewritten or stripped, stripped and not learned.prompt_thinks


def _marked_turns(rendered: Rendered, learned: Learned) -> list[Turn]:
    """The texts between generation markers, each with the message that it holds something of."""
    starts = [run.start for run in rendered.runs if run.part == GENERATION_STARTS]
    ends = [run.start for run in rendered.runs if run.part == GENERATION_ENDS]
    if len(starts) != len(ends):
        raise RowError(UNKNOWN, "the template cuts or repeats text in which generation is marked")
    runs = sorted((run for run in rendered.runs if run.part >= 0 and run.stop > run.start), key=lambda run: run.start)
    places = [run.start for run in runs]
    turns: list[Turn] = []
    said = _Said(rendered)
    before = 0
    for start, end in zip(sorted(starts), sorted(ends), strict=True):
        inside = runs[bisect_left(places, start) : bisect_left(places, end)]
        owners = [rendered.parts[run.part].message for run in inside if run.stop <= end]
        if end > start and (owners or turns):  # a mere end token belongs to the turn before it
            message = max(set(owners), key=owners.count) if owners else turns[-1].message
            rewritten, _ = said.changes(message, rendered.text[before:end], learned)
            turns.append(Turn(start, end, message, rewritten=rewritten))  # never stripped: the marks decide
            before = end
    if not turns:
        raise RowError("nothing to supervise", "the template's generation markers enclose nothing in this row")
    return turns


def _interleaved(shape: Shape, contents: list[str]) -> tuple[str, list[Turn]]:
    contents = [
        content.strip() if stripped else content for content, stripped in zip(contents, shape.stripped, strict=True)
    ]
    pieces = [*shape.literals, *contents]
    pieces[0::2], pieces[1::2] = shape.literals, contents
    ends, position = [], 0
    for literal, content in zip(shape.literals, contents, strict=False):
        position += len(literal) + len(content)
        ends.append(position)
    turns = [
        Turn(ends[message] - len(contents[message]) - before, ends[message] + after, message, closed)
        for message, before, after, closed in shape.turns
    ]
    return "".join(pieces), turns
