"""Chat templates: messages -> text in which every character of a message is known (`tracked`)."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
from transformers.utils.chat_template_utils import _compile_jinja_template

from data.preparation.conversation import Messages, RowError
from data.preparation.tracked import Run, Tracked, TrackedDict, concat, filter_join, str_join, to_json

# Zero-length runs of these "parts" stand at the ends of what {% generation %} encloses.
GENERATION_STARTS, GENERATION_ENDS = -2, -3
# Strings of a message that the template has to write somewhere; all others, such as ids, it may leave out.
NEEDED = ("content", "function_calls", "functions")
THINKING = ("reasoning_content", "thinking")
# keys of a call's parts: its message may have a `name` of its own
CALL_NAME, CALL_ARGUMENTS = "call's name", "call's arguments"
_OF_CALL = {"name": CALL_NAME, "arguments": CALL_ARGUMENTS}
TOOL_ROLES = ("tool", "environment", "ipython", "observation", "function")  # names of what answers a call
# what a template compares roles with
_ROLE_TESTS = re.compile(r"\brole\b['\"]?\]?\s*(?:==|!=|not in|in)([^%}]*)")

# what a template raises by itself, or comes to by the values it is given
_REFUSALS = (jinja2.TemplateError, TypeError, LookupError, AttributeError, ValueError, ArithmeticError, RecursionError)


class Part(NamedTuple):
    """One string of a conversation: of message `message` (-1: of its tools), by its key there."""

    message: int
    key: str  # "content", CALL_NAME, ...
    text: str
    number: int = 0  # of the call or the tool


class Rendered(NamedTuple):
    """A conversation's text, the parts it was made of, and where their characters lie in it."""

    text: str
    runs: tuple[Run, ...]
    parts: list[Part]


class ChatTemplate:
    """One compiled template with the special tokens that it knows by name (`bos_token`, ...).

    `now` is the date that a template which asks for one is given, so that a run that is continued a day
    later gives the same text. Raises ValueError for a template that is not Jinja.
    """

    def __init__(self, source: str, special_tokens: dict[str, Any], now: datetime | None = None):
        try:
            self._template = _compile(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not Jinja: {error.message} (line {error.lineno})") from error
        today = now or datetime.now()
        self._variables = {**special_tokens, "strftime_now": today.strftime, "documents": None}
        self.has_markers = re.search(r"\{%-?\s*generation\b", source) is not None
        self._knows_developer = "developer" in source
        compared = " ".join(_ROLE_TESTS.findall(source))
        self._tool_role = next((role for role in TOOL_ROLES if re.search(rf"['\"]{role}['\"]", compared)), "tool")

    def prepared(self, messages: Messages) -> Messages:
        """The messages under the names of roles that this template knows."""
        names = {"tool": self._tool_role}
        if not self._knows_developer:  # the newer name of the system role
            names["developer"] = "system"
        if all(message["role"] not in names and "source_role" not in message for message in messages):
            return messages
        return [
            {key: names.get(value, value) if key == "role" else value for key, value in message.items()
             if key != "source_role"}
            for message in messages
        ]  # fmt: skip

    def render(
        self,
        messages: Messages,
        tools: list | None = None,
        arguments: dict[str, Any] | None = None,
        *,
        prompt: bool = False,
        string: Callable[[str, int], Tracked] = Tracked.whole,
    ) -> Rendered:
        """The text of a conversation, with the header of the next assistant's turn if `prompt`.

        `string` makes the strings that the template is given. Raises RowError where the template refuses it.
        """
        parts: list[Part] = []
        tracked = [_message(index, message, parts, string) for index, message in enumerate(messages)]
        listed = [_track(tool, -1, "tool", number, parts, string) for number, tool in enumerate(tools or ())]
        try:
            text = concat(
                self._template.root_render_func(
                    self._template.new_context(
                        {
                            **self._variables,
                            **(arguments or {}),
                            "messages": tracked,
                            "tools": listed or None,
                            "add_generation_prompt": prompt,
                        }
                    )
                )
            )
        except _REFUSALS as error:
            raise RowError("refused by the chat template", str(error)) from error
        return Rendered(str.__str__(text), text.runs if isinstance(text, Tracked) else (), parts)


@functools.lru_cache(maxsize=64)
def _compile(source: str) -> jinja2.Template:
    """The template in transformers' own sandbox, whose joining of strings keeps their origins."""
    environment = _compile_jinja_template("").environment.overlay()
    environment.concat = concat  # type: ignore[assignment]
    environment.filters = {**environment.filters, "tojson": to_json, "join": filter_join}
    for extension in environment.extensions.values():
        if hasattr(extension, "_generation_support"):
            extension._generation_support = _marked  # type: ignore[attr-defined]
    template = environment.from_string(source)
    template.root_render_func.__globals__["str_join"] = str_join  # what the operator ~ calls
    return template


@jinja2.pass_eval_context
def _marked(context: Any, caller: Callable[[], str]) -> str:
    start, end = (Tracked("", [Run(0, 0, part, -1)]) for part in (GENERATION_STARTS, GENERATION_ENDS))
    return concat([start, caller(), end])


def _message(index: int, message: dict[str, Any], parts: list[Part], string: Callable) -> dict[str, Any]:
    tracked = {}
    for key, value in message.items():
        if key == "tool_calls":
            value = [_call(index, number, call, parts, string) for number, call in enumerate(value)]
        elif isinstance(value, str) and key != "role":
            parts.append(Part(index, key, value))
            value = string(value, len(parts) - 1)
        tracked[key] = value
    return tracked


def _call(index: int, number: int, call: dict[str, Any], parts: list[Part], string: Callable) -> dict[str, Any]:
    function = call["function"]
    tracked = {
        key: _track(value, index, _OF_CALL[key], number, parts, string) if key in _OF_CALL else value
        for key, value in function.items()
    }
    return {**call, "function": tracked}


def _track(value: Any, index: int, key: str, number: int, parts: list[Part], string: Callable) -> Any:
    """A value whose strings, keys included, all are one part; so is an object without any."""
    parts.append(Part(index, key, value if isinstance(value, str) else "", number))
    return _strings(value, len(parts) - 1, string)


def _strings(value: Any, part: int, string: Callable) -> Any:
    if isinstance(value, str):
        return string(value, part)
    if isinstance(value, dict):
        tracked = TrackedDict({_strings(key, part, string): _strings(one, part, string) for key, one in value.items()})
        tracked.part = part
        return tracked
    if isinstance(value, list):
        return [_strings(one, part, string) for one in value]
    return value
