"""Rows of a data set -> the messages that ask, and the gold answers they are graded by."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.preparation.files import open_source
from data.preparation.prompt import QUESTIONS, Prompt, load_prompt
from data.preparation.rows import Unreadable
from examples.evaluation.extraction import last_boxed, stated_answer
from examples.evaluation.options import EvaluationError, EvaluationOptions, flag


@dataclass(frozen=True, kw_only=True)
class Question:
    """One row to be answered: the turns up to the answer, and the right answer."""

    index: int
    messages: list[dict[str, Any]]
    gold: str


def load_questions(options: EvaluationOptions) -> list[Question]:
    """The questions of `--data`, in its order.

    Raises `EvaluationError`, naming the row (counted from 1), where a row has no problem or no right answer.
    """
    rows = _read_rows(options)
    prompt = load_prompt(options.prompt) if options.prompt else None  # `check_options` has read it once
    questions = []
    for index, row in enumerate(rows):
        where = f"--data {options.data}, row {index + 1}"
        if not isinstance(row, dict):
            raise EvaluationError(f"{where} is a {type(row).__name__}, not an object with fields")
        try:
            messages = _with_system(_messages(row, prompt), options.system)
        except ValueError as error:
            raise EvaluationError(f"{where}: {error}") from error
        questions.append(Question(index=index, messages=messages, gold=_gold(row, options.answer_field, where)))
    if not questions:
        raise EvaluationError(f"--data {options.data} holds no rows")
    return questions


def dataset_name(data: str) -> str:
    """What the result block calls the data set: a file's stem or the last part of a hub name."""
    return Path(data).stem if Path(data).exists() else data.split(":")[0].split("/")[-1]


def _read_rows(options: EvaluationOptions) -> list[Any]:
    """All rows, or the first `--limit` of them."""
    try:
        files = open_source(options.data, split=options.split)
    except ValueError as error:
        raise EvaluationError(f"--data {str(error).removeprefix('--sources ')}") from error
    rows: list[Any] = []
    for file in files:
        left = None if options.limit is None else options.limit - len(rows)
        if left == 0:
            break
        for start, stop in file.chunks(left)[0]:
            for number, row in file.read(start, stop):
                if isinstance(row, Unreadable):
                    raise EvaluationError(
                        f"--data {file.name}, line {file.lines(0, start) + number + 1} is {row.error}"
                    )
                rows.append(row)
    return rows


def _messages(row: dict[str, Any], prompt: Prompt | None) -> list[dict[str, Any]]:
    """The turns that the model answers: from the prompt file, else the row's messages, else its problem."""
    if prompt is not None:
        return prompt.messages(row)
    if isinstance(row.get("messages"), list):
        turns = row["messages"]
        last = _last_assistant(turns)
        asked = turns if last is None else turns[:last]
        if not asked:
            raise ValueError("`messages` has no turn before the last assistant turn")
        return asked
    for name in QUESTIONS:
        if isinstance(row.get(name), str) and row[name].strip():
            return [{"role": "user", "content": row[name]}]
    raise ValueError(
        f"none of messages, {', '.join(QUESTIONS)} is among its fields ({', '.join(row)}); "
        "give --prompt FILE with the fields to use"
    )


def _with_system(messages: list[dict[str, Any]], system: str | None) -> list[dict[str, Any]]:
    """The turns with a system turn of this text in place of their own."""
    if system is None:
        return messages
    return [{"role": "system", "content": system}, *(turn for turn in messages if turn.get("role") != "system")]


def _last_assistant(turns: list[Any]) -> int | None:
    """The index of the last assistant turn."""
    places = [i for i, turn in enumerate(turns) if isinstance(turn, dict) and turn.get("role") == "assistant"]
    return places[-1] if places else None


def _gold(row: dict[str, Any], field: str | None, where: str) -> str:
    """The right answer of a row, from the first field that states one."""
    if field is not None:
        if row.get(field) is None:
            raise EvaluationError(f"{where} has no {flag('answer_field')} {field!r}; its fields: {', '.join(row)}")
        text = str(row[field]).strip()
        gold: str | None = stated_answer(text) or text
    else:
        gold = _usual_gold(row)
    if not gold:
        raise EvaluationError(
            f"{where} has no right answer in expected_answer, answer, solution or its last assistant turn; "
            f"name its field with {flag('answer_field')}"
        )
    return gold


def _usual_gold(row: dict[str, Any]) -> str | None:
    r"""The answer under its usual names: bare, behind `####`, in a \boxed{}, in the last assistant turn."""
    if row.get("expected_answer") is not None:
        return str(row["expected_answer"]).strip()
    if row.get("answer") is not None:
        text = str(row["answer"]).strip()
        return stated_answer(text) or text
    if isinstance(row.get("solution"), str) and last_boxed(row["solution"]) is not None:
        return last_boxed(row["solution"])
    turns = row.get("messages")
    if isinstance(turns, list):
        last = _last_assistant(turns)
        if last is not None and isinstance(turns[last].get("content"), str):
            return stated_answer(turns[last]["content"])
    return None
