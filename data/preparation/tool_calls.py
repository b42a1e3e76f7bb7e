"""Tools and calls as chat templates expect them: nested under `function`, arguments an object instead of its JSON."""

import json
from typing import Any

from data.preparation.columns import Columns, Fields, lacking, listing
from data.preparation.conversation import Messages, RowError
from data.preparation.values import as_list, as_text, described, from_json, is_blank, shown

_BAD_CALL, _BAD_TOOLS = "malformed tool call", "malformed tools"
CALLS, OUTPUT = "tool_calls", "tool_output"  # columns beside question and answer that are taken without being told
_ARGUMENTS = ("arguments", "parameters")  # the second as some models write calls
_BESIDE = ("name", "id", "type", "index", "function", "description")  # keys of a call that hold no arguments


def read_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """The calls of a list, or of one call alone; `where` says in errors whose they are. Raises RowError."""
    if is_blank(value):
        return []
    return [read_call(call, where) for call in as_list(value, "tool_calls", or_one=True)]


def read_call(call: Any, where: str) -> dict[str, Any]:
    """One call, given nested or flat, as an object or as its JSON. Raises RowError."""
    if isinstance(call, str):
        call = from_json(call, _BAD_CALL, f"a tool call of {where}")
    if not isinstance(call, dict):
        raise RowError(_BAD_CALL, f"a tool call of {where} is {described(call)}, an object is needed")
    kind = call.get("type")
    if kind not in (None, "function"):
        raise RowError(_BAD_CALL, f"the type of a tool call of {where} is {shown(kind)}, only function is taken")
    function = call if call.get("function") is None else call["function"]
    if not isinstance(function, dict) or not _is_name(function.get("name")):
        raise RowError(_BAD_CALL, f"a tool call of {where} has no function name")
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    call = {"name": function["name"], "arguments": _arguments(function, where)}
    return {**identity, "type": "function", "function": call}


def _arguments(function: dict[str, Any], where: str) -> dict[str, Any]:
    given = next((function[name] for name in _ARGUMENTS if function.get(name) is not None), None)
    if given is None:
        others = [name for name, value in function.items() if name not in _BESIDE and value is not None]
        if others:
            raise RowError(_BAD_CALL, f"a tool call of {where} has no `arguments`, but {listing(others)}")
    elif isinstance(given, str) and given.strip():
        given = from_json(given, _BAD_CALL, f"`arguments` of a tool call of {where}")
    if is_blank(given):
        return {}
    if not isinstance(given, dict):
        raise RowError(_BAD_CALL, f"`arguments` of a tool call of {where} is {described(given)}, an object is needed")
    return given


def read_tools(value: Any, name: str = "tools") -> list[dict[str, Any]] | None:
    """The JSON schemas of a row's tools, None where it has none. Raises RowError.

    A list, or one tool alone, or a list under `functions` or `tools`, or the JSON of any; a tool may be its JSON, or
    the schema of a function without the object of type `function` around it.
    """
    if is_blank(value):
        return None
    if isinstance(value, str):
        value = from_json(value, _BAD_TOOLS, name)
    if isinstance(value, dict):
        value = next((value[key] for key in ("functions", "tools") if isinstance(value.get(key), list)), [value])
    if not isinstance(value, list):
        raise RowError(_BAD_TOOLS, f"{name} is {described(value)}, a list of JSON schemas is needed")
    return [_tool(tool, f"tool {number} of {name}") for number, tool in enumerate(value)] or None


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if isinstance(tool, str):
        tool = from_json(tool, _BAD_TOOLS, where)
    if not isinstance(tool, dict):
        raise RowError(_BAD_TOOLS, f"{where} is {described(tool)}, a JSON schema is needed")
    kind = tool.get("type")
    if kind not in (None, "function"):
        raise RowError(_BAD_TOOLS, f"the type of {where} is {shown(kind)}, only function is taken")
    if tool.get("function") is None:
        tool = {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
    elif kind is None:
        tool = {"type": "function", **{key: value for key, value in tool.items() if key != "type"}}
    function = tool["function"]
    if not isinstance(function, dict) or not _is_name(function.get("name")):
        raise RowError(_BAD_TOOLS, f"{where} has no function name")
    parameters = function.get("parameters")
    if isinstance(parameters, str):
        parameters = from_json(parameters, _BAD_TOOLS, f"`parameters` of {where}")
        tool = {**tool, "function": {**function, "parameters": parameters}}
    if parameters is not None and not isinstance(parameters, dict):
        raise RowError(_BAD_TOOLS, f"`parameters` of {where} is {described(parameters)}, an object is needed")
    return tool


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def turns_from_columns(columns: Columns, fields: Fields) -> Messages:
    """The turns between question and answer of a row that holds calls, and what they gave back, in columns.

    Where the row has outputs, each call is an assistant's turn with a tool's turn after it. Calls alone are one
    assistant's turn. A row that calls nothing gives no turns. Raises RowError.
    """
    called = fields.tool_name or fields.tool_calls or CALLS
    output = fields.tool_output or OUTPUT
    if fields.tools and called not in columns.row:
        flag = "--fields.tool-name" if fields.tool_name else "--fields.tool-calls"
        raise lacking(columns.names, called, f"{flag} must name one of them")
    if is_blank(columns.take(called)):
        return []
    calls = _calls_by_name(columns, fields) if fields.tool_name else read_calls(columns.take(called), called)
    calls = [{"id": f"call_{number}", **call} for number, call in enumerate(calls)]
    if fields.tool_output and output not in columns.row:
        raise lacking(columns.names, output, "--fields.tool-output must name one of them")
    value = columns.take(output)
    if value is None:
        if fields.tool_output:
            raise RowError("no tool output", f"{called} has a call, and {output} is null")
        return [_calling(calls)]
    turns = []
    for call, text in zip(calls, _outputs(value, len(calls), called, output), strict=True):
        turns += [_calling([call]), _answering(call, text)]
    return turns


def _calling(calls: list[dict[str, Any]]) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _answering(call: dict[str, Any], text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": call["id"], "name": call["function"]["name"]}


def _calls_by_name(columns: Columns, fields: Fields) -> list[dict[str, Any]]:
    """The one call whose name and arguments stand in columns; a text that is no object is the argument `input`."""
    assert fields.tool_name and fields.tool_input, "Fields checks it"
    if fields.tool_input not in columns.row:
        raise lacking(columns.names, fields.tool_input, "--fields.tool-input must name one of them")
    name, arguments = columns.text(fields.tool_name), columns.take(fields.tool_input)
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else {"input": arguments}
    return [read_call({"name": name, "arguments": arguments}, fields.tool_name)]


def _outputs(value: Any, calls: int, called: str, output: str) -> list[str]:
    """As many texts as there are calls; text and a value that is no list belong to one call."""
    values = value
    if isinstance(value, str) and calls > 1:
        try:
            values = json.loads(value)
        except (ValueError, RecursionError):
            values = value
    if not isinstance(values, list) or (calls == 1 and len(values) != 1):
        values = [value]
    if len(values) != calls:
        there = "there is one output" if len(values) == 1 else f"there are {len(values)} outputs"
        raise RowError(_BAD_CALL, f"{called} has {calls} calls, and {there} in {output}")
    if any(one is None for one in values):
        raise RowError("no tool output", f"{output} has a null among the outputs of {called}")
    return [as_text(one, "not text", output) for one in values]
