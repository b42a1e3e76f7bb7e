"""The columns of one row: which were used, which pair is question and answer, and which name was meant."""

import difflib
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from data.preparation.conversation import RowError
from data.preparation.values import described, is_blank

# (question, answer) columns that are taken without being told
PAIRS = (
    ("input", "output"),
    ("problem", "solution"),
    ("problem", "generated_solution"),
    ("question", "answer"),
)
COMPLETION = ("prompt", "completion")
_SHOWN = 30  # so many names of a row's columns are printed or compared
_WIDTH = 60  # characters of each


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Names of a row's columns, where they are none of the usual ones."""

    question: str | None = None
    """Column with the question, e.g. `query`."""
    answer: str | None = None
    """Column with the answer, e.g. `response`; with --format text the column that is trained."""
    messages: str | None = None
    """Column with the list of messages, e.g. `dialogue`."""
    tool_name: str | None = None
    """Column with the name of the tool that is called between question and answer, empty where none is."""
    tool_input: str | None = None
    """Column with the call's arguments: an object, its JSON, or text, which becomes the argument `input`."""
    tool_calls: str | None = None
    """Column with calls in OpenAI's form, instead of a name and an input."""
    tool_output: str | None = None
    """Column with what the tool gave back: text, or a list of as many as there are calls."""

    def __post_init__(self) -> None:
        by_name = bool(self.tool_name), bool(self.tool_input)
        if any(by_name) and (not all(by_name) or self.tool_calls):
            raise ValueError(
                "--fields.tool-name and --fields.tool-input belong together, or --fields.tool-calls instead"
            )
        if by_name[0] and not self.tool_output:
            raise ValueError("--fields.tool-name: name the column of what the tool gave back with --fields.tool-output")
        if self.tool_output and not (by_name[0] or self.tool_calls):
            raise ValueError(
                "--fields.tool-output belongs to a call: name its columns with --fields.tool-name and"
                " --fields.tool-input, or with --fields.tool-calls"
            )
        if self.messages and (self.question or self.answer or self.tools):
            raise ValueError("--fields.messages names whole conversations: no other --fields.* goes with it")

    @property
    def tools(self) -> tuple[str, ...]:
        """The columns that are named for a tool's call and its output."""
        return tuple(filter(None, (self.tool_name, self.tool_input, self.tool_calls, self.tool_output)))


class Columns:
    """A row without the columns that are to be left aside, and the names of those that have been used."""

    def __init__(self, row: dict[str, Any], left_aside: frozenset[str] = frozenset()):
        self.row = {name: value for name, value in row.items() if name not in left_aside} if left_aside else row
        self.names = tuple(self.row)
        # a table gives every row all columns, with nulls in those that are not its own
        self.filled = tuple([name for name, value in self.row.items() if value is not None])
        self.used: set[str] = set()
        self._whole = row

    def any_of(self, names: Iterable[str]) -> bool:
        """Whether the row has one of these columns."""
        return not self.row.keys().isdisjoint(names)

    def take(self, name: str) -> Any:
        """The value of a column, null where there is none. It counts as used."""
        self.used.add(name)
        return self.row.get(name)

    def text(self, name: str) -> str:
        """The text of a column, which must hold some. It counts as used. Raises RowError."""
        self.used.add(name)
        return text_of(self.row, name)

    def unused(self) -> tuple[str, ...]:
        """Names of the whole row's columns that say something and were not used, in alphabetical order."""
        left = [name for name, value in self._whole.items() if name not in self.used and not is_blank(value)]
        return tuple(sorted(map(str, left)))

    def refuse_unused(self, known: Iterable[str], kind: str) -> None:
        """Raises RowError for one of these columns that says something and was not used; the others count as used."""
        for name in known:
            if name in self.used or name not in self.row:
                continue
            if not is_blank(self.row[name]):
                raise RowError(
                    "column not used",
                    f"{name} has a value that a row read as {kind} does not take:"
                    f" leave it aside with --ignore-columns {name}, or say how to read the row with --format"
                    " and --fields.*",
                )
            self.used.add(name)


def text_of(row: dict[str, Any], name: str) -> str:
    """The text of a column, which must hold some. Raises RowError."""
    value = row.get(name)
    if not isinstance(value, str):
        raise RowError("not text", f"{name} is {described(value)}, a string is needed")
    if not value.strip():
        raise RowError("empty text", f"{name} is empty")
    return value


def listing(names: Iterable[Any]) -> str:
    """Names of columns for a sentence, the first ones where there are very many."""
    names = [str(name)[:_WIDTH] for name in names]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def nearest(wanted: Iterable[str], names: Iterable[Any]) -> str:
    """` (did you mean NAME?)` for the name that is nearest to one of those wanted, or nothing."""
    there = [str(name) for name in names][:_SHOWN]
    for name in wanted:
        if near := difflib.get_close_matches(name, there, n=1, cutoff=0.7):
            return f" (did you mean {near[0][:_WIDTH]}?)"
    return ""


def lacking(names: Iterable[Any], name: str, mend: str) -> RowError:
    """The error of a row that has no column of this name; `mend` is the flag that chose it, or would choose one."""
    return RowError("unknown fields", f"the row has {listing(names)}, and no {name}{nearest([name], names)}: {mend}")


@functools.lru_cache(maxsize=256)
def find_pair(
    names: tuple[str, ...], filled: tuple[str, ...], fields: Fields, pairs: tuple[tuple[str, str], ...] = PAIRS
) -> tuple[str, str]:
    """The question's and the answer's columns among those of a row. Raises RowError where there are none, or several.

    names: all columns; filled: those without null, which are preferred.
    """
    pairs = tuple(dict.fromkeys((fields.question or question, fields.answer or answer) for question, answer in pairs))
    found = [pair for pair in pairs if {*pair} <= {*filled}] or [pair for pair in pairs if {*pair} <= {*names}]
    if len(found) == 1:
        return found[0]
    if found:
        choices = " or ".join(f"{question}/{answer}" for question, answer in found)
        raise RowError("ambiguous fields", f"the row has {choices}: choose with --fields.question and --fields.answer")
    raise _no_pair(names, fields, pairs)


def _no_pair(names: tuple[str, ...], fields: Fields, pairs: tuple[tuple[str, str], ...]) -> RowError:
    flags = "--fields.question", "--fields.answer"
    for named, flag in zip((fields.question, fields.answer), flags, strict=True):
        if named is not None and named not in names:
            return lacking(names, named, f"{flag} must name one of them")
    for half in (1, 0):  # a question without its answer, or the other way about
        wanted = list(dict.fromkeys(pair[half] for pair in pairs if pair[1 - half] in names))
        if wanted:
            there = f"the row has {listing(names)}, and no {' or '.join(wanted)}{nearest(wanted, names)}"
            return RowError("unknown fields", f"{there}: name the column with {flags[half]}")
    return RowError("unknown fields", f"the row has {listing(names)}: name two of them with {' and '.join(flags)}")
