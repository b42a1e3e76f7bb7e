"""Strings that remember which message each of their characters comes from, through all that a template does.

A chat template is a program over strings. When its contents are `Tracked`, what it writes still knows, character by
character, what is content and what the template itself wrote, with nothing marked, searched or guessed. A string
operation that is not known here keeps no origins: its text then counts as the template's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple


class Run(NamedTuple):
    """Characters [start, stop) of a string that are those of a part from `offset` on, or stand for it (offset -1).

    An empty run says that the part is among what the text around it stands for.
    """

    start: int
    stop: int
    part: int
    offset: int


class Tracked(str):
    """A string with the runs of its characters that come from parts; all other characters are the template's."""

    runs: tuple[Run, ...]

    def __new__(cls, text: str, runs: Iterable[Run] = ()) -> Tracked:
        tracked = super().__new__(cls, text)
        tracked.runs = tuple(runs)
        return tracked

    @classmethod
    def whole(cls, text: str, part: int) -> Tracked:
        """All of a part's text."""
        return cls(text, [Run(0, len(text), part, 0)])

    def cut(self, start: int, stop: int) -> Tracked:
        """Characters [start, stop)."""
        if start == 0 and stop >= str.__len__(self):
            return self
        runs = []
        for run in self.runs:
            first, last = max(run.start, start), min(run.stop, stop)
            if first < last or (run.start == run.stop and first == last):
                offset = run.offset if run.offset < 0 else run.offset + first - run.start
                runs.append(Run(first - start, last - start, run.part, offset))
        return Tracked(str.__getitem__(self, slice(start, stop)), runs)

    def _found(self, pieces: Iterable[str]) -> list[str]:
        """Pieces that lie one after the other in this string, with their origins."""
        found: list[str] = []
        position = 0
        for piece in pieces:
            position = str.find(self, piece, position)
            found.append(self.cut(position, position + len(piece)))
            position += len(piece)
        return found

    def _coarse(self, text: Any) -> Any:
        """Text that stands for all of this string, such as its upper case."""
        return standing_for(text, [run.part for run in self.runs]) if isinstance(text, str) else text

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> str:
        return concat((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> str:
        return concat((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: Any) -> str:
        return concat([self] * times)

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> str:
        return self._coarse(str.__mod__(self, values))

    def __iter__(self) -> Iterator[str]:
        return (self.cut(place, place + 1) for place in range(str.__len__(self)))

    def __getitem__(self, key: Any) -> str:
        if not isinstance(key, slice):
            place = range(str.__len__(self))[key]
            return self.cut(place, place + 1)
        start, stop, step = key.indices(str.__len__(self))
        if step == 1:
            return self.cut(start, max(start, stop))
        return concat([self.cut(place, place + 1) for place in range(start, stop, step)])

    def strip(self, chars: str | None = None) -> str:
        return self.cut(str.__len__(self) - len(str.lstrip(self, chars)), len(str.rstrip(self, chars)))

    def lstrip(self, chars: str | None = None) -> str:
        return self.cut(str.__len__(self) - len(str.lstrip(self, chars)), str.__len__(self))

    def rstrip(self, chars: str | None = None) -> str:
        return self.cut(0, len(str.rstrip(self, chars)))

    def removeprefix(self, prefix: str) -> str:
        return self.cut(len(prefix), str.__len__(self)) if self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> str:
        return self.cut(0, str.__len__(self) - len(suffix)) if suffix and self.endswith(suffix) else self

    def split(self, *args: Any, **kwargs: Any) -> list[str]:  # type: ignore[override]
        return self._found(str.split(self, *args, **kwargs))

    def rsplit(self, *args: Any, **kwargs: Any) -> list[str]:  # type: ignore[override]
        return self._found(str.rsplit(self, *args, **kwargs))

    def splitlines(self, keepends: bool = False) -> list[str]:
        return self._found(str.splitlines(self, keepends))

    def partition(self, sep: str) -> tuple[str, str, str]:
        return tuple(self._found(str.partition(self, sep)))  # type: ignore[return-value]

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        return tuple(self._found(str.rpartition(self, sep)))  # type: ignore[return-value]

    def replace(self, old: str, new: str, count: int = -1) -> str:  # type: ignore[override]
        if not old:
            return self._coarse(str.replace(self, old, new, count))
        return join(new, self._found(str.split(self, old, count)))

    def join(self, pieces: Iterable[str]) -> str:
        return join(self, list(pieces))


def _coarsely(name: str) -> Callable:
    method = getattr(str, name)
    return lambda self, *args, **kwargs: self._coarse(method(self, *args, **kwargs))


for _name in ("upper", "lower", "title", "capitalize", "swapcase", "casefold", "expandtabs", "translate", "zfill",
              "center", "ljust", "rjust", "format", "format_map"):  # fmt: skip
    setattr(Tracked, _name, _coarsely(_name))


class TrackedDict(dict):
    """An object that stands for a part even where it holds no string."""

    part: int = -1


def standing_for(text: str, parts: Sequence[int]) -> str:
    """Text that stands for parts as a whole: the last of them has its characters."""
    if not parts:
        return text
    *others, last = dict.fromkeys(parts)
    return Tracked(text, [*(Run(0, 0, part, -1) for part in others), Run(0, len(text), last, -1)])


def concat(pieces: Iterable[str]) -> str:
    """The pieces end to end, as `"".join`."""
    pieces = list(pieces)
    runs, position, kind = [], 0, Tracked
    for piece in pieces:
        if type(piece) is not str and isinstance(piece, Tracked):
            kind = Watched if isinstance(piece, Watched) else kind
            runs += [Run(run.start + position, run.stop + position, run.part, run.offset) for run in piece.runs]
        position += str.__len__(piece)
    text = "".join(pieces)
    return kind(text, runs) if runs else text


def join(separator: str, pieces: Sequence[str]) -> str:
    """The pieces with a separator between them, as `separator.join`."""
    between: list[str] = []
    for piece in pieces:
        between += [separator, piece]
    return concat(between[1:])


def str_join(values: Iterable[Any]) -> str:
    """What `~` makes of its operands."""
    return concat([str(value) for value in values])


def filter_join(value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    """The filter `join`, of strings or of one attribute of objects."""
    values = list(value)
    if attribute is not None:
        values = [one[attribute] for one in values]
    return join(str(d), [str(one) for one in values])


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The filter `tojson` as transformers has it: text that stands for every part in the value."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return standing_for(text, list(_parts(value)))


def _parts(value: Any) -> Iterator[int]:
    if isinstance(value, Tracked):
        yield from (run.part for run in value.runs)
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _parts(key)
            yield from _parts(one)
        if isinstance(value, TrackedDict):
            yield value.part
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _parts(one)


def missing(runs: Sequence[Run], length: int) -> list[tuple[int, int]]:
    """Characters [start, stop) of a part of this length that none of its runs has."""
    lost, reached = [], 0
    for start, stop in sorted((run.offset, run.offset + run.stop - run.start) for run in runs):
        if start > reached:
            lost.append((reached, start))
        reached = max(reached, stop)
    return [*lost, (reached, length)] if reached < length else lost


class Inspected(Exception):
    """A template looked into a content, so that what it writes may depend on it."""


class Watched(Tracked):
    """A string that may only be written and stripped: anything else raises Inspected."""

    def strip(self, chars: str | None = None) -> str:
        if chars is not None:
            raise Inspected
        stripped = super().strip()
        return Watched(stripped, stripped.runs if isinstance(stripped, Tracked) else ())

    def __bool__(self) -> bool:  # contents are watched for conversations whose contents are not blank
        return True


def _refuse(self: Watched, *args: Any, **kwargs: Any) -> Any:
    raise Inspected


_WRITING = {"__new__", "__str__", "__add__", "__radd__", "__class__", "__init__", "__getattribute__", "__setattr__"}
_WRITING |= {"__init_subclass__", "__subclasshook__", "__doc__", "__bool__", "strip", "__dir__"}
for _name in set(dir(str)) - _WRITING:
    setattr(Watched, _name, _refuse)
