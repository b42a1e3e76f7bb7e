"""Values of rows: JSON that tables hold as text, and words that say what a value is."""

import json
from typing import Any

from data.preparation.conversation import RowError

_NOTHING = ("", "null", "[]", "{}")  # text that stands for no value


def is_empty(value: Any) -> bool:
    """Whether what should be text says nothing: null or blank."""
    return value is None or (isinstance(value, str) and not value.strip())


def is_blank(value: Any) -> bool:
    """Whether what need not be text says nothing: null, blank, an empty list or object, or the JSON of one of these."""
    if isinstance(value, str):
        return value.strip() in _NOTHING
    return value is None or (isinstance(value, list | dict) and not value)


def described(value: Any) -> str:
    """What a value is, for a sentence: `null` or `of type list`."""
    return "null" if value is None else f"of type {type(value).__name__}"


def shown(value: Any) -> str:
    """A value for a sentence: short text, a number or a truth value itself, of anything else what it is."""
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:40] + "...")
    if isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 10**9):
        return str(value)
    return described(value)


def from_json(text: str, reason: str, subject: str) -> Any:
    """The value of JSON text. Raises RowError(reason), in which `subject` says what is no JSON."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise RowError(reason, f"{subject} is text that is not JSON") from error
    except RecursionError:
        raise RowError(reason, f"{subject} is nested too deeply") from None


def as_list(value: Any, name: str, or_one: bool = False) -> list:
    """A list (or an object, where it may be one alone), which tables often hold as JSON text. Raises RowError."""
    reason = f"malformed {name}"
    if isinstance(value, str):
        value = from_json(value, reason, name)
    if or_one and isinstance(value, dict):
        return [value]
    if not isinstance(value, list):
        raise RowError(reason, f"{name} is {described(value)}, a list is needed")
    return value


def as_text(value: Any, reason: str, subject: str) -> str:
    """Text as it is, and the JSON of anything else. Raises RowError(reason)."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise RowError(reason, f"{subject} is {described(value)}, which is no JSON") from error
