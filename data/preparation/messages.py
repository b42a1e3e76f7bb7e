"""Lists of messages, in the forms that people have, as one checked form: roles, text contents, calls, thinking."""

from typing import Any

from data.preparation.conversation import Messages, RowError
from data.preparation.tool_calls import read_call, read_calls
from data.preparation.values import as_list, described, from_json, is_blank, shown

MESSAGES = ("messages", "conversations", "conversation")  # names of the column
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")
# names of a role -> the role that templates know
ROLES = {role: role for role in KNOWN_ROLES} | {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "environment": "tool",
    "ipython": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
_CALLING = ("function_call", "tool_call")  # roles whose content is a call's JSON
_KEPT = ("environment",)  # names of a role that some templates ask for: kept as `source_role`
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a turn's thinking
FLAGS = ("weight", "train", "training", "loss_mask")  # keys that say whether an assistant's turn is trained


def read_messages(value: Any, name: str = "messages") -> tuple[Messages, frozenset[int]]:
    """The messages of a column, and the numbers of the assistant's that are not to be trained. Raises RowError."""
    messages: Messages = []
    untrained = set()
    for index, one in enumerate(as_list(value, name)):
        where = f"message {index}" if name in MESSAGES else f"message {index} of {name}"
        message, trained = _message(one, where)
        messages.append(message)
        if not trained:
            untrained.add(index)
    return messages, frozenset(untrained)


def _message(message: Any, where: str) -> tuple[dict[str, Any], bool]:
    """One checked message, and whether it is to be trained; keys whose value is null are left out."""
    if not isinstance(message, dict):
        raise RowError("malformed message", f"{where} is {described(message)}, an object is needed")
    if _is_plain(message):
        return dict(message), True
    message = {key: value for key, value in message.items() if value is not None}
    for name, other in (("role", "from"), ("content", "value")):
        if name not in message and other in message:
            message[name] = message.pop(other)
    given = message.get("role")
    named = given.strip().lower() if isinstance(given, str) else ""
    role = ROLES.get(named)
    if role is None:
        raise RowError("unknown role", f"the role of {where} is {shown(given)}, known are {', '.join(KNOWN_ROLES)}")
    message["role"] = role
    if named in _KEPT:
        message["source_role"] = named
    trained = _is_trained(message, where)
    message["content"] = _content(message.get("content", ""), where)
    calls = _calls(message, named, where)
    if calls:
        message["tool_calls"] = calls
    written = _written_call(message, where)
    if role in ("user", "assistant") and not calls and not written and not message["content"].strip():
        raise RowError("empty text", f"{where} ({role}) is empty")
    return _with_thinking(message, where), trained


def _is_plain(message: dict[str, Any]) -> bool:
    """Whether a message is as most are, a role and some text, so that there is nothing to check or change."""
    role, content = message.get("role"), message.get("content")
    return len(message) == 2 and role in KNOWN_ROLES and isinstance(content, str) and bool(content.strip())


def _is_trained(message: dict[str, Any], where: str) -> bool:
    """What the flags of an assistant's message say. They are taken out of the message, whatever its role."""
    flags = {name: message.pop(name) for name in FLAGS if name in message}
    if not flags or message["role"] != "assistant":
        return True
    for name, value in flags.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RowError(
                "malformed training flag", f"{name} of {where} is {shown(value)}, only false, true, 0 and 1 are taken"
            )
    if len({bool(value) for value in flags.values()}) > 1:
        raise RowError("malformed training flag", f"{' and '.join(flags)} of {where} say different things")
    return all(flags.values())


def _content(content: Any, where: str) -> str:
    """Content as one string: a list of text parts is joined, since most templates take strings only."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError("not text", f"the content of {where} is {described(content)}, a string is needed")
    for part in content:
        if not isinstance(part, dict):
            raise RowError("not text", f"a part of {where} is {described(part)}, an object with its text is needed")
        kind = part.get("type")
        if kind not in (None, "text"):
            raise RowError("not text", f"the type of a part of {where} is {shown(kind)}, only text is taken")
        if not isinstance(part.get("text"), str):
            raise RowError("not text", f"the text of a part of {where} is {described(part.get('text'))}")
    return "".join(part["text"] for part in content)


def _calls(message: dict[str, Any], named: str, where: str) -> list[dict[str, Any]]:
    """The calls of a message, under `tool_calls`, `function_call` or in the content of a role of its own."""
    calls = read_calls(message.pop("tool_calls", None), where)
    former = message.pop("function_call", None)
    if not is_blank(former):
        if calls:
            raise RowError("malformed tool call", f"{where} has both tool_calls and function_call")
        calls = [read_call(former, where)]
    if named in _CALLING:
        if calls:
            raise RowError("malformed tool call", f"{where} has the role {named} and calls beside its content")
        calls = read_calls(from_json(message["content"], "malformed tool call", f"the call in {where}"), where)
        message["content"] = ""
    if calls and message["role"] != "assistant":
        raise RowError("malformed tool call", f"{where} calls a tool but its role is {message['role']}")
    return calls


def _written_call(message: dict[str, Any], where: str) -> bool:
    """Whether the message holds a call as text, under `function_calls`; `functions` beside it is text, too."""
    for name in ("function_calls", "functions"):
        if not isinstance(message.get(name, ""), str):
            raise RowError("not text", f"{name} of {where} is {described(message[name])}, a string is needed")
    written = message.get("function_calls", "").strip()
    if not written:
        message.pop("function_calls", None)
    elif message["role"] != "assistant":
        raise RowError("malformed tool call", f"{where} calls a tool but its role is {message['role']}")
    return bool(written)


def _with_thinking(message: dict[str, Any], where: str) -> dict[str, Any]:
    """The message with its thinking under the two names that transformers gives templates."""
    named = {name: message[name] for name in REASONING if name in message}
    if not named:
        return message
    for reasoning in named.values():
        if not isinstance(reasoning, str):
            raise RowError("not text", f"the thinking of {where} is {described(reasoning)}")
    said = {name: reasoning for name, reasoning in named.items() if reasoning.strip()}
    if len(set(said.values())) > 1:
        raise RowError("malformed message", f"{' and '.join(said)} of {where} are different thinking")
    reasoning = next(iter((said or named).values()))
    return {**message, "thinking": reasoning, "reasoning_content": reasoning}
