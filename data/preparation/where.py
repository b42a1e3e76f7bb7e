"""Conditions on rows: `--where` expressions in Python over a row's columns."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from data.preparation.columns import listing, nearest
from data.preparation.conversation import RowError

# What an expression may call beside methods of its values.
FUNCTIONS: dict[str, Any] = {
    function.__name__: function
    for function in (abs, all, any, bool, float, int, isinstance, len, max, min, round, set, sorted, str, sum)
} | {"list": list, "dict": dict}


@dataclass(frozen=True)
class Where:
    """All of some expressions over a row's columns.

    They see columns by their names, all of them as `row`, `tokens(text)` (a text's length by the tokenizer) and
    `FUNCTIONS`, whose names win over columns'. Raises ValueError for an expression that is none.
    """

    expressions: tuple[str, ...]
    tokens: Callable[[str], int]
    codes: tuple[CodeType, ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "codes", tuple(map(_compile, self.expressions)))

    def __call__(self, row: Any) -> bool:
        """Whether a row meets every condition; RowError for a row that one of them fails on."""
        if not isinstance(row, dict):
            return True  # what makes conversations of rows refuses it
        for expression, code in zip(self.expressions, self.codes, strict=True):
            names = {**row, **FUNCTIONS, "tokens": self.tokens, "row": row, "__builtins__": {}}
            try:
                if not eval(code, names):  # the user's own expression
                    return False
            except NameError as error:
                there = f"the row has {listing(row) or 'no columns'}{nearest([str(error.name)], row)}"
                raise RowError("--where could not be evaluated", f"{expression}: {error}; {there}") from error
            except Exception as error:
                why = f"{expression}: {type(error).__name__}: {error}"
                raise RowError("--where could not be evaluated", why) from error
        return True


def _compile(expression: str) -> CodeType:
    try:
        return compile(expression.strip(), "--where", "eval")
    except (SyntaxError, ValueError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(f"--where {expression}: not an expression ({reason})") from None
