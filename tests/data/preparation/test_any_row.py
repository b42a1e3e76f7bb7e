"""Any row whatever gives a conversation or the reason why there is none, in a time that grows as the row does."""

import contextlib
import copy
import itertools
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.preparation.conversation import RowError
from data.preparation.formats import FORMATS, Fields, RowReader
from data.preparation.prompt import Prompt

USER, ASSISTANT = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}
PAIR = {"problem": "2+2?", "solution": "4"}
CHATML = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
GOOD = [
    {"messages": [{**SYSTEM, "functions": "[]"}, USER, {**ASSISTANT, "weight": 1, "tool_calls": [{"name": "f"}]},
                  {"role": "environment", "content": [{"type": "text", "text": "3"}]},
                  {**ASSISTANT, "thinking": "x", "function_calls": "f()"}], "tools": TOOLS, "id": 1},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": '{"name": "f"}'},
                       {"from": "gpt", "value": "b", "train": True}], "system": "s", "chat_template_kwargs": {"a": 1}},
    {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT], "tools": json.dumps(TOOLS)},
    {"instruction": "a", "input": "b", "output": "c", "system_prompt": "d", "x": {"y": 1}},
    {**PAIR, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}] * 2,
     "tool_output": ["1", "2"], "x": "y", "system": "s"},
    {"question": "f", "text": '{"a": 1}', "answer": "b", "problem": "p", "solution": "s", "x": 1},
    {"text": "<|im_start|>a<|im_end|>", "id": 2},
]  # fmt: skip
KEYS = ["role", "from", "content", "value", "type", "text", "function", "name", "arguments", "weight", "problem"]
WORDS = ["user", "tool", "function_call", "null", "[]", '{"name": "f"}', "[[", "", " ", "<think>", "custom",
         None, True, False, 0, 1, 0.5, float("nan"), 10**30]  # fmt: skip
VALUES = st.recursive(
    st.sampled_from(WORDS) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=6,
)


@st.composite
def spoilt_rows(draw) -> Any:
    """A good row in which up to three values, however deep, are others."""
    row = copy.deepcopy(draw(st.sampled_from(GOOD)))
    for _ in range(draw(st.integers(0, 3))):
        place: Any = row
        while place:
            key = draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
            if not isinstance(place[key], dict | list) or draw(st.integers(0, 3)) == 0:
                place[key] = draw(VALUES)
                break
            place = place[key]
    return row


READERS = [
    *(RowReader(special_tokens=CHATML),) * 4,
    *(RowReader(format=name) for name in FORMATS),
    RowReader(prompt=Prompt("{} {x}", system="{system}", examples=(("a", "b"),))),
    RowReader(system="Be brief.", ignore_columns=("x",), fields=Fields(tool_calls="tool_calls")),
    RowReader(fields=Fields(tool_name="question", tool_input="text", tool_output="answer")),
]


@settings(max_examples=300, deadline=None)
@given(VALUES | spoilt_rows(), st.sampled_from(READERS))
def test_any_row_gives_a_conversation_or_a_reason(row: Any, reader: RowReader):
    before = json.dumps(row)
    try:
        conversation = reader(row)
    except RowError as error:
        assert error.reason and len(str(error)) < 3000
    else:
        assert set(conversation.unused) < set(row)
        if conversation.text is None:
            assistants = {number for number, turn in enumerate(conversation.messages) if turn["role"] == "assistant"}
            assert assistants > conversation.untrained >= set()
            assert all(isinstance(turn["content"], str) for turn in conversation.messages)
        else:
            (span,) = conversation.trained
            assert conversation.messages == [] and 0 <= span[0] < span[1] == len(conversation.text)
    assert json.dumps(row) == before  # a row that is dropped is kept as it was


def test_no_value_is_nested_too_deeply():
    nested: Any = "a"
    for number in range(50_000):
        nested = {"function": nested} if number % 2 else [nested]
    outcomes = set()
    for row, value in itertools.product(GOOD, (nested, nested["function"])):
        for name, reader in itertools.product(row, READERS):
            try:
                outcomes.add(reader({**row, name: value}).kind)
            except RowError as error:
                outcomes.add(error.reason)
    assert {"not text", "unknown role", "malformed tool call", "missing prompt field", "text"} <= outcomes


@pytest.mark.parametrize(
    "make",
    [
        lambda n: {"messages": [USER, ASSISTANT] * n, "tools": [{"name": f"f{i}"} for i in range(n)]},
        lambda n: {"problem": "<|im_start|>" * 40 * n, "solution": "<" * 400 * n},
        lambda n: {**PAIR, "tool_calls": [{"name": "f"}] * n, "tool_output": ["1"] * n},
        lambda n: {f"colum{i}": i for i in range(10 * n)},
        lambda n: {"prompt": "{" * 100 * n + "\\boxed" * 50 * n, "completion": "a"},
    ],
    ids=["messages", "tokens", "calls", "columns", "braces"],
)
def test_time_is_linear(make):
    reader = RowReader(special_tokens=CHATML)

    def seconds(row: dict) -> float:
        times = []
        for _ in range(3):
            start = time.process_time()
            with contextlib.suppress(RowError):
                reader(row)
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(make(8000)) < 40 * max(seconds(make(800)), 1e-4)  # 10 times as much; squares would be 100
