"""Rows of the data sets that the recipes train on: the row, the flags that it needs, and what it becomes."""

import json

import pytest

from data.preparation.conversation import Conversation, RowError
from data.preparation.formats import Fields, RowReader
from data.preparation.prompt import Prompt

PROBLEM, SOLUTION = "What is $2+2$?", "It is $\\boxed{4}$."
ASKED = "Solve this. Put the answer (and only answer) inside \\boxed{}.\n\n"
MATH = Prompt("Solve this. Put the answer (and only answer) inside \\boxed{{}}.\n\n{problem}", system="")
TIR = Prompt("Use at most {total_code_executions} runs of code.\n\n{problem}", system="")
WHOLE = Prompt("{problem}", system="")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>")

# the columns of the data sets beside question and answer
INSTRUCT = {"expected_answer": "4", "problem_source": "augmented_math"}
REASONING = {
    "expected_answer": "4",
    "problem_type": "has_answer_extracted",
    "problem_source": "aops_c6_high_school_olympiads",
    "generation_model": "made up",
    "pass_rate_72b_tir": "0.25",
    "used_in_kaggle": True,
}
COT = {
    **REASONING,
    "problem": PROBLEM,
    "generated_solution": f"<think>\nWell.\n</think>\n{SOLUTION}",
    "inference_mode": "cot",
}
CODE = (
    "<think>\n<tool_call>\nprint(2 + 2)\n</tool_call>\n```output\n4\n```\n"
    "You have {left} left to make. Remaining code executions: 11. You will not be able to call code when you run out.\n"
    f"</think>\n{SOLUTION}"
)
CHOOSE = (
    "You will be given a challenging problem and 2 solutions.\n\nProblem: 1+1\n\nSolution 0:\n2\n\nSolution 1:\n{x}"
)
RENDERED = {
    "input": f"<|im_start|>system\n<|im_end|>\n<|im_start|>user\n{ASKED}{PROBLEM}<|im_end|>\n<|im_start|>assistant\n",
    "output": f"<think>\nWell.\n</think>\n{SOLUTION}<|im_end|>\n",
}
TULU = [
    {"role": "system", "content": "You are helpful."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "More?"},
    {"role": "assistant", "content": "No."},
]
NUMINA = {"source": "cn_k12", "problem": PROBLEM, "solution": SOLUTION}
NUMINA_MESSAGES = [{"role": "user", "content": PROBLEM}, {"role": "assistant", "content": SOLUTION}]
COLUMNS = {"tool": "python", "tool_input": "print(2+2)", "tool_output": "4"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "my_tool", "arguments": '{"x": 1}'}}


def system(content: str) -> dict:
    return {"role": "system", "content": content}


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def calling(*calls: tuple[str, str, dict]) -> dict:
    made = [
        {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}
        for identity, name, arguments in calls
    ]
    return {"role": "assistant", "content": "", "tool_calls": made}


def tool(content: str, identity: str, name: str) -> dict:
    return {"role": "tool", "content": content, "tool_call_id": identity, "name": name}


MINE = ("call_1", "my_tool", {"x": 1})
BESIDE = tuple(sorted({**REASONING, "inference_mode": 0}))
ROWS = {
    "OpenMathInstruct-2": (
        {"problem": PROBLEM, "generated_solution": SOLUTION, **INSTRUCT},
        RowReader(),
        Conversation(
            [user(PROBLEM), assistant(SOLUTION)], kind="question_answer", unused=("expected_answer", "problem_source")
        ),
    ),
    "OpenMathInstruct-2, its source's prompt": (
        {"problem": PROBLEM, "generated_solution": SOLUTION, **INSTRUCT},
        RowReader(prompt=Prompt("Solve this: {}")),
        Conversation(
            [user(f"Solve this: {PROBLEM}"), assistant(SOLUTION)],
            kind="question_answer",
            unused=("expected_answer", "problem_source"),
        ),
    ),
    "OpenMathReasoning, cot": (
        COT,
        RowReader(prompt=MATH),
        Conversation(
            [system(""), user(ASKED + PROBLEM), assistant(COT["generated_solution"])],
            kind="question_answer, thinking",
            unused=BESIDE,
        ),
    ),
    "OpenMathReasoning, cot, the empty system turn by its flag": (
        COT,
        RowReader(system=""),
        Conversation(
            [system(""), user(PROBLEM), assistant(COT["generated_solution"])],
            kind="question_answer, thinking",
            unused=BESIDE,
        ),
    ),
    "OpenMathReasoning, tir": (
        {**COT, "generated_solution": CODE, "inference_mode": "tir"},
        RowReader(prompt=TIR, special_tokens=SPECIAL),
        Conversation(
            [system(""), user(f"Use at most 12 runs of code.\n\n{PROBLEM}"), assistant(CODE)],
            kind="question_answer, thinking",
            unused=BESIDE,
        ),
    ),
    "OpenMathReasoning, tir, out of executions": (
        {**COT, "generated_solution": "You have run out of code executions!", "inference_mode": "tir"},
        RowReader(prompt=TIR),
        Conversation(
            [
                system(""),
                user(f"Use at most 1 runs of code.\n\n{PROBLEM}"),
                assistant("You have run out of code executions!"),
            ],
            kind="question_answer",
            unused=BESIDE,
        ),
    ),
    "OpenMathReasoning, genselect": (
        {
            **COT,
            "problem": CHOOSE,
            "generated_solution": "<think>\nHm.\n</think>\nJudgment: 0",
            "inference_mode": "genselect",
        },
        RowReader(prompt=WHOLE),
        Conversation(
            [system(""), user(CHOOSE), assistant("<think>\nHm.\n</think>\nJudgment: 0")],
            kind="question_answer, thinking",
            unused=BESIDE,
        ),
    ),
    "OpenMathReasoning as the guide's JSONL": (
        {**RENDERED, **REASONING},
        RowReader(format="rendered", special_tokens=SPECIAL),
        Conversation(
            [],
            text=RENDERED["input"] + RENDERED["output"],
            trained=((len(RENDERED["input"]), len(RENDERED["input"] + RENDERED["output"])),),
            kind="rendered",
            unused=tuple(sorted(REASONING)),
        ),
    ),
    "Tulu 3 and OLMo 2": (
        {"id": "a", "messages": TULU, "source": "b"},
        RowReader(),
        Conversation(TULU, kind="messages", unused=("id", "source")),
    ),
    "OLMo 3, calls as text": (
        {
            "messages": [
                {**system("You can call functions."), "functions": '[{"name": "add"}]', "function_calls": None},
                user("1+2?"),
                {"role": "assistant", "content": None, "function_calls": "add(x=1, y=2)", "functions": None},
                {"role": "environment", "content": "3"},
                assistant("3."),
            ]
        },
        RowReader(),
        Conversation(
            [
                {**system("You can call functions."), "functions": '[{"name": "add"}]'},
                user("1+2?"),
                {**assistant(""), "function_calls": "add(x=1, y=2)"},
                {"role": "tool", "content": "3", "source_role": "environment"},
                assistant("3."),
            ],
            kind="messages, tools",
        ),
    ),
    "NuminaMath-CoT": (
        {**NUMINA, "messages": NUMINA_MESSAGES},
        RowReader(),
        Conversation(NUMINA_MESSAGES, kind="messages", unused=("problem", "solution", "source")),
    ),
    "NuminaMath-CoT, with a prompt": (
        {**NUMINA, "messages": NUMINA_MESSAGES},
        RowReader(prompt=MATH),
        Conversation(
            [system(""), user(ASKED + PROBLEM), assistant(SOLUTION)],
            kind="question_answer",
            unused=("messages", "source"),
        ),
    ),
    "NuminaMath, other names": (
        {"query": PROBLEM, "reply": SOLUTION, "problem": "no"},
        RowReader(fields=Fields(question="query", answer="reply")),
        Conversation([user(PROBLEM), assistant(SOLUTION)], kind="question_answer", unused=("problem",)),
    ),
    "NuminaMath-TIR, separate columns": (
        {**NUMINA, "messages": NUMINA_MESSAGES, **COLUMNS},
        RowReader(fields=Fields(tool_name="tool", tool_input="tool_input", tool_output="tool_output")),
        Conversation(
            [
                user(PROBLEM),
                calling(("call_0", "python", {"input": "print(2+2)"})),
                tool("4", "call_0", "python"),
                assistant(SOLUTION),
            ],
            kind="question_answer, tools",
            unused=("messages", "source"),
        ),
    ),
    "NuminaMath-TIR, several calls in a row": (
        {**NUMINA, "tool_calls": json.dumps([CALL, CALL]), "tool_output": '["1", "2"]'},
        RowReader(),
        Conversation(
            [
                user(PROBLEM),
                calling(MINE),
                tool("1", "call_1", "my_tool"),
                calling(MINE),
                tool("2", "call_1", "my_tool"),
                assistant(SOLUTION),
            ],
            kind="question_answer, tools",
            unused=("source",),
        ),
    ),
    "NuminaMath-TIR, a JSON column alone": (
        {**NUMINA, "tool_calls": json.dumps([CALL])},
        RowReader(),
        Conversation(
            [user(PROBLEM), calling(MINE), assistant(SOLUTION)], kind="question_answer, tools", unused=("source",)
        ),
    ),
    "NuminaMath-TIR, a JSON column alone, named": (
        {**NUMINA, "messages": NUMINA_MESSAGES, "calls": json.dumps([CALL])},
        RowReader(fields=Fields(tool_calls="calls")),
        Conversation(
            [user(PROBLEM), calling(MINE), assistant(SOLUTION)],
            kind="question_answer, tools",
            unused=("messages", "source"),
        ),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_the_data_sets(name):
    row, reader, conversation = ROWS[name]
    assert reader(row) == conversation


def test_rows_that_need_a_flag_say_which():
    with pytest.raises(RowError, match="rendered by a chat template: input .* --format rendered, which .* `output`"):
        RowReader(special_tokens=SPECIAL)({**RENDERED, **REASONING})
    with pytest.raises(RowError, match="column not used: tool_output has a value"):
        RowReader()({**NUMINA, **COLUMNS})
