"""Tools and calls: a table of what is taken and what is refused, each with what becomes of it or the reason why."""

import json
from typing import Any

import pytest

from data.preparation.conversation import RowError
from data.preparation.formats import Fields, RowReader
from data.preparation.tool_calls import read_calls, read_tools

NESTED = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
EMPTY = {"type": "function", "function": {"name": "f", "arguments": {}}}
CALL = "malformed tool call"

# what stands under `tool_calls` of message 1 -> the calls, or the reason and a part of the detail
CALLS: list[tuple[Any, Any]] = [
    ([NESTED], [NESTED]),
    ([{**NESTED, "id": "a"}, {**NESTED, "id": "b"}], [{**NESTED, "id": "a"}, {**NESTED, "id": "b"}]),
    ([{"name": "f", "arguments": {"x": 1}}], [NESTED]),
    ([{"type": "function", "name": "f", "arguments": '{"x": 1}'}], [NESTED]),
    ([{"type": None, "function": {"name": "f", "arguments": '{"x": 1}'}, "id": None, "index": 0}], [NESTED]),
    ([{"function": None, "name": "f", "parameters": {"x": 1}}], [NESTED]),
    (NESTED, [NESTED]),
    (json.dumps([NESTED]), [NESTED]),
    ([json.dumps(NESTED)], [NESTED]),
    ([{"name": "f", "arguments": {"x": None, "y": [None]}}], [
        {"type": "function", "function": {"name": "f", "arguments": {"x": None, "y": [None]}}}
    ]),
    ([{"name": "f"}], [EMPTY]),
    ([{"name": "f", "arguments": None}], [EMPTY]),
    ([{"name": "f", "arguments": ""}], [EMPTY]),
    ([{"name": "f", "arguments": " {} "}], [EMPTY]),
    ([{"name": "f", "arguments": "null"}], [EMPTY]),
    ([{"name": "f", "arguments": {}, "status": "done"}], [EMPTY]),
    ([], []),
    (None, []),
    ("", []),
    ("null", []),
    ("[]", []),
    ({}, []),
    ([{"type": "custom", "custom": {"name": "f"}}], (CALL, "the type of a tool call of message 1 is 'custom', only f")),
    ([{"type": "code_interpreter", "name": "f"}], (CALL, "is 'code_interpreter', only function")),
    ([{"type": ["function"], "name": "f"}], (CALL, "the type of a tool call of message 1 is of type list")),
    ([{"id": "1"}], (CALL, "a tool call of message 1 has no function name")),
    ([{"function": {"name": " ", "arguments": {}}}], (CALL, "no function name")),
    ([{"function": {"name": 3}}], (CALL, "no function name")),
    ([{"function": "f", "arguments": {}}], (CALL, "no function name")),
    ([NESTED, None], (CALL, "a tool call of message 1 is null")),
    ([[NESTED]], (CALL, "a tool call of message 1 is of type list")),
    (["f(x=1)"], (CALL, "a tool call of message 1 is text that is not JSON")),
    ([{"name": "f", "arguments": "{x"}], (CALL, "`arguments` of a tool call of message 1 is text that is not JSON")),
    ([{"name": "f", "arguments": "[" * 100_000}], (CALL, "nested too deeply")),
    ([{"name": "f", "arguments": "[1]"}], (CALL, "`arguments` of a tool call of message 1 is of type list")),
    ([{"name": "f", "arguments": "3"}], (CALL, "is of type int")),
    ([{"name": "f", "arguments": False}], (CALL, "is of type bool")),
    ([{"name": "f", "input": {"x": 1}}], (CALL, "has no `arguments`, but input")),
    (3, ("malformed tool_calls", "tool_calls is of type int, a list is needed")),
    ("[nothing", ("malformed tool_calls", "tool_calls is text that is not JSON")),
]  # fmt: skip

SCHEMA = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": SCHEMA}
TOOLS: list[tuple[Any, Any]] = [
    ([TOOL], [TOOL]),
    ([TOOL, {**TOOL, "strict": True}], [TOOL, {**TOOL, "strict": True}]),
    (json.dumps([TOOL]), [TOOL]),
    ([json.dumps(TOOL)], [TOOL]),
    (TOOL, [TOOL]),
    ([SCHEMA], [TOOL]),
    (json.dumps(SCHEMA), [TOOL]),
    ({"functions": [SCHEMA]}, [TOOL]),
    (json.dumps({"tools": [TOOL]}), [TOOL]),
    ([{"type": "function", **SCHEMA}], [TOOL]),
    ([{"function": SCHEMA}], [TOOL]),
    ([{"type": "function", "function": {**SCHEMA, "parameters": json.dumps(SCHEMA["parameters"])}}], [TOOL]),
    ([{"name": "f"}], [{"type": "function", "function": {"name": "f"}}]),
    *[(nothing, None) for nothing in (None, "", " ", "null", "[]", "{}", [], {})],
    ([{"type": "web_search"}], "the type of tool 0 of tools is 'web_search', only function is taken"),
    ([TOOL, {"type": "custom", "custom": {"name": "g"}}], "the type of tool 1 of tools is 'custom'"),
    ([{"description": "d"}], "tool 0 of tools has no function name"),
    ([{"type": "function", "function": {"name": ""}}], "tool 0 of tools has no function name"),
    ([{"type": "function", "function": "f"}], "tool 0 of tools has no function name"),
    ([{**SCHEMA, "parameters": ["x"]}], "`parameters` of tool 0 of tools is of type list"),
    ([{**SCHEMA, "parameters": "{x"}], "`parameters` of tool 0 of tools is text that is not JSON"),
    ([None], "tool 0 of tools is null, a JSON schema is needed"),
    (["def f(): ..."], "tool 0 of tools is text that is not JSON"),
    ("def f(): ...", "tools is text that is not JSON"),
    (False, "tools is of type bool, a list of JSON schemas is needed"),
]


@pytest.mark.parametrize(("given", "expected"), CALLS)
def test_calls(given, expected):
    message = {"role": "assistant", "content": "c", "tool_calls": given}
    row = {"messages": [{"role": "user", "content": "u"}, message]}
    if isinstance(expected, list):
        assert RowReader()(row).messages[1] == {"role": "assistant", "content": "c"} | (
            {"tool_calls": expected} if expected else {}
        )
        return
    with pytest.raises(RowError) as refused:
        RowReader()(row)
    assert refused.value.reason == expected[0]
    assert expected[1] in refused.value.detail


@pytest.mark.parametrize(("given", "expected"), TOOLS)
def test_tools(given, expected):
    row = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}], "tools": given}
    if not isinstance(expected, str):
        conversation = RowReader()(row)
        assert conversation.tools == expected
        assert conversation.kind == ("messages, tools" if expected else "messages")
        assert conversation.unused == ()
        return
    with pytest.raises(RowError) as refused:
        RowReader()(row)
    assert refused.value.reason == "malformed tools"
    assert expected in refused.value.detail


def test_what_is_given_is_not_changed():
    tool, call = {"name": "f", "parameters": "{}"}, {"name": "f", "arguments": "{}"}
    read_tools([tool])
    read_calls([call], "a row")
    assert tool == {"name": "f", "parameters": "{}"} and call == {"name": "f", "arguments": "{}"}


TAKEN = ("tool", "tool_input", "tool_output", "tool_calls", "calls")
BY_NAME = Fields(tool_name="tool", tool_input="tool_input", tool_output="tool_output")
BY_CALLS = Fields(tool_calls="calls", tool_output="tool_output")
ALONE = Fields(tool_calls="calls")
USUAL = Fields()
PAIR = {"problem": "6*7?", "solution": "42."}
RUN = {"name": "python", "arguments": {"code": "6*7"}}


def called(arguments: dict, identity: str = "call_0") -> dict:
    call = {"id": identity, "type": "function", "function": {"name": "python", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def output(text: str, identity: str = "call_0") -> dict:
    return {"role": "tool", "content": text, "tool_call_id": identity, "name": "python"}


@pytest.mark.parametrize(
    ("fields", "columns", "turns"),
    [
        (BY_NAME, {"tool": "python", "tool_input": "print(6)"}, [called({"input": "print(6)"}), output("42")]),
        (BY_NAME, {"tool": "python", "tool_input": '{"code": "6*7"}'}, [called({"code": "6*7"}), output("42")]),
        (BY_NAME, {"tool": "python", "tool_input": {"code": "6*7"}}, [called({"code": "6*7"}), output("42")]),
        (BY_NAME, {"tool": "python", "tool_input": "7"}, [called({"input": "7"}), output("42")]),
        (BY_NAME, {"tool": "python", "tool_input": "[" * 10**5}, [called({"input": "[" * 10**5}), output("42")]),
        (BY_NAME, {"tool": "python", "tool_input": None}, [called({}), output("42")]),
        (BY_CALLS, {"calls": [{"type": "function", "function": RUN}]}, [called({"code": "6*7"}), output("42")]),
        (BY_CALLS, {"calls": json.dumps(RUN)}, [called({"code": "6*7"}), output("42")]),
        (ALONE, {"calls": [RUN], "tool_output": ["42"]}, [called({"code": "6*7"}), output("42")]),
        (USUAL, {"tool_calls": [RUN], "tool_output": {"a": "é"}}, [called({"code": "6*7"}), output('{"a": "é"}')]),
        (USUAL, {"tool_calls": [RUN], "tool_output": "[1, 2]"}, [called({"code": "6*7"}), output("[1, 2]")]),
        (USUAL, {"tool_calls": [RUN], "tool_output": [1, 2]}, [called({"code": "6*7"}), output("[1, 2]")]),
        (
            USUAL,
            {"tool_calls": json.dumps([RUN, {"id": "b", "function": {"name": "python"}}]), "tool_output": '["1", 2]'},
            [called({"code": "6*7"}), output("1"), called({}, "b"), output("2", "b")],
        ),
        (
            USUAL,
            {"tool_calls": [RUN, RUN], "tool_output": None},
            [{**called({}), "tool_calls": [{"id": f"call_{n}", "type": "function", "function": RUN} for n in (0, 1)]}],
        ),
        (ALONE, {"calls": json.dumps([RUN]), "tool_output": None}, [called({"code": "6*7"})]),
        *[(BY_NAME, {"tool": nothing, "tool_output": None}, []) for nothing in (None, "", "[]", [])],
        *[(USUAL, {"tool_calls": nothing, "tool_output": nothing}, []) for nothing in (None, "", "null", "[]", [])],
    ],
)
def test_calls_in_columns_become_turns(fields, columns, turns):
    row = {**PAIR, "tool_output": "42", "tool_input": None, **columns}
    row = {name: value for name, value in row.items() if name != "tool_input" or fields == BY_NAME}
    conversation = RowReader(fields=fields)(row)
    question, answer = {"role": "user", "content": "6*7?"}, {"role": "assistant", "content": "42."}
    assert conversation.messages == [question, *turns, answer]
    assert conversation.kind == ("question_answer, tools" if turns else "question_answer")
    assert (conversation.untrained, conversation.unused) == (frozenset(), tuple(sorted({*row} - {*PAIR, *TAKEN})))


@pytest.mark.parametrize(
    ("fields", "columns", "reason"),
    [
        (BY_NAME, {"tool": "python", "tool_input": "1"}, "unknown fields: .* no tool_output.*--fields.tool-output"),
        (BY_NAME, {"tool": "python", "tool_output": "1"}, "unknown fields: .* no tool_input .did you mean tool_output"),
        (BY_NAME, {"tool_input": "1", "tool_output": "1"}, "unknown fields: .* no tool: --fields.tool-name must"),
        (BY_NAME, {"tool": "python", "tool_input": "1", "tool_output": None}, "no tool output: .*tool_output is null"),
        (BY_NAME, {"tool": 3, "tool_input": "1", "tool_output": "1"}, "not text: tool is of type int"),
        (BY_NAME, {"tool": "python", "tool_input": 3, "tool_output": "1"}, "malformed tool call"),
        (BY_NAME, {"tool": "", "tool_input": "1", "tool_output": ""}, "column not used: tool_input"),
        (BY_NAME, {"tool": "python", "tool_input": "1", "tool_output": "1", "tool_calls": [RUN]}, "column not used: t"),
        (BY_CALLS, {"calls": [RUN, RUN], "tool_output": "1"}, "calls has 2 calls, and there is one output"),
        (BY_CALLS, {"calls": [RUN, RUN], "tool_output": "[" * 10**5}, "calls has 2 calls, and there is one output"),
        (BY_CALLS, {"calls": [RUN, RUN], "tool_output": [1, 2, 3]}, "calls has 2 calls, and there are 3 outputs in"),
        (BY_CALLS, {"calls": [RUN, RUN], "tool_output": [1, None]}, "no tool output: tool_output has a null among"),
        (BY_CALLS, {"calls": "[", "tool_output": "1"}, "malformed tool_calls"),
        (ALONE, {"cals": "[]"}, "unknown fields: .* no calls .did you mean cals"),
        (
            USUAL,
            {"tool_calls": [{"type": "custom"}]},
            "malformed tool call: the type of a tool call of tool_calls is 'custom'",
        ),
        (USUAL, {"tool_output": "1"}, "column not used: tool_output has a value .* --ignore-columns tool_output"),
    ],
)
def test_calls_in_columns_that_are_refused(fields, columns, reason):
    with pytest.raises(RowError, match=reason):
        RowReader(fields=fields)({**PAIR, **columns})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"tool_name": "a"}, "--fields.tool-name and --fields.tool-input belong together"),
        ({"tool_input": "b"}, "--fields.tool-name and --fields.tool-input belong together"),
        ({"tool_name": "a", "tool_input": "b"}, "--fields.tool-name: name the column .* with --fields.tool-output"),
        ({"tool_output": "a"}, "--fields.tool-output belongs to a call"),
        (
            {"tool_name": "a", "tool_input": "b", "tool_output": "c", "tool_calls": "d"},
            "or --fields.tool-calls instead",
        ),
        ({"messages": "a", "tool_calls": "b"}, "--fields.messages names whole conversations"),
    ],
)
def test_names_of_columns_that_do_not_go_together(names, message):
    with pytest.raises(ValueError, match=message):
        Fields(**names)
