"""Rows become conversations, and rows that cannot are refused with a reason."""

import pytest

from data.formats import Fields, RowError, to_conversation
from data.prompt import Prompt, load_prompt, total_code_executions
from tests.chatting import chat, tool_row

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
