"""Rows of a data set -> conversations: messages in OpenAI's chat form, checked and made uniform."""

import json
from dataclasses import dataclass
from typing import Any

from data.preparation.conversation import Conversation, RowError
from data.preparation.prompt import Prompt

_CHOICE = "with --fields.question and --fields.answer"
ROLES = ("system", "developer", "user", "assistant", "tool")
# (question, answer) columns that are taken without being told
PAIRS = (
    ("input", "output"),
    ("problem", "solution"),
    ("problem", "generated_solution"),
    ("question", "answer"),
)
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a turn's thinking


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Names of the columns of question-and-answer rows, where they are none of the usual ones."""

    question: str | None = None
    """Column with the question, e.g. `prompt`."""
    answer: str | None = None
    """Column with the answer, e.g. `completion`."""
    tool_name: str | None = None
    """Column with the name of the tool that is called between question and answer, empty where none is."""
    tool_input: str | None = None
    """Column with the call's arguments: an object, its JSON, or text, which becomes the argument `input`."""
    tool_calls: str | None = None
    """Column with calls in OpenAI's form, instead of a name and an input."""
    tool_output: str | None = None
    """Column with what the tool gave back."""

    def __post_init__(self) -> None:
        by_name = bool(self.tool_name), bool(self.tool_input)
        if any(by_name) and (not all(by_name) or self.tool_calls):
            raise ValueError(
                "--fields.tool-name and --fields.tool-input belong together, or --fields.tool-calls instead"
            )
        if (by_name[0] or bool(self.tool_calls)) != bool(self.tool_output):
            raise ValueError("--fields.tool-output belongs to a call, and a call to it: give both")


def to_conversation(row: Any, fields: Fields = Fields(), prompt: Prompt | None = None) -> Conversation:
    """The conversation of one row.

    `messages` are taken where the row has them, unless a prompt or a field's name asks for the
    question and the answer. Raises RowError for a row that cannot be used.
    """
    if not isinstance(row, dict):
        raise RowError("not an object", f"a row must be a JSON object, this is a {type(row).__name__}")
    if not row:
        raise RowError("empty row")
    if row.get("messages") is not None and prompt is None and fields == Fields():
        listed = _list(row["messages"], "messages")
        messages = [_message(message, index) for index, message in enumerate(listed)]
        tools = _tools(row.get("tools"))
    else:
        question, answer = _pair(row, fields)
        if prompt is None:
            messages = [{"role": "user", "content": _text(row, question)}]
        else:
            messages = _prompted(prompt, row)
        messages += _tool_turns(row, fields)
        messages.append({"role": "assistant", "content": _text(row, answer)})
        tools = None
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise RowError("no assistant turn", f"the roles are {', '.join(roles) or 'none'}")
    return Conversation(messages, tools)


def _pair(row: dict, fields: Fields) -> tuple[str, str]:
    """Names of the question's and the answer's columns in this row."""
    pairs = [(fields.question or question, fields.answer or answer) for question, answer in PAIRS]
    found = [pair for pair in dict.fromkeys(pairs) if pair[0] in row and pair[1] in row]
    if len(found) == 1:
        return found[0]
    if found:
        choices = " or ".join(f"{question}/{answer}" for question, answer in found)
        raise RowError("ambiguous fields", f"the row has {choices}: choose {_CHOICE}")
    raise RowError("unknown fields", f"the row has {', '.join(map(str, row))}: name two of them {_CHOICE}")


def _tool_turns(row: dict, fields: Fields) -> list[dict[str, Any]]:
    """The call of a row's tool and what the tool gave back; nothing where the row calls none."""
    called = fields.tool_calls or fields.tool_name
    if called is None:
        return []
    for name in (called, fields.tool_input or called, fields.tool_output):
        if name not in row:
            raise RowError("unknown fields", f"the row has {', '.join(map(str, row))}, and no {name}")
    if row[called] in (None, "", "null", "[]", []):
        return []
    if fields.tool_calls:
        listed = _list(row[called], "tool_calls", or_one=True)
    else:
        listed = [{"name": _text(row, called), "arguments": _arguments(row[fields.tool_input])}]
    if len(listed) != 1:
        raise RowError("malformed tool call", f"{called} has {len(listed)} calls, and there is one output")
    call = {"id": "call_0", **_tool_call(listed[0], 1)}
    output = row[fields.tool_output]
    if output is None:
        raise RowError("no tool output", f"{called} has a call, and {fields.tool_output} is null")
    text = output if isinstance(output, str) else json.dumps(output, ensure_ascii=False)
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": text, "tool_call_id": call["id"], "name": call["function"]["name"]},
    ]


def _arguments(value: Any) -> Any:
    """A call's arguments as an object; a text that is none, such as a program, is the argument `input`."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = None
    return parsed if isinstance(parsed, dict) else {"input": value}


def _prompted(prompt: Prompt, row: dict) -> list[dict[str, Any]]:
    try:
        return prompt.messages(row)
    except ValueError as error:
        raise RowError("missing prompt field", str(error)) from error


def _text(row: dict, name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise RowError("not text", f"{name} is {_kind(value)}, a string is needed")
    if not value.strip():
        raise RowError("empty text", f"{name} is empty")
    return value


def _message(message: Any, index: int) -> dict[str, Any]:
    """One checked message; columns that a table filled with nulls are left out."""
    if not isinstance(message, dict):
        raise RowError("malformed message", f"message {index} is {_kind(message)}, an object is needed")
    message = {key: value for key, value in message.items() if value is not None}
    role = message.get("role")
    if role not in ROLES:
        raise RowError("unknown role", f"message {index} has role {role!r}, known are {', '.join(ROLES)}")
    calls = _list(message.pop("tool_calls", []), "tool_calls")
    if calls and role != "assistant":
        raise RowError("malformed tool call", f"message {index} calls a tool but its role is {role}")
    message["content"] = _content(message.get("content", ""), index)
    if calls:
        message["tool_calls"] = [_tool_call(call, index) for call in calls]
    reasoning = next((message[name] for name in REASONING if name in message), None)
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise RowError("not text", f"the thinking of message {index} is {_kind(reasoning)}")
        # the same two names that transformers gives templates
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    if role in ("user", "assistant") and not calls and not message["content"].strip():
        raise RowError("empty text", f"message {index} ({role}) is empty")
    return message


def _content(content: Any, index: int) -> str:
    """Content as one string: a list of text parts is joined, since most templates take strings only."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError("not text", f"the content of message {index} is {_kind(content)}, a string is needed")
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else _kind(part)
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RowError("not text", f"message {index} has a part of type {kind}, only text is taken")
    return "".join(part["text"] for part in content)


def _tool_call(call: Any, index: int) -> dict[str, Any]:
    """A call as templates expect it: nested under `function`, the arguments an object instead of its JSON."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError("malformed tool call", f"a tool call of message {index} has no function name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise RowError("malformed tool call", f"the arguments in message {index} are not JSON") from error
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise RowError("malformed tool call", f"the arguments in message {index} are {_kind(arguments)}")
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    tools = _list(tools, "tools") if tools is not None else []
    if not all(isinstance(tool, dict) for tool in tools):
        raise RowError("malformed tools", "tools must be a list of JSON schemas")
    return tools or None


def _list(value: Any, name: str, or_one: bool = False) -> list:
    """A list (or an object, where it may be one alone), which tables often hold as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError(f"malformed {name}", f"{name} is text that is not JSON") from error
    if or_one and isinstance(value, dict):
        return [value]
    if not isinstance(value, list):
        raise RowError(f"malformed {name}", f"{name} is {_kind(value)}, a list is needed")
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"
