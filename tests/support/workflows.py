"""Made-up rows in the shapes of published data sets, and small files and models in the place of what recipes name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support.golden import golden_tokenizer
from tests.support.tiny import save_model

ROWS = 200
QUESTIONS = 4
VOCABULARY = 384  # room for the tokenizers of tests.support.golden
POSITIONS = 8192
HARD = {"problem_source": "aops_c6_high_school_olympiads", "pass_rate_72b_tir": "0.25"}
EASY = {"problem_source": "aops_c4_high_school_math", "pass_rate_72b_tir": "n/a"}


def instruct(number: int) -> dict[str, Any]:
    return {
        "problem": f"What is {number} + 1?",
        "generated_solution": f"One more than {number} is \\boxed{{{number + 1}}}.",
        "expected_answer": str(number + 1),
        "problem_source": "augmented_math",
    }


def _reasoning(number: int, solution: str, problem: str, mode: str) -> dict[str, Any]:
    """A hard row is every twentieth, and so long that a second round takes it: each character is a token or less."""
    hard = number % 20 == 0
    thinking = "so on, " * 800 if hard and mode != "genselect" else "so on. "
    return {
        "expected_answer": str(number),
        "problem_type": "has_answer_extracted",
        **(HARD if hard else EASY),
        "generation_model": "DeepSeek-R1",
        "problem": problem,
        "generated_solution": f"<think>\n{thinking}{solution}\n</think>\n\nIt is \\boxed{{{number}}}.",
        "inference_mode": mode,
        "used_in_kaggle": True,
    }


def cot(number: int) -> dict[str, Any]:
    return _reasoning(number, "I count.", f"How much is {number}?", "cot")


def tir(number: int) -> dict[str, Any]:
    """Solutions with executed code, of which some use up the executions that they may have."""
    left = number % 3
    rest = f"Remaining code executions: {left}" if left else "You have run out of code executions!"
    code = f"<tool_call>\nprint({number})\n</tool_call>\n```output\n{number}\n```\n{rest}"
    return _reasoning(number, code, f"Compute {number}.", "tir")


def genselect(number: int) -> dict[str, Any]:
    problem = f"Which solution of the problem is right?\nSolution 0: {number}\nSolution 1: \\boxed{{}}"
    return _reasoning(number, "I compare.", problem, "genselect")


def mixture(number: int) -> dict[str, Any]:
    """Conversations of one turn or several, some with a system turn."""
    turns = [("system", f"Be brief {number}.")] * (number % 5 == 0)
    for turn in range(1 + number % 3):
        turns += [("user", f"Say {number} and {turn}."), ("assistant", f"I say {number} and {turn}.")]
    return {
        "id": f"made_up_{number}",
        "messages": [{"role": role, "content": content} for role, content in turns],
        "source": "made up",
    }


def numina_cot(number: int) -> dict[str, Any]:
    problem, solution = f"Double {number}.", f"Twice {number} is $\\boxed{{{2 * number}}}$."
    turns = [{"role": "user", "content": problem}, {"role": "assistant", "content": solution}]
    return {"source": "synthetic_math", "problem": problem, "solution": solution, "messages": turns}


def numina_calls(number: int) -> dict[str, Any]:
    """NuminaMath-TIR with its calls in OpenAI's form, as JSON, and what they gave back."""
    call = {"name": "python", "arguments": json.dumps({"code": f"print({number} ** 2)"})}
    return {
        "problem": f"Square {number}.",
        "solution": f"The square is {number**2}.",
        "tool_calls": json.dumps([{"id": "call_0", "type": "function", "function": call}]),
        "tool_output": str(number**2),
    }


def numina_columns(number: int) -> dict[str, Any]:
    """The same with the tool's name and input in columns of their own."""
    row = numina_calls(number)
    del row["tool_calls"]
    return row | {"tool": "python", "tool_input": f"print({number} ** 2)"}


def question(number: int) -> dict[str, Any]:
    return {"problem": f"What is {number} + {number}?", "answer": str(2 * number)}


def write_rows(path: Path, row: Callable[[int], dict[str, Any]], count: int = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row(number)) + "\n" for number in range(count)), encoding="utf-8")
    return path


def write_tokenizer(folder: Path, name: str, *, template: bool) -> Path:
    """A tokenizer of `tests.support.golden`, with its chat template or, as a base model's, without one."""
    tokenizer = copy.deepcopy(golden_tokenizer(name))
    if not template:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


def write_model(folder: Path, family: str, tokenizer: str, *, template: bool) -> Path:
    """A random model of two layers with its tokenizer, which ends its answers as a base model does."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    if family == "gpt_oss":
        sizes |= {"intermediate_size": 32, "head_dim": 8}
    eos = golden_tokenizer(tokenizer).eos_token_id
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "eos_token_id": eos}
    save_model(family, folder, layers=2, dtype=torch.bfloat16, **sizes)
    return write_tokenizer(folder, tokenizer, template=template)
