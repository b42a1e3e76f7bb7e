"""Where the assistant's turns lie in the text of a chat template.

A template is a program, so turns are not guessed from patterns. The ends of all messages are known by
marks (`ChatTemplate.marks`), and what the template writes around them decides:

- a turn starts where the generation prompt ends: what follows is what the model has to write;
- a turn ends with the first added token after its content (`<|im_end|>`, `</s>`, ...), or, where the
  template ends turns with words that are no token, with those words.

Where a comparison fails, the row is refused. Conversations of plain messages need one rendering only: the
text between the contents is learned once for each sequence of roles, and a row whose text is exactly that
text joined with its contents is located.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from data.preparation.chat_template import UNKNOWN, ChatTemplate
from data.preparation.conversation import Messages, RowError

_PROBES = ("Alpha", "beta")  # contents that share no character at their start


class Turn(NamedTuple):
    """Characters [start, end) of an assistant's turn; `closed` if an end token or end text is among them."""

    start: int
    end: int
    closed: bool


@dataclass(frozen=True)
class Shape:
    """What a template writes between the contents of plain messages with given roles."""

    literals: list[str]  # one before each content and one at the end
    turns: list[tuple[int, int, int, bool]]  # message, characters before and after its content, closed


class TurnFinder:
    """Locates turns for one template and one tokenizer's added tokens (all outside the vocabulary proper).

    `end_text` is what ends an answer ("" for nothing), `end_is_token` whether that is one added token.
    Raises ValueError for a template with which no turn can be located.
    """

    def __init__(self, template: ChatTemplate, added_tokens: Iterable[str]):
        self.template = template
        longest_first = sorted(filter(None, added_tokens), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._shapes: dict[tuple[str, ...], Shape | None] = {}
        self._prompts_more = False  # the generation prompt says more than the template writes before turns
        self.end_text, self.end_is_token = "", False
        self._tail, self._tail_end = "", 0  # the text after an answer that is last, and its part in the turn
        self._closers: set[str] = set()  # tokens that end a turn in the midst of a conversation
        try:
            self._learn_ends()
            self.locate([_probe("user"), _probe("assistant")])
        except RowError as error:
            raise ValueError(f"the chat template shows no assistant turn to train on: {error}") from error

    def locate(self, messages: Messages, tools: list | None = None) -> tuple[str, list[Turn]]:
        """The text of a conversation and its assistant's turns. Raises RowError."""
        if not self.template.knows_developer:  # the newer name of the system role
            messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        text = self.template.render(messages, tools)
        if tools is None and all(len(message) == 2 and message["content"] for message in messages):
            turns = self._by_shape(text, messages)
            if turns is not None:
                return text, turns
        return text, self._by_marks(text, messages, tools)

    def _by_shape(self, text: str, messages: Messages) -> list[Turn] | None:
        roles = tuple(message["role"] for message in messages)
        if roles not in self._shapes:
            self._shapes[roles] = self._learn_shape(roles)
        shape = self._shapes[roles]
        if shape is None:
            return None
        contents = [message["content"] for message in messages]
        if text != _interleave(shape.literals, contents):
            contents = [content.strip() for content in contents]  # what `| trim` leaves
            if text != _interleave(shape.literals, contents):
                return None
        ends, position = [], 0
        for literal, content in zip(shape.literals, contents, strict=False):
            position += len(literal) + len(content)
            ends.append(position)
        return [
            Turn(ends[message] - len(contents[message]) - before, ends[message] + after, closed)
            for message, before, after, closed in shape.turns
        ]

    def _learn_shape(self, roles: tuple[str, ...]) -> Shape | None:
        """The shape of these roles, None where this template needs marks for them."""
        messages = [_probe(role, f"{_PROBES[0]} {index}.") for index, role in enumerate(roles)]
        self._prompts_more = False
        try:
            text = self.template.render(messages)
            turns = self._by_marks(text, messages, None)
            marks = self.template.marks(text, messages, None)
        except RowError:
            return None
        if self._prompts_more or [mark.message for mark in marks] != list(range(len(messages))):
            return None
        starts = [mark.position - len(messages[mark.message]["content"]) for mark in marks]
        ends = [0, *(mark.position for mark in marks)]
        literals = [text[end:start] for end, start in zip(ends, [*starts, len(text)], strict=True)]
        assistants = [index for index, role in enumerate(roles) if role == "assistant"]
        relative = [
            (index, starts[index] - turn.start, turn.end - ends[index + 1], turn.closed)
            for index, turn in zip(assistants, turns, strict=True)
        ]
        return Shape(literals, relative)

    def _by_marks(self, text: str, messages: Messages, tools: list | None) -> list[Turn]:
        marks = self.template.marks(text, messages, tools)
        turns: list[Turn] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            # by place, since a template may move a system message into a later turn
            own = [place for place, mark in enumerate(marks) if mark.message == index]
            if own != list(range(own[0], own[-1] + 1)):
                raise RowError(UNKNOWN, f"other messages are written inside message {index}")
            before = marks[own[0] - 1].position if own[0] else 0
            last = marks[own[-1]].position
            following = marks[own[-1] + 1].position if own[-1] + 1 < len(marks) else len(text)
            start = before + self._start(text[before:last], messages[:index], tools)
            length, closed = self._end(text[last:following], messages, index, tools)
            if turns and turns[-1].end > start:
                raise RowError(UNKNOWN, f"the turn of message {index} overlaps the one before")
            turns.append(Turn(start, last + length, closed))
        return turns

    def _start(self, gap: str, earlier: Messages, tools: list | None) -> int:
        """Length of what the template writes between the earlier messages and the turn in `gap`."""
        header = self.template.after(earlier, tools, prompt=True)
        closed = self.template.after(earlier, tools, prompt=False)
        if header != closed and gap.startswith(header):
            return len(header)
        # Either the generation prompt says more than the template writes before turns of the past (an opened
        # <think>), or the template knows no generation prompt: turns of different content show the header.
        turns = [[*earlier, _probe("assistant", content)] for content in _PROBES]
        last = len(earlier) - 1
        rendered = [self.template.after(turn, tools, prompt=False, last=last) for turn in turns]
        shared = _shared_start(*rendered)
        if header == closed:
            # a mere space before the content is the model's to write: it belongs to the content's first token
            header = shared if shared[len(closed) :].strip() else closed
        else:
            self._prompts_more = True
            header = _shared_start(header, shared)
        if not header or not header.startswith(closed) or not gap.startswith(header):
            raise RowError(UNKNOWN, "the generation prompt is not what comes before the turn")
        return len(header)

    def _end(self, after: str, messages: Messages, index: int, tools: list | None) -> tuple[int, bool]:
        """Length of what belongs to the turn after its last mark, and whether it is closed."""
        final = index == len(messages) - 1
        if messages[index].get("tool_calls"):
            tail = after if final else self.template.after(messages[: index + 1], tools, prompt=False)
            end = self._end_of_call(tail)
            if end is None or not after.startswith(tail[:end]):
                raise RowError(UNKNOWN, f"no end was found of the tool call in message {index}")
            return end, bool(self.end_text) or end == len(tail.rstrip())
        space = len(after) - len(after.lstrip())
        found = self._added.match(after, space)
        if found and (final or found.group() in self._closers):
            return found.end(), True
        if self.end_text and not self.end_is_token and after.startswith(self.end_text, space):
            return space + len(self.end_text), True
        content = messages[index]["content"]
        own = content[len(content.rstrip()) :]  # spaces that end the content, where the template keeps them
        return (len(own) if after.startswith(own) else 0), False

    def _end_of_call(self, tail: str) -> int | None:
        """Where a tool call's turn ends in `tail`, the end of a text whose last message it is."""
        if tail.endswith(self._tail):
            return len(tail) - len(self._tail) + self._tail_end
        stripped = tail.rstrip()
        ends = [found.end() for found in self._added.finditer(stripped)]
        return len(stripped) if ends and ends[-1] == len(stripped) else None

    def _learn_ends(self) -> None:
        """Learns from one exchange how turns end."""
        user = [_probe("user")]
        self._tail = self.template.after([*user, _probe("assistant")], None, prompt=False)
        space = len(self._tail) - len(self._tail.lstrip())
        found = self._added.match(self._tail, space)
        self.end_text, self.end_is_token = (found.group(), True) if found else (self._tail.strip(), False)
        self._tail_end = space + len(self.end_text) if self.end_text else 0
        self._closers = {self.end_text} if found else set()
        # An assistant's turn of the past may end otherwise than the last one: by the token that ends the
        # user's turns too. A token that opens the next header is none.
        prompt = self.template.after(user, None, prompt=True)
        closed = self.template.after(user, None, prompt=False)
        header = prompt[len(_shared_start(prompt, closed)) :]
        user_end = self._added.match(prompt.lstrip())
        if user_end and user_end.group() not in header:
            self._closers.add(user_end.group())

    def call_end(self) -> str | None:
        """The token that ends a turn with a tool call, None where the template writes no calls."""
        call = {"type": "function", "function": {"name": "probe", "arguments": {"a": _PROBES[0]}}}
        messages: Messages = [_probe("user"), {**_probe("assistant", ""), "tool_calls": [call]}]
        try:
            tail = self.template.after(messages, None, prompt=False)
        except RowError:
            return None
        end = self._end_of_call(tail)
        tokens = self._added.findall(tail[:end]) if end is not None else []
        return tokens[-1] if tokens and tail[:end].endswith(tokens[-1]) else None


def _shared_start(*texts: str) -> str:
    first, last = min(texts), max(texts)  # what these two share, all between them in order share too
    differing = (place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    return first[: next(differing, len(first))]


def _probe(role: str, content: str = f"{_PROBES[0]}.") -> dict[str, str]:
    return {"role": role, "content": content}


def _interleave(literals: list[str], contents: list[str]) -> str:
    parts = [*literals, *contents]
    parts[0::2], parts[1::2] = literals, contents
    return "".join(parts)
