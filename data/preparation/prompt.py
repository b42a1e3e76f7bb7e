"""Prompt files: a template with `{problem}`-style fields that makes the messages before the answer."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

# `{{` and `}}` are literal braces; a lone brace, as in \boxed{}, is left as it is
_FIELD = re.compile(r"\{\{|\}\}|\{([A-Za-z_][A-Za-z0-9_]*)\}")
# names of one thing, so that one prompt file serves training and evaluation
QUESTIONS = ("problem", "question", "input")
ANSWERS = ("output", "generated_solution", "solution", "answer")
_EXECUTIONS = re.compile(r"Remaining code executions: (\d+)")
_NO_EXECUTIONS = "You have run out of code executions!"


@dataclass(frozen=True)
class Prompt:
    """A user turn with fields and, if `system` is not None, a system turn with fields."""

    user: str
    system: str | None = None

    def messages(self, row: dict[str, Any]) -> list[dict[str, str]]:
        """The system turn, if there is one, and the user turn for a row.

        Raises ValueError where the prompt names a field that the row does not have.
        """
        turns = [("system", self.system)] if self.system is not None else []
        return [{"role": role, "content": _fill(text, row)} for role, text in [*turns, ("user", self.user)]]


def load_prompt(path: str | Path) -> Prompt:
    """A prompt from a text file (the user turn) or a YAML file with `user` and, if wanted, `system`.

    Newlines at the end of a text file are the editor's, not the prompt's. Raises ValueError.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--prompt {path}: there is no such file")
    text = path.read_text(encoding="utf-8")
    if path.suffix not in (".yaml", ".yml"):
        if not text.strip():
            raise ValueError(f"--prompt {path}: the file is empty")
        return Prompt(user=text.rstrip("\r\n"))
    try:
        parts = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--prompt {path}: not YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(parts, dict) or not set(parts) <= {"system", "user"} or "user" not in parts:
        raise ValueError(f"--prompt {path}: a YAML prompt has the keys `user` and, if wanted, `system`, and no others")
    if not all(isinstance(part, str) for part in parts.values()):
        raise ValueError(f"--prompt {path}: `user` and `system` must be text (quote them, or use `|`)")
    return Prompt(**parts)


def _fill(text: str, row: dict[str, Any]) -> str:
    def replace(match: re.Match) -> str:
        name = match.group(1)
        return match.group()[0] if name is None else _field(name, row)

    return _FIELD.sub(replace, text)


def _field(name: str, row: dict[str, Any]) -> str:
    """The text of a field: the row's own, or the question under its other names, or a derived one."""
    value = row.get(name)
    if value is None and name in QUESTIONS:
        others = [row[other] for other in QUESTIONS if row.get(other) is not None]
        value = others[0] if len(others) == 1 else None
    if value is None and name == "total_code_executions":
        value = total_code_executions(row)
    if value is None:
        raise ValueError(
            f"the prompt asks for {{{name}}}, the row has {', '.join(map(str, row)) or 'no fields'}"
            f" (write {{{{{name}}}}} where braces are meant)"
        )
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
