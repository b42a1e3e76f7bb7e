"""What other columns of a row add to its conversation: a system's turn, tools, arguments for the template."""

from collections.abc import Iterable
from typing import Any

from data.preparation.columns import Columns
from data.preparation.conversation import Messages, RowError
from data.preparation.tool_calls import CALLS, OUTPUT, read_tools
from data.preparation.values import described, from_json, is_blank, is_empty, shown

_SYSTEM, _TOOLS, _TEMPLATE_ARGS = ("system", "system_prompt"), ("tools", "functions"), "chat_template_kwargs"
# in a row that takes nothing from one of these, something would be lost
ADDING = (*_SYSTEM, *_TOOLS, _TEMPLATE_ARGS, CALLS, OUTPUT)
# a template gets these from the encoder
NO_TEMPLATE_ARGS = ("messages", "tools", "documents", "add_generation_prompt")


def missing_system(columns: Columns, messages: Messages, given: str | None, taken: Iterable[str]) -> str | None:
    """The system's turn that the messages lack: the one `given` to all rows, or that of a column.

    `taken` are columns that have their place already. Raises RowError where the messages have another one.
    """
    own = messages[0]["content"] if messages[0]["role"] in ("system", "developer") else None
    if own is not None and given not in (None, own):
        raise RowError(
            "two system turns",
            f"--system is {shown(given)}, and the row has {shown(own)}: give --system to rows that have none",
        )
    text = given if own is None else own
    column = next((name for name in _SYSTEM if name not in taken and not is_empty(columns.row.get(name))), None)
    if column is not None and text in (None, columns.row[column]):
        text = columns.text(column)
    elif column is not None and own is None:
        raise RowError(
            "two system turns",
            f"--system is {shown(given)}, and the row's {column} is {shown(columns.row[column])}:"
            f" leave --system out, or the column with --ignore-columns {column}",
        )
    return text if own is None else None


def tools_of(columns: Columns) -> list[dict[str, Any]] | None:
    """The row's tools, None where it has none. Raises RowError."""
    column = next((name for name in _TOOLS if not is_blank(columns.row.get(name))), None)
    return None if column is None else read_tools(columns.take(column), column)


def template_args_of(columns: Columns) -> dict[str, Any] | None:
    """What the row gives the chat template beside messages and tools, None for nothing. Raises RowError."""
    value = columns.take(_TEMPLATE_ARGS)
    if is_blank(value):
        return None
    reason = f"malformed {_TEMPLATE_ARGS}"
    if isinstance(value, str):
        value = from_json(value, reason, _TEMPLATE_ARGS)
    if not isinstance(value, dict):
        raise RowError(reason, f"{_TEMPLATE_ARGS} is {described(value)}, an object is needed")
    if others := [name for name in NO_TEMPLATE_ARGS if name in value]:
        raise RowError(reason, f"{_TEMPLATE_ARGS} sets {', '.join(others)}, which it may not")
    return value
