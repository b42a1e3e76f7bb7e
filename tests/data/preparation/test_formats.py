"""Rows become conversations by their columns or by the format that is named, and lose nothing without a word."""

import json

import pytest

from data.preparation.conversation import Conversation, RowError
from data.preparation.formats import Fields, RowReader, to_conversation
from data.preparation.prompt import Prompt
from tests.support.chatting import tool_row

USER, ASSISTANT = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}
PAIR = {"problem": "2+2?", "solution": "4"}
CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<tool_response>", "</tool_response>")


@pytest.mark.parametrize(
    ("row", "kind", "unused"),
    [
        ({"messages": [USER, ASSISTANT]}, "messages", ()),
        ({"input": "2+2?", "output": "4", "source": "x", "id": 1}, "question_answer", ("id", "source")),
        ({"problem": "2+2?", "solution": "4"}, "question_answer", ()),
        ({"problem": "2+2?", "generated_solution": "4", "level": "4"}, "question_answer", ("level",)),
        ({"question": "2+2?", "answer": "4"}, "question_answer", ()),
        ({"prompt": "2+2?", "completion": "4"}, "prompt_completion", ()),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt_completion", ()),
        ({"prompt": "2+2?", "completion": [ASSISTANT]}, "prompt_completion", ()),
        ({"prompt": [USER], "completion": "4"}, "prompt_completion", ()),
        ({"instruction": "2+2?", "output": "4"}, "alpaca", ()),
        ({"instruction": "2+2?", "input": "", "output": "4"}, "alpaca", ()),
        ({"instruction": "2+2?", "input": None, "response": "4", "text": "2+2? 4"}, "alpaca", ("text",)),
        ({"instruction": " ", "input": "2+2?", "output": "4"}, "alpaca", ()),
        ({"problem": "other", "solution": "other", "messages": [USER, ASSISTANT]}, "messages", ("problem", "solution")),
        # nulls are what a table gives to rows of another kind
        ({"problem": "2+2?", "solution": None, "generated_solution": "4"}, "question_answer", ()),
        ({"messages": None, "instruction": None, "input": "2+2?", "output": "4"}, "question_answer", ()),
        ({"messages": None, "text": None, **PAIR, "system": "", "tools": ""}, "question_answer", ()),
    ],
)  # fmt: skip
def test_rows_that_need_no_telling(row, kind, unused):
    conversation = to_conversation(row)
    assert conversation.messages == [USER, ASSISTANT]
    assert (conversation.tools, conversation.template_args, conversation.untrained) == (None, None, frozenset())
    assert (conversation.text, conversation.trained, conversation.kind) == (None, (), kind)
    assert conversation.unused == unused


def test_an_instruction_comes_before_what_it_is_about():
    for row in ({"instruction": "Translate.", "input": "Good day.", "output": "Buenos dias."},
                {"instruction": "Translate.", "context": "Good day.", "response": "Buenos dias."}):  # fmt: skip
        conversation = RowReader()(row)
        assert conversation.messages == [
            {"role": "user", "content": "Translate.\nGood day."},
            {"role": "assistant", "content": "Buenos dias."},
        ]
        assert conversation.unused == ()
        assert RowReader(prompt=Prompt("Q: {}"))(row).messages[0]["content"] == "Q: Translate.\nGood day."
    row = {"instruction": "Translate.", "input": "Good day.", "output": "Buenos dias."}
    assert RowReader(prompt=Prompt("{input} {instruction}"))(row).messages[0]["content"] == "Good day. Translate."
    for text in ("[]", "null"):  # no text says nothing but blank text
        assert RowReader()({**row, "input": text}).messages[0]["content"] == f"Translate.\n{text}"
    with pytest.raises(RowError, match="column not used: instruction holds the question"):
        RowReader(prompt=Prompt("{input}"))(row)
    with pytest.raises(RowError, match="column not used: instruction has a value that a row read as question_answer"):
        RowReader(format="question_answer")(row)


def test_named_fields_win_over_usual_ones():
    row = {"prompt": "2+2?", "answer": "4", "question": "no"}
    assert to_conversation(row, Fields(question="prompt")).messages == [USER, ASSISTANT]
    row = {"prompt": "2+2?", "completion": "4", "messages": [ASSISTANT]}
    conversation = to_conversation(row, Fields(question="prompt", answer="completion"))
    assert (conversation.messages, conversation.kind) == ([USER, ASSISTANT], "question_answer")
    assert conversation.unused == ("messages",)
    assert to_conversation({"dialogue": [USER, ASSISTANT]}, Fields(messages="dialogue")).messages == [USER, ASSISTANT]
    row = {"ctx": [USER], "reply": [ASSISTANT]}
    reader = RowReader(format="prompt_completion", fields=Fields(question="ctx", answer="reply"))
    assert reader(row).messages == [USER, ASSISTANT]


def test_turns_of_a_prompt_are_not_trained():
    prompt = [SYSTEM, USER, {**ASSISTANT, "content": "5"}, {"role": "user", "content": "Sure?"}]
    completion = [{"role": "assistant", "content": "No.", "weight": 0}, USER, ASSISTANT]
    conversation = RowReader()({"prompt": prompt, "completion": completion, "tools": tool_row()["tools"]})
    assert conversation.messages == [*prompt, {"role": "assistant", "content": "No."}, USER, ASSISTANT]
    assert conversation.untrained == {2, 4}
    assert (conversation.tools, conversation.kind) == (tool_row()["tools"], "prompt_completion, tools")


def test_what_other_columns_add():
    args = {"enable_thinking": False}
    for value in (args, json.dumps(args)):
        for row in (PAIR, {"messages": [USER, ASSISTANT]}, {"instruction": "2+2?", "response": "4"}):
            row = {**row, "system_prompt": "Be brief.", "chat_template_kwargs": value, "functions": [{"name": "f"}]}
            conversation = RowReader()(row)
            assert conversation.messages == [SYSTEM, USER, ASSISTANT]
            assert conversation.template_args == args
            assert conversation.tools == [{"type": "function", "function": {"name": "f"}}]
            assert conversation.unused == ()
    for nothing in (None, "", "null", {}, "{}"):
        assert RowReader()({**PAIR, "chat_template_kwargs": nothing}).template_args is None


def test_the_system_turn_is_one():
    messages = {"messages": [SYSTEM, USER, ASSISTANT]}
    for reader, row in (
        (RowReader(system="Be brief."), PAIR),
        (RowReader(system="Be brief."), {**PAIR, "system": "Be brief."}),
        (RowReader(system="Be brief."), messages),
        (RowReader(), {**messages, "system": "Be brief."}),
        (RowReader(), {**PAIR, "system": "Be brief.", "system_prompt": ""}),
        (RowReader(prompt=Prompt("{}", "{system}")), {**PAIR, "system": "Be brief."}),
        (RowReader(ignore_columns=("system",)), {**messages, "system": "Be long."}),
        (RowReader(system="Be brief.", ignore_columns=("system",)), {**PAIR, "system": "Be long."}),
    ):
        conversation = reader(row)
        assert conversation.messages == [SYSTEM, USER, ASSISTANT]
        assert conversation.unused == reader.ignore_columns
    assert RowReader(prompt=Prompt("{system} {}"))({**PAIR, "system": "Now"}).messages[0]["content"] == "Now 2+2?"
    for reader, row, reason in (
        (RowReader(system="Be long."), messages, "two system turns: --system is 'Be long.', and the row has 'Be brief"),
        (RowReader(system=""), messages, "two system turns"),
        (
            RowReader(system=""),
            {**PAIR, "system": "Be brief."},
            "two system turns: .*leave --system out, or the column",
        ),
        (RowReader(prompt=Prompt("{}", "")), {**PAIR, "system": "Be brief."}, "column not used: system"),
        (RowReader(), {**messages, "system": "Be long."}, "column not used: system"),
        (RowReader(), {**PAIR, "system": "a", "system_prompt": "b"}, "column not used: system_prompt"),
        (RowReader(), {**PAIR, "system": {"a": 1}}, "not text: system is of type dict"),
    ):
        with pytest.raises(RowError, match=reason):
            reader(row)


def test_ignored_columns_are_read_as_if_they_were_not_there():
    row = {**PAIR, "generated_solution": "5", "tool_output": "4", "text": "x"}
    conversation = RowReader(ignore_columns=("generated_solution", "tool_output", "no such"))(row)
    assert conversation.messages == [USER, ASSISTANT]
    assert conversation.unused == ("generated_solution", "text", "tool_output")
    with pytest.raises(RowError, match="empty row: --ignore-columns leaves all"):
        RowReader(ignore_columns=("text",))({"text": "a"})


def test_rendered_rows_are_text_of_which_the_answer_is_trained():
    question, answer = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n", "4<|im_end|>\n"
    for names, fields in ((("input", "output"), Fields()), (("prompt", "completion"), Fields()),
                          (("q", "a"), Fields(question="q", answer="a"))):  # fmt: skip
        row = dict(zip(names, (question, answer), strict=True))
        conversation = RowReader(format="rendered", fields=fields, special_tokens=CHATML)({**row, "id": 1})
        trained = ((len(question), len(question + answer)),)
        assert conversation == Conversation(
            [], text=question + answer, trained=trained, kind="rendered", unused=("id",)
        )
        with pytest.raises(RowError, match=f"rendered by a chat template: {names[0]} begins with .*--format rendered"):
            RowReader(fields=fields, special_tokens=CHATML)(row)
    with pytest.raises(RowError, match="column not used: tools"):
        RowReader(format="rendered")({"input": question, "output": answer, "tools": [{"name": "f"}]})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "user", "content": " <|im_start|>user\na<|im_end|>"}, ASSISTANT]}, "message 0 of mess"),
        ({"prompt": [{"role": "user", "content": "<|im_start|>a<|im_end|>"}], "completion": "4"}, "message 0 of prom"),
        ({"text": "<|im_start|>user\na<|im_end|>"}, "text begins with .*--format text trains all of it"),
        ({"messages": [{"role": "user", "content": "What does <|im_start|> do, and <|im_end|>?"}, ASSISTANT]}, None),
        ({"question": "<|im_start|> is a token of what?", "answer": "4"}, None),
        ({"messages": [{"role": "user", "content": "<tool_response>\n4\n</tool_response>"}, ASSISTANT]}, None),
        ({"question": "<think>a</think><|im_end|>", "answer": "4"}, None),
        ({"question": "2+2?", "answer": "<|im_start|>4<|im_end|>"}, None),
    ],
)  # fmt: skip
def test_rows_are_known_by_the_tokens_of_a_template(row, reason):
    if reason is None:
        assert RowReader(special_tokens=CHATML)(row).messages[-1]["role"] == "assistant"
        return
    with pytest.raises(RowError, match=f"already rendered by a chat template: {reason}"):
        RowReader(special_tokens=CHATML)(row)
    assert RowReader()(row) is not None  # the tokens of another template say nothing


def test_text_is_trained_whole():
    for reader, row in (
        (RowReader(), {"text": "A tale.", "id": 3}),
        (RowReader(format="text"), {"text": "A tale.", "id": 3}),
        (RowReader(format="text", fields=Fields(answer="body")), {"body": "A tale.", "id": 3}),
    ):
        assert reader(row) == Conversation([], text="A tale.", trained=((0, 7),), kind="text", unused=("id",))
    for row in ({"text": "a", "question": "b"}, {"text": "a", "response": "b"}):
        with pytest.raises(RowError, match="unknown fields"):
            RowReader()(row)
    with pytest.raises(RowError, match="unknown fields"):
        RowReader(system="")({"text": "a"})


@pytest.mark.parametrize(
    ("options", "row", "reason", "detail"),
    [
        ({}, [1], "not an object", "list"),
        ({}, {}, "empty row", ""),
        ({}, {"body": "a", "id": 3}, "unknown fields", "the row has body, id: name two of them with --fields.question"),
        ({}, {"problem": "a", "soluton": "b"}, "unknown fields",
         "and no solution or generated_solution (did you mean soluton?): name the column with --fields.answer"),
        ({}, {"answer": "a", "quest": "b"}, "unknown fields",
         "no question (did you mean quest?): name the column with --fields.question"),
        ({}, {"problem": "a", "solution": "b", "generated_solution": "c"}, "ambiguous fields",
         "problem/solution or problem/generated_solution: choose with --fields.question and --fields.answer"),
        ({}, {**PAIR, "prompt": "a", "completion": "b"}, "ambiguous fields",
         "prompt/completion (prompt_completion), problem/solution (question_answer): choose one with --format"),
        ({}, {"instruction": "a", "output": "b", "response": "c"}, "ambiguous fields", "output and response: --i"),
        ({}, {"instruction": "a", "output": "b", "input": "c", "context": "d"}, "ambiguous fields", "input and con"),
        ({}, {"input": "a", "output": "  "}, "empty text", "output is empty"),
        ({}, {"input": "a", "output": 3}, "not text", "output is of type int"),
        ({}, {"input": None, "output": "b"}, "not text", "input is null"),
        ({}, {"instruction": "", "input": "", "output": "a"}, "empty text", "instruction is empty"),
        ({}, {"instruction": "a", "input": ["b"], "output": "a"}, "not text", "input is of type list"),
        ({}, {**PAIR, "chat_template_kwargs": "{a"}, "malformed chat_template_kwargs", "text that is not JSON"),
        ({}, {**PAIR, "chat_template_kwargs": [1]}, "malformed chat_template_kwargs", "of type list, an object is"),
        ({}, {**PAIR, "chat_template_kwargs": {"tools": 1}}, "malformed chat_template_kwargs", "sets tools"),
        ({}, {"messages": [USER, ASSISTANT], "tool_calls": [{"name": "f"}]}, "column not used", "read as messages"),
        ({}, {"text": "a", "tools": [{"name": "f"}]}, "column not used", "tools has a value that a row read as text"),
        ({}, {"prompt": [USER], "completion": [USER]}, "no assistant turn", "completion does not end with"),
        ({}, {"prompt": [USER], "completion": []}, "no assistant turn", "completion does not end with"),
        ({}, {"prompt": ["a"], "completion": "4"}, "malformed message", "message 0 of prompt is of type str"),
        ({"prompt": Prompt("{}")}, {"prompt": [USER], "completion": "4"}, "not text", "--prompt asks for text"),
        ({"fields": Fields(answer="generatd")}, {"problem": "a", "generated": "b"}, "unknown fields",
         "no generatd (did you mean generated?): --fields.answer must name one of them"),
        ({"fields": Fields(question="problm")}, PAIR, "unknown fields",
         "no problm (did you mean problem?): --fields.question must name one of them"),
        ({"fields": Fields(question="q")}, {"q": "a", "r": "b"}, "unknown fields", "the column with --fields.answer"),
        ({"fields": Fields(messages="dialog")}, {"dialogue": []}, "unknown fields", "(did you mean dialogue?)"),
        ({"format": "messages"}, PAIR, "unknown fields", "no messages: name the column of messages with --fields.m"),
        ({"format": "alpaca"}, PAIR, "unknown fields", "no instruction: name the column with --fields.question"),
        ({"format": "alpaca"}, {"instruction": "a"}, "unknown fields", "no output: name the column with --fields.an"),
        ({"format": "prompt_completion"}, {"prompt": "a"}, "unknown fields", "no completion: name the column with --f"),
        ({"format": "question_answer"}, {"text": "a"}, "unknown fields", "with --fields.question and --fields.answer"),
        ({"format": "rendered"}, {"text": "a"}, "unknown fields", "with --fields.question and --fields.answer"),
        ({"format": "text"}, {"txt": "a"}, "unknown fields", "no text (did you mean txt?): name the column with"),
    ],
)  # fmt: skip
def test_refused_rows(options, row, reason, detail):
    with pytest.raises(RowError) as refused:
        RowReader(**options)(row)
    assert refused.value.reason == reason
    assert detail in refused.value.detail


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "alpacca"}, "--format alpacca: there is no such format, known are auto, messages, prompt_comp"),
        ({"format": "rendered", "system": ""}, "--format rendered takes rows as they are: leave --prompt and --system"),
        ({"format": "text", "prompt": Prompt("{}")}, "--format text takes rows as they are"),
        ({"format": "text", "fields": Fields(question="a")}, "leave --fields.question out"),
        ({"format": "rendered", "fields": Fields(tool_calls="a")}, "leave --fields.tool-. out"),
        ({"format": "messages", "prompt": Prompt("{}")}, "--format messages takes whole conversations"),
        ({"format": "messages", "fields": Fields(answer="a")}, "--format messages takes whole conversations"),
        ({"format": "alpaca", "fields": Fields(messages="a")}, "--fields.messages names whole conversations"),
        ({"prompt": Prompt("{}"), "fields": Fields(messages="a")}, "--fields.messages names whole conversations"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        RowReader(**options)
