"""Chat templates: messages -> text, and the places in that text where the messages end."""

import re
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
from transformers.utils.chat_template_utils import _compile_jinja_template

from data.preparation.conversation import Messages, RowError

_MARK = 0xF0000  # message i is marked with the character _MARK + i (Supplementary Private Use Area-A)
_MARKS = re.compile("[\U000f0000-\U000ffffd]")
UNKNOWN = "turns cannot be located"  # the reason of rows whose mask would be a guess


class Mark(NamedTuple):
    """The end of a string of message `message`, at character `position` of the text."""

    message: int
    position: int


class ChatTemplate:
    """One compiled template with the special tokens that it knows by name (`bos_token`, ...).

    `now` is the date that a template which asks for one is given, so that a run that is continued a day
    later gives the same text. Raises ValueError for a template that is not Jinja.
    """

    def __init__(self, source: str, special_tokens: dict[str, Any], now: datetime | None = None):
        try:
            self._template = _compile_jinja_template(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not Jinja: {error.message} (line {error.lineno})") from error
        today = now or datetime.now()
        self._variables = {**special_tokens, "strftime_now": today.strftime, "documents": None}
        self.knows_developer = "developer" in source

    def render(self, messages: Messages, tools: list | None = None, prompt: bool = False) -> str:
        """The text of a conversation, with the header of the next assistant's turn if `prompt`.

        Raises RowError where the template refuses it.
        """
        try:
            return self._template.render(
                messages=messages, tools=tools, add_generation_prompt=prompt, **self._variables
            )
        except (jinja2.TemplateError, TypeError, LookupError, AttributeError, ValueError) as error:
            raise RowError("refused by the chat template", str(error)) from error

    def marks(self, text: str, messages: Messages, tools: list | None, prompt: bool = False) -> list[Mark]:
        """Where the strings of the messages end in their text, in its order.

        Found by rendering once more with a mark, one private-use character, at the end of every string.
        Raises RowError where that changes anything else, or where the template leaves a message out.
        """
        if _MARKS.search(text):
            raise RowError(UNKNOWN, "the row holds private-use characters U+F0000 to U+FFFFD")
        marked = [_marked(message, chr(_MARK + index)) for index, message in enumerate(messages)]
        marked_text = self.render(marked, tools, prompt)
        if _MARKS.sub("", marked_text) != text:
            raise RowError(UNKNOWN, "the template's text depends on how a message ends")
        marks = [
            Mark(ord(found.group()) - _MARK, found.start() - count)
            for count, found in enumerate(_MARKS.finditer(marked_text))
        ]
        seen = {mark.message for mark in marks}
        for index, message in enumerate(messages):
            if index not in seen and (message["content"].strip() or message.get("tool_calls")):
                raise RowError("left out by the chat template", f"message {index} ({message['role']})")
        return marks

    def after(self, messages: Messages, tools: list | None, prompt: bool, last: int | None = None) -> str:
        """The text after the end of the messages up to number `last` (all of them unless given)."""
        text = self.render(messages, tools, prompt)
        marks = self.marks(text, messages, tools, prompt)
        positions = [mark.position for mark in marks if last is None or mark.message <= last]
        return text[max(positions, default=0) :]


def _marked(message: dict[str, Any], mark: str) -> dict[str, Any]:
    """The message with a mark at the end of its strings, before spaces that a template may trim."""
    marked = {}
    for key, value in message.items():
        if key == "tool_calls":
            value = [{**call, "function": _mark_function(call["function"], mark)} for call in value]
        elif key in ("content", "thinking", "reasoning_content"):
            value = _mark(value, mark)
        marked[key] = value
    return marked


def _mark_function(function: dict[str, Any], mark: str) -> dict[str, Any]:
    return {key: _mark(value, mark) for key, value in function.items()}  # these keys are the template's words


def _mark(value: Any, mark: str) -> Any:
    if isinstance(value, str):
        core = value.rstrip()
        return core + mark + value[len(core) :] if core else value
    if isinstance(value, dict):
        return {_mark(key, mark): _mark(one, mark) for key, one in value.items()}
    if isinstance(value, list):
        return [_mark(one, mark) for one in value]
    return value
