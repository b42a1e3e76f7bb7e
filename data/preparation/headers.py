"""What a chat template writes around an assistant's turn, learned from short conversations made up for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from data.preparation.chat_template import ChatTemplate, Rendered
from data.preparation.conversation import Messages, RowError

UNKNOWN = "turns cannot be located"  # the reason of rows whose mask would be a guess
_USER, _ANSWER = {"role": "user", "content": "Alpha."}, {"role": "assistant", "content": "Beta."}
_THOUGHT = {**_ANSWER, "thinking": "Gamma.", "reasoning_content": "Gamma."}
# an id of nine characters, which is what some templates ask for
_FUNCTION = {"type": "function", "id": "call00000", "function": {"name": "delta", "arguments": {"x": "Epsilon."}}}
_CALL = {"role": "assistant", "content": "", "tool_calls": [_FUNCTION]}
_RESULT = {"role": "tool", "content": "Zeta.", "name": "delta", "tool_call_id": "call00000"}
_SCHEMA = {"type": "object", "properties": {"x": {"type": "string", "description": "any text"}}, "required": ["x"]}
_TOOLS = [{"type": "function", "function": {"name": "delta", "description": "a function", "parameters": _SCHEMA}}]


@dataclass(frozen=True)
class Learned:
    """How turns begin and end in one template under one set of its arguments."""

    headers: tuple[str, ...]  # texts after which a turn starts, wherever they stand
    bare: tuple[str, ...]  # texts after which one starts without a header of its own, as after a tool's answer
    fillers: frozenset[str]  # what every turn has between header and content, and is the template's to write
    closers: frozenset[str]  # tokens that end turns
    openers: frozenset[str]  # tokens that open what comes after a turn
    end_words: str  # words that end turns where no token does
    ends: tuple[str, ...]  # the tokens at which generation has to stop, the one after a last answer first
    prompt_thinks: bool  # the generation prompt opens the thinking itself
    added: re.Pattern

    def header_length(self, gap: str, own: str, message: int) -> int:
        """How much of what stands before a message belongs to its header or to earlier turns.

        gap: the text before the message's first character. own: the text that follows, which may continue the
        generation prompt (an opened <think>), and then the length reaches into it. Raises RowError.
        """
        places = [((gap + own[: len(header) - 1]).rfind(header), header) for header in self.headers]
        found = max((place + len(header) for place, header in places if place >= 0), default=None)
        if found is None:
            found = next((len(bare) for bare in self.bare if gap.startswith(bare)), None)
        if found is None:
            raise RowError(UNKNOWN, f"before message {message} stands no header of an assistant's turn")
        return len(gap) if gap[found:] in self.fillers else found

    def ending(self, after: str, message: int, *, called: bool) -> tuple[int, bool]:
        """Length of what belongs to a turn after its last character, and whether it is closed.

        A call is closed by the template before its turn is, so that one without an end is refused (RowError).
        """
        for found in self.added.finditer(after):
            if found.group() in self.closers:
                return found.end(), True
            if found.group() in self.openers:
                break
        space = len(after) - len(after.lstrip())
        if self.end_words and (after.startswith(self.end_words, space) or (called and self.end_words in after)):
            return after.index(self.end_words) + len(self.end_words), True
        if called:
            raise RowError(UNKNOWN, f"no end was found of the tool call in message {message}")
        return 0, False


def learn(template: ChatTemplate, added: re.Pattern, arguments: dict[str, Any]) -> Learned:
    """Learns a template. Raises RowError where it does not show a question with its answer."""

    always: list | None = None  # tools for every conversation

    def render(messages: Messages, tools: list | None = None, prompt: bool = False) -> Rendered:
        return template.render(template.prepared(messages), tools or always, arguments, prompt=prompt)

    def attempt(*messages: dict[str, Any], tools: list | None = None, prompt: bool = False) -> Rendered | None:
        try:
            return render(list(messages), tools, prompt)
        except RowError:
            return None

    last = attempt(_USER, _ANSWER)
    if last is None:  # a template for conversations with tools alone
        always = _TOOLS
        last = render([_USER, _ANSWER])
    middle = attempt(_USER, _ANSWER, _USER, _ANSWER)
    prompted, unprompted = render([_USER], prompt=True), render([_USER])
    texts = [_before(one, 1) for one in (last, middle) if one is not None]
    prompt = _after(prompted, 0)
    headers, fillers = _headers(prompt, knows_prompt=prompt != _after(unprompted, 0), texts=texts, added=added)
    tail, between = _after(last, 1), _after(middle, 1) if middle is not None else ""
    contexts = [
        (attempt(_ANSWER, _USER), 0),
        (attempt(_USER, _ANSWER, {**_ANSWER, "content": "Eta."}), 2),
        (attempt({**_USER, "role": "system"}, _ANSWER, _USER), 1),
    ]
    called = attempt(_USER, _CALL, tools=_TOOLS) or attempt(_USER, _CALL)
    answered = attempt(_USER, _CALL, _RESULT, _ANSWER, tools=_TOOLS) or attempt(_USER, _CALL, _RESULT, _ANSWER)
    gaps = [_before(one, message) for one, message in contexts if one is not None and _writes(one, message)]
    bare = []
    if answered is not None and _writes(answered, 3):
        gaps.append(_before(answered, 3))
        if not any(_shrunk(header, gaps[-1]) in gaps[-1] for header in headers):
            bare.append(gaps.pop().rstrip(" "))
    cores = {min((_shrunk(header, gap) for gap in gaps), key=len, default=header) for header in headers}

    end = added.search(tail)
    closers = {end.group()} if end else set()
    first_user = list(added.finditer(_before(last, 0)))
    openers = {token for core in cores for token in _opening(core, added)} | {one.group() for one in first_user[-1:]}
    ends = [end.group()] if end else []
    if called is not None and _writes(called, 1):
        ends += _call_end(_after(called, 1), closers, added)
    if (token_between := added.search(between)) and token_between.group() not in openers - closers:
        ends.append(token_between.group())
    inner = _inside(attempt(_USER, _THOUGHT), added)
    return Learned(
        headers=tuple(sorted(cores, key=len, reverse=True)),
        bare=tuple(bare),
        fillers=frozenset(fillers),
        closers=frozenset(closers | set(ends)),
        openers=frozenset(openers - closers - set(ends)),
        end_words="" if end else tail.strip(),
        ends=tuple(dict.fromkeys(token for token in ends if token not in inner)),
        prompt_thinks=prompt.rstrip().endswith("<think>"),
        added=added,
    )


def _headers(prompt: str, *, knows_prompt: bool, texts: list[str], added: re.Pattern) -> tuple[set[str], set[str]]:
    """Headers of turns after a question, and what lies between each of them and the content.

    texts: what stands between a question and its answer, for the last turn and for an earlier one. Where the
    template knows a generation prompt, a header is what that and the text share; else it is the text itself.
    """
    if not knows_prompt:
        # a mere space before the content is the model's to write: it belongs to the content's first token
        return {_shared_start(*texts).rstrip(" ")}, set()
    headers = {prompt, *(_shared_start(prompt, text) for text in texts)}
    rests = {text[len(_shared_start(prompt, text)) :] for text in texts}
    (rest,) = rests if len(rests) == 1 else ("",)
    return headers, {rest} if rest.strip(" ") and not added.search(rest) else set()


def _shrunk(header: str, gap: str) -> str:
    """The longest end of a header that stands in a gap too, if its last word is in it; else the header."""
    words = re.findall(r"\w+", header)
    for start in range(len(header)):
        if header[start:] in gap:
            return header[start:] if words and words[-1] in header[start:] else header
    return header


def _opening(header: str, added: re.Pattern) -> list[str]:
    """Tokens of a header, without those that close what comes before: another token follows them directly."""
    found = list(added.finditer(header))
    starts = [after.start() for after in found[1:]]
    closing = {one.end() for one, start in zip(found, starts, strict=False) if not header[one.end() : start].strip()}
    return [one.group() for one in found if one.end() not in closing]


def _call_end(tail: str, closers: set[str], added: re.Pattern) -> list[str]:
    """The token that ends a last turn with a call: one that ends answers, or else the one that ends the text."""
    found = list(added.finditer(tail))
    known = [one.group() for one in found if one.group() in closers][:1]
    last = [found[-1].group()] if found and not tail[found[-1].end() :].strip() else []
    return known or last


def _inside(rendered: Rendered | None, added: re.Pattern) -> set[str]:
    """Tokens between the thinking and the content of one turn, at which generation must not stop."""
    if rendered is None:
        return set()
    keys = {number: part.key for number, part in enumerate(rendered.parts) if part.message == 1}
    runs = [run for run in rendered.runs if run.part in keys and run.stop > run.start]
    if len(runs) < 2:
        return set()
    return set(added.findall(rendered.text[runs[0].stop : runs[-1].start]))


def _places(rendered: Rendered, message: int) -> list[tuple[int, int]]:
    return [
        (run.start, run.stop)
        for run in rendered.runs
        if run.stop > run.start and rendered.parts[run.part].message == message
    ]


def _writes(rendered: Rendered, message: int) -> bool:
    return bool(_places(rendered, message))


def _before(rendered: Rendered, message: int) -> str:
    """The text between what comes before a message and its first character. Raises RowError where it has none."""
    places = _places(rendered, message)
    if not places:
        raise RowError("left out by the chat template", f"message {message}")
    start = places[0][0]
    earlier = [run.stop for run in rendered.runs if run.stop <= start and run.stop > run.start]
    return rendered.text[max(earlier, default=0) : start]


def _after(rendered: Rendered, message: int) -> str:
    """The text between the last character of a message and what comes after it. Raises RowError where it has none."""
    places = _places(rendered, message)
    if not places:
        raise RowError("left out by the chat template", f"message {message}")
    stop = places[-1][1]
    later = [run.start for run in rendered.runs if run.start >= stop and run.stop > run.start]
    return rendered.text[stop : min(later, default=len(rendered.text))]


def _shared_start(*texts: str) -> str:
    first, last = min(texts), max(texts)  # what these two share, all between them in order share too
    differing = (place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    return first[: next(differing, min(len(first), len(last)))]
