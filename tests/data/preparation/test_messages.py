"""Lists of messages in the forms that people have become one form, and say which of their turns are trained."""

import json

import pytest

from data.preparation.conversation import RowError
from data.preparation.formats import RowReader
from data.preparation.messages import read_messages

USER, ASSISTANT = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
CALL = {"name": "add", "arguments": {"x": 1}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}


def read(*messages) -> list[dict]:
    return read_messages(list(messages))[0]


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation"])
@pytest.mark.parametrize(
    "messages",
    [
        [USER, ASSISTANT],
        [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}],
        [{"role": "Human", "content": "2+2?"}, {"role": " MODEL ", "content": "4"}],
        [{"role": "user", "value": "2+2?"}, {"from": "bot", "content": "4"}],
        [{**USER, "from": None, "name": None}, {"from": "chatbot", "role": None, "value": "4", "tool_calls": []}],
        [{"role": "user", "content": [{"type": "text", "text": "2+"}, {"text": "2?", "type": None}]}, ASSISTANT],
        json.dumps([USER, ASSISTANT]),
    ],
)
def test_forms_of_one_exchange(column, messages):
    conversation = RowReader()({column: messages, "id": 7})
    assert conversation.messages == [USER, ASSISTANT]
    assert (conversation.kind, conversation.unused, conversation.untrained) == ("messages", ("id",), frozenset())


@pytest.mark.parametrize("role", ["tool", "ipython", "function", "observation", "tool_response"])
def test_names_of_the_role_of_a_tool(role):
    assert read({"from": role, "value": "3", "name": "add"}) == [{"role": "tool", "content": "3", "name": "add"}]


def test_the_name_environment_is_kept_for_templates_that_ask_for_it():
    assert read({"role": "environment", "content": "3"}) == [
        {"role": "tool", "content": "3", "source_role": "environment"}
    ]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": json.dumps([CALL]), "function_call": None},
        {"role": "assistant", "content": "", "function_call": {"name": "add", "arguments": '{"x": 1}'}},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"role": "tool_call", "content": json.dumps([CALL])},
    ],
)
def test_forms_of_a_call(message):
    assert read(message) == [CALLED]


def test_calls_as_text_stay_on_their_messages():
    rows = [
        {"role": "system", "content": "Call.", "functions": '[{"name": "add"}]'},
        {"role": "system", "content": "Call.", "functions": ""},
        {"role": "assistant", "content": None, "function_calls": "add(x=1)"},
        {"role": "assistant", "content": "Done.", "function_calls": " "},
    ]
    assert read(*rows) == [
        *rows[:2],
        {"role": "assistant", "content": "", "function_calls": "add(x=1)"},
        {"role": "assistant", "content": "Done."},
    ]


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_thinking_gets_the_names_that_templates_read(name):
    (message,) = read({**ASSISTANT, name: "easy"})
    assert message["thinking"] == message["reasoning_content"] == "easy"
    assert RowReader()({"messages": [USER, {**ASSISTANT, name: "easy"}]}).kind == "messages, thinking"


def test_thinking_under_one_name_is_not_lost_to_a_blank_one_under_another():
    (message,) = read({**ASSISTANT, "reasoning_content": "", "thinking": " ", "reasoning": "easy"})
    assert message["thinking"] == message["reasoning_content"] == "easy"


@pytest.mark.parametrize("name", ["weight", "train", "training", "loss_mask"])
@pytest.mark.parametrize(("value", "trained"), [(0, False), (0.0, False), (False, False), (1, True), (True, True)])
def test_flags_say_which_turns_are_trained(name, value, trained):
    row = {"messages": [{**USER, name: 1 - value}, {**ASSISTANT, name: value}, {**USER, name: "x"}, ASSISTANT]}
    conversation = RowReader()(row)
    assert conversation.messages == [USER, ASSISTANT, USER, ASSISTANT]
    assert conversation.untrained == (set() if trained else {1})


def test_numbers_of_untrained_turns_count_a_system_turn_that_is_put_before_them():
    row = {"messages": [USER, {**ASSISTANT, "weight": 0, "train": False}, USER, ASSISTANT], "system": "Be brief."}
    conversation = RowReader()(row)
    assert conversation.messages[0] == {"role": "system", "content": "Be brief."}
    assert conversation.untrained == {2}


@pytest.mark.parametrize(
    ("message", "reason", "detail"),
    [
        ("hi", "malformed message", "message 1 is of type str"),
        ({"content": "4"}, "unknown role", "the role of message 1 is null"),
        ({"role": "robot", "content": "4"}, "unknown role", "the role of message 1 is 'robot', known are system,"),
        ({"role": ["a"], "content": "4"}, "unknown role", "the role of message 1 is of type list"),
        ({"role": "r" * 1000, "content": "4"}, "unknown role", f"'{'r' * 40}...'"),
        ({"role": "assistant", "content": ""}, "empty text", "message 1 (assistant) is empty"),
        ({"role": "assistant", "content": 4}, "not text", "the content of message 1 is of type int"),
        ({"role": "user", "content": [{"type": "image"}]}, "not text", "the type of a part of message 1 is 'image'"),
        ({"role": "user", "content": ["a"]}, "not text", "a part of message 1 is of type str"),
        ({"role": "user", "content": [{"type": "text"}]}, "not text", "the text of a part of message 1 is null"),
        ({**ASSISTANT, "thinking": ["a"]}, "not text", "the thinking of message 1 is of type list"),
        (
            {**ASSISTANT, "thinking": "a", "reasoning": "b"},
            "malformed message",
            "thinking and reasoning of message 1 are different thinking",
        ),
        ({**ASSISTANT, "function_calls": [CALL]}, "not text", "function_calls of message 1 is of type list"),
        ({**CALLED, "function_calls": [CALL]}, "not text", "function_calls of message 1 is of type list"),
        ({**USER, "function_calls": "f()"}, "malformed tool call", "message 1 calls a tool but its role is user"),
        ({**USER, "tool_calls": [CALL]}, "malformed tool call", "message 1 calls a tool but its role is user"),
        ({"from": "function_call", "value": "add 1"}, "malformed tool call", "the call in message 1 is text that is"),
        ({**CALLED, "function_call": CALL}, "malformed tool call", "both tool_calls and function_call"),
        ({**ASSISTANT, "weight": 0.5}, "malformed training flag", "weight of message 1 is 0.5, only false, true,"),
        ({**ASSISTANT, "train": "no"}, "malformed training flag", "train of message 1 is 'no'"),
        ({**ASSISTANT, "loss_mask": [0]}, "malformed training flag", "loss_mask of message 1 is of type list"),
        ({**ASSISTANT, "weight": float("nan")}, "malformed training flag", "weight of message 1 is nan"),
        ({**ASSISTANT, "weight": 1, "train": False}, "malformed training flag", "weight and train of message 1 say"),
    ],
)
def test_messages_that_are_refused(message, reason, detail):
    with pytest.raises(RowError) as refused:
        RowReader()({"messages": [USER, message, ASSISTANT]})
    assert refused.value.reason == reason
    assert detail in refused.value.detail


@pytest.mark.parametrize(
    ("messages", "reason", "detail"),
    [
        ([], "no assistant turn", "the roles are none"),
        ([{"role": "system", "content": "a"}, USER], "no assistant turn", "the roles are system, user"),
        ([USER, {**ASSISTANT, "train": False}], "no turn to train", "says of every assistant's turn"),
        ("[nothing", "malformed messages", "messages is text that is not JSON"),
        pytest.param("[" * 100_000, "malformed messages", "messages is nested too deeply", id="deep"),
        ({"role": "user"}, "malformed messages", "messages is of type dict, a list is needed"),
        (3, "malformed messages", "messages is of type int"),
    ],
)
def test_lists_of_messages_that_are_refused(messages, reason, detail):
    with pytest.raises(RowError) as refused:
        RowReader()({"messages": messages})
    assert refused.value.reason == reason
    assert detail in refused.value.detail


def test_a_conversation_may_begin_with_the_assistant():
    assert RowReader()({"messages": [ASSISTANT, USER, ASSISTANT]}).messages == [ASSISTANT, USER, ASSISTANT]
