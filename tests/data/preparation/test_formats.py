"""Rows become conversations, and rows that cannot are refused with a reason."""

import pytest

from data.preparation.conversation import RowError
from data.preparation.formats import Fields, to_conversation
from data.preparation.prompt import Prompt, load_prompt, total_code_executions
from tests.support.chatting import chat, tool_row

USER, ASSISTANT = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT]},
        {"input": "2+2?", "output": "4", "source": "x"},
        {"problem": "2+2?", "solution": "4"},
        {"problem": "2+2?", "generated_solution": "4", "expected_answer": "4"},
        {"question": "2+2?", "answer": "4"},
        {"problem": "other", "solution": "other", "messages": [USER, ASSISTANT]},
        {"messages": [{**USER, "tool_calls": None, "name": None}, {**ASSISTANT, "tool_calls": []}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "2+"}, {"text": "2?"}]},
                ASSISTANT,
            ]
        },
        {"messages": '[{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]'},
    ],
)
def test_rows_that_need_no_telling(row):
    conversation = to_conversation(row)
    assert conversation.messages == [USER, ASSISTANT]
    assert conversation.tools is None


def test_named_fields_win_over_usual_ones():
    row = {"prompt": "2+2?", "answer": "4", "question": "no"}
    assert to_conversation(row, Fields(question="prompt")).messages == [USER, ASSISTANT]
    row = {"prompt": "2+2?", "completion": "4", "messages": [ASSISTANT]}
    assert to_conversation(row, Fields(question="prompt", answer="completion")).messages == [USER, ASSISTANT]


def test_tool_calls_are_nested_with_arguments_as_objects():
    conversation = to_conversation(tool_row())
    call = conversation.messages[1]["tool_calls"][0]
    assert call == {
        "id": "1",
        "type": "function",
        "function": {"name": "add", "arguments": {"x": "1+1", "n": 3}},
    }
    assert conversation.messages[1]["content"] == ""
    assert conversation.tools == tool_row()["tools"]
    flat = {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": None}]}]}
    assert to_conversation(flat).messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {}}}
    ]


TOOLS = Fields(tool_name="tool", tool_input="tool_input", tool_output="tool_output")
CALLS = Fields(tool_calls="calls", tool_output="tool_output")
PAIR = {"problem": "6*7?", "solution": "42.", "messages": [{"role": "user", "content": "not taken"}]}
CALL = {"name": "python", "arguments": {"input": "print(6 * 7)"}}


@pytest.mark.parametrize(
    ("fields", "columns", "call"),
    [
        (TOOLS, {"tool": "python", "tool_input": "print(6 * 7)"}, CALL),
        (TOOLS, {"tool": "python", "tool_input": '{"code": "6*7"}'}, CALL | {"arguments": {"code": "6*7"}}),
        (TOOLS, {"tool": "python", "tool_input": {"code": "6*7"}}, CALL | {"arguments": {"code": "6*7"}}),
        (TOOLS, {"tool": "python", "tool_input": "7"}, CALL | {"arguments": {"input": "7"}}),
        (CALLS, {"calls": [{"type": "function", "function": CALL}]}, CALL),
        (CALLS, {"calls": '{"function": {"name": "python", "arguments": "{\\"input\\": \\"print(6 * 7)\\"}"}}'}, CALL),
    ],
)
def test_a_tool_in_columns_becomes_turns(fields, columns, call):
    messages = to_conversation({**PAIR, **columns, "tool_output": "42"}, fields).messages
    assert messages == [
        {"role": "user", "content": "6*7?"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "call_0", "type": "function", "function": call}]},
        {"role": "tool", "content": "42", "tool_call_id": "call_0", "name": "python"},
        {"role": "assistant", "content": "42."},
    ]


@pytest.mark.parametrize("fields", [TOOLS, CALLS])
@pytest.mark.parametrize("tool", [None, "", "[]", []])
def test_a_row_that_calls_no_tool_is_a_pair(fields, tool):
    row = {**PAIR, "tool": tool, "calls": tool, "tool_input": None, "tool_output": None}
    assert [message["role"] for message in to_conversation(row, fields).messages] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("fields", "columns", "reason"),
    [
        (TOOLS, {"tool": "python", "tool_input": "1"}, "unknown fields: .* no tool_output"),
        (TOOLS, {"tool": "python", "tool_input": "1", "tool_output": None}, "no tool output: .* tool_output is null"),
        (TOOLS, {"tool": 3, "tool_input": "1", "tool_output": "1"}, "not text: tool is of type int"),
        (TOOLS, {"tool": "python", "tool_input": 3, "tool_output": "1"}, "malformed tool call"),
        (CALLS, {"calls": [CALL, CALL], "tool_output": "1"}, "calls has 2 calls, and there is one output"),
        (CALLS, {"calls": "[", "tool_output": "1"}, "malformed tool_calls"),
    ],
)
def test_tools_in_columns_that_are_refused(fields, columns, reason):
    with pytest.raises(RowError, match=reason):
        to_conversation({**PAIR, **columns}, fields)


@pytest.mark.parametrize(
    "names",
    [{"tool_name": "a"}, {"tool_name": "a", "tool_input": "b"}, {"tool_calls": "a"}, {"tool_output": "a"},
     {"tool_name": "a", "tool_input": "b", "tool_output": "c", "tool_calls": "d"}],
)  # fmt: skip
def test_tool_columns_that_do_not_go_together(names):
    with pytest.raises(ValueError, match="--fields.tool"):
        Fields(**names)


def test_thinking_gets_the_names_that_templates_read():
    row = {"messages": [USER, {**ASSISTANT, "reasoning": "easy"}]}
    message = to_conversation(row).messages[1]
    assert message["thinking"] == message["reasoning_content"] == "easy"


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ([1], "not an object", "list"),
        ({}, "empty row", ""),
        ({"text": "a", "id": 3}, "unknown fields", "text, id"),
        (
            {"problem": "a", "solution": "b", "generated_solution": "c"},
            "ambiguous fields",
            "problem/solution or",
        ),
        ({"input": "a", "output": "  "}, "empty text", "output"),
        ({"input": "a", "output": 3}, "not text", "output is of type int"),
        ({"input": None, "output": "b"}, "not text", "input is null"),
        ({"messages": []}, "no assistant turn", "none"),
        (chat(("system", "a"), ("user", "b")), "no assistant turn", "system, user"),
        (chat(("user", "a"), ("robot", "b")), "unknown role", "message 1 has role 'robot'"),
        (chat(("user", "a"), ("assistant", "")), "empty text", "message 1 (assistant)"),
        ({"messages": "[nothing"}, "malformed messages", "not JSON"),
        ({"messages": [USER, "hi"]}, "malformed message", "message 1"),
        ({"messages": [USER, {"role": "assistant", "content": 4}]}, "not text", "message 1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, ASSISTANT]},
            "not text",
            "type image",
        ),
        (
            {"messages": [{**USER, "tool_calls": [{"name": "f"}]}, ASSISTANT]},
            "malformed tool call",
            "role is user",
        ),
        (
            {"messages": [USER, {**ASSISTANT, "tool_calls": [{"id": "1"}]}]},
            "malformed tool call",
            "no function name",
        ),
        (
            {"messages": [USER, {**ASSISTANT, "tool_calls": [{"name": "f", "arguments": "{x"}]}]},
            "malformed tool call",
            "not JSON",
        ),
    ],
)
def test_refused_rows(row, reason, detail):
    with pytest.raises(RowError) as refused:
        to_conversation(row)
    assert refused.value.reason == reason
    assert detail in refused.value.detail


def test_prompt_fills_fields_and_keeps_other_braces(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("Solve, answer in \\boxed{}, set {{x}}: {problem} ({level})\n\n")
    prompt = load_prompt(file)
    row = {"problem": "a{b}?", "level": 3, "solution": "4"}
    expected = "Solve, answer in \\boxed{}, set {x}: a{b}? (3)"
    assert prompt.messages(row) == [{"role": "user", "content": expected}]
    conversation = to_conversation(row, prompt=prompt)
    assert conversation.messages == [
        {"role": "user", "content": expected},
        {"role": "assistant", "content": "4"},
    ]


def test_prompt_in_yaml_with_a_system_turn(tmp_path):
    file = tmp_path / "prompt.yaml"
    file.write_text("system: You have {total_code_executions} runs.\nuser: |-\n  Q: {question}\n")
    row = {"problem": "2+2?", "generated_solution": "... Remaining code executions: 11 ... executions: 10"}
    assert load_prompt(file).messages(row) == [
        {"role": "system", "content": "You have 12 runs."},
        {"role": "user", "content": "Q: 2+2?"},  # the question under another of its names
    ]


def test_prompt_errors_name_the_mend(tmp_path):
    with pytest.raises(ValueError, match=r"asks for \{level\}, the row has problem, output"):
        Prompt(user="{level}").messages({"problem": "a", "output": "b"})
    with pytest.raises(RowError, match="missing prompt field"):
        to_conversation({"input": "a", "output": "b"}, prompt=Prompt(user="{level}"))
    for content, message in (
        ("other: a\n", "and no others"),
        ("user: 3\n", "must be text"),
        ("user: [", "not YAML"),
    ):
        (tmp_path / "p.yaml").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_prompt(tmp_path / "p.yaml")
    with pytest.raises(ValueError, match="no such file"):
        load_prompt(tmp_path / "missing.txt")


@pytest.mark.parametrize(
    ("output", "executions"),
    [
        ("Remaining code executions: 7\n ... Remaining code executions: 6", 8),
        ("Remaining code executions: 15.", 16),
        ("You have run out of code executions!", 1),
        ("no code at all", None),
    ],
)
def test_total_code_executions(output, executions):
    assert total_code_executions({"output": output}) == executions
