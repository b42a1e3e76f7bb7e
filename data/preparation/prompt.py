"""Prompts: text with `{problem}`-style fields around a row's question, and what may stand before it.

A prompt is a file of text (the user's turn), a YAML file or a mapping with `user` and, if wanted, `system` and
`examples`. `{name}` is a column of the row, `{}` its question; `{{` and `}}` are literal braces, and so is an
empty pair after a LaTeX command, as in `\\boxed{}`.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data.preparation.columns import listing, nearest
from data.preparation.named_files import find_named, names_in, read_utf8
from data.preparation.values import described

PROMPTS = Path(__file__).parents[2] / "examples" / "prompts"  # prompts that go by their names
_SUFFIXES = (".txt", ".yaml", ".yml")
# literal braces; a LaTeX command with empty groups; a field
_FIELD = re.compile(r"(\{\{|\}\})|(\\[A-Za-z]+\*?(?:\{\})+)|\{([A-Za-z_][A-Za-z0-9_]*)?\}")
# names of one thing, so that one prompt serves training and evaluation
QUESTIONS = ("problem", "question", "input")
ANSWERS = ("output", "generated_solution", "solution", "answer")
_DERIVED = "total_code_executions"
_EXECUTIONS = re.compile(r"Remaining code executions: (\d+)")
_NO_EXECUTIONS = "You have run out of code executions!"


@dataclass(frozen=True)
class Prompt:
    """A user turn with fields, a system turn with fields if `system` is not None, and answered turns between them."""

    user: str
    system: str | None = None
    examples: tuple[tuple[str, str], ...] = ()  # (user, assistant), as they stand: braces mean nothing there

    @property
    def fields(self) -> frozenset[str]:
        """The columns that the prompt names; "" is the question."""
        return frozenset((*_fields(self.user), *_fields(self.system or "")))

    def messages(self, row: dict[str, Any], question: str | None = None) -> list[dict[str, str]]:
        """The turns before the answer: the system's if there is one, the examples, the user's with the row's fields.

        `question` names the column of the question where it has none of the usual names. Raises ValueError where the
        prompt names a field that the row does not have.
        """
        return self.turns(row, None if question is None else row.get(question))

    def turns(self, row: dict[str, Any], question: Any = None, answer: str | None = None) -> list[dict[str, str]]:
        """The same for a row whose question and answer are known."""
        turns = [] if self.system is None else [("system", _fill(self.system, row, question, answer))]
        for asked, answered in self.examples:
            turns += [("user", asked), ("assistant", answered)]
        turns.append(("user", _fill(self.user, row, question, answer)))
        return [{"role": role, "content": content} for role, content in turns]


def load_prompt(prompt: str | Path | Mapping[str, Any] | Prompt) -> Prompt:
    """A prompt by its name in `PROMPTS`, from a file, from a mapping, or a checked one. Raises ValueError.

    Newlines at the end of a text file are the editor's, not the prompt's. A prompt must name a field: without one
    every row would lose its question.
    """
    if isinstance(prompt, Prompt):
        return _checked(prompt, "prompt")
    if isinstance(prompt, Mapping):
        return _from_parts(prompt, "prompt")
    path = find_prompt(prompt)
    label = f"--prompt {path}"
    text = read_utf8(path, label, "utf-8-sig")
    if path.suffix not in (".yaml", ".yml"):
        if not text.strip():
            raise ValueError(f"{label}: the file is empty")
        return _checked(Prompt(user=text.rstrip("\r\n")), label)
    try:
        parts = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{label}: not YAML ({str(error).splitlines()[0]})") from error
    return _from_parts(parts, label)


def find_prompt(prompt: str | Path) -> Path:
    """The file of a path, or of a name in `PROMPTS`. Raises ValueError where there is neither."""
    if (path := find_named(prompt, PROMPTS, ("", *_SUFFIXES))) is not None:
        return path
    known = names_in(PROMPTS, _SUFFIXES)
    near = nearest([str(prompt)], known)
    raise ValueError(
        f"--prompt {str(prompt)[:80]}: there is no such file, and no prompt of this name{near};"
        f" known are {', '.join(known) or 'none'}"
    )


def _from_parts(parts: Any, label: str) -> Prompt:
    known = {"user", "system", "examples"}
    if not isinstance(parts, Mapping) or not set(parts) <= known or "user" not in parts:
        raise ValueError(f"{label}: a prompt has the key `user` and, if wanted, `system` and `examples`, and no others")
    texts = [parts["user"], parts.get("system") if parts.get("system") is not None else ""]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{label}: `user` and `system` must be text (quote them, or use `|`)")
    examples = parts.get("examples") or []
    if not isinstance(examples, list) or not all(map(_is_example, examples)):
        raise ValueError(f"{label}: `examples` must be a list of {{user, assistant}}, each of them text")
    answered = tuple((example["user"], example["assistant"]) for example in examples)
    return _checked(Prompt(parts["user"], parts.get("system"), answered), label)


def _is_example(example: Any) -> bool:
    if not isinstance(example, Mapping) or set(example) != {"user", "assistant"}:
        return False
    return all(isinstance(text, str) and text.strip() for text in example.values())


def _checked(prompt: Prompt, label: str) -> Prompt:
    """The prompt, if it says which part of a row it takes, and says it once."""
    named = [*_fields(prompt.system or ""), *_fields(prompt.user)]
    doubled = "write {{}} where braces are meant"
    if not set(named) - {_DERIVED}:
        raise ValueError(f"{label} names no field: write {{}} or {{problem}} where the question of a row belongs")
    if named.count("") > 1:
        raise ValueError(f"{label} has {{}} {named.count('')} times, and it is the question: keep one, {doubled}")
    if "" in named and (others := sorted({*named} & {*QUESTIONS})):
        raise ValueError(f"{label} has {{}} and {{{others[0]}}}, and both are the question: keep one, {doubled}")
    return prompt


@functools.cache
def _fields(text: str) -> tuple[str, ...]:
    """The fields of a text in their order; "" is the question."""
    matches = (match.groups() for match in _FIELD.finditer(text))
    return tuple(name or "" for brace, command, name in matches if not brace and not command)


def _fill(text: str, row: dict[str, Any], question: Any, answer: str | None) -> str:
    def replace(match: re.Match) -> str:
        brace, command, name = match.groups()
        if brace or command:
            return brace[0] if brace else command
        return _field(name or "", row, question, answer)

    return _FIELD.sub(replace, text)


def _field(name: str, row: dict[str, Any], question: Any, answer: str | None) -> str:
    """The text of a field: the row's own, or the question under its other names, or a derived one."""
    value = row.get(name) if name else None
    if value is None and (not name or name in QUESTIONS):
        others = [row[other] for other in QUESTIONS if row.get(other) is not None]
        value = question if question is not None else others[0] if len(others) == 1 else None
    if value is None and name == _DERIVED:
        value = total_code_executions(row if answer is None else {ANSWERS[0]: answer})
    if value is None:
        raise ValueError(
            f"the prompt asks for {{{name}}}, the row has {listing(row) or 'no fields'}{nearest([name], row)}"
            f" (write {{{{{name}}}}} where braces are meant)"
        )
    if isinstance(value, dict | list):
        raise ValueError(f"{{{name}}} of the prompt is {described(value)}: text or a number is needed")
    return str(value)


def total_code_executions(row: dict[str, Any]) -> int | None:
    """How many code executions the row's solution was allowed, None where it does not say.

    A solution with tools says after each execution how many remain, so the first number, of one digit or
    more, is one less than the whole; one that ran out at once was allowed one.
    """
    output = next((row[name] for name in ANSWERS if isinstance(row.get(name), str)), "")
    remaining = _EXECUTIONS.search(output)
    if remaining:
        return int(remaining.group(1)) + 1
    return 1 if _NO_EXECUTIONS in output else None
