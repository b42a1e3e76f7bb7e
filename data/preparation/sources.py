"""One source of rows: what it is read from, how, and how much of it is taken."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from data.preparation.formats import Fields
from data.preparation.prompt import Prompt

_NUMBER = re.compile(r"-?(\d+|\d*\.\d+|\d+\.)")
_ENDINGS = re.compile(r"(\.(jsonl|ndjson|json|parquet|csv|arrow))?(\.(gz|zst))?$")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Rows that are prepared in one way. What is None is as the options for all sources say.

    Raises ValueError for a `take` or a `hold_out` that cannot be.
    """

    data: str
    """A file, a pattern of files, a directory, or a hub name (name[:config[:split]])."""
    name: str | None = None
    """What reports and metrics call it; made from `data` where it is not given."""
    take: int | float = 1.0
    """How many of its documents: a share with a point (0.5 half of them, 3.0 each three times), or a whole count."""
    format: str | None = None
    fields: Fields | None = None
    prompt: str | Path | Prompt | None = None
    system: str | None = None
    ignore_columns: tuple[str, ...] | None = None
    where: tuple[str, ...] | None = None
    limit: int | None = None
    hold_out: int | float | None = None
    """Documents (whole), or the share of its documents (with a point), that go into OUTPUT/valid."""
    config: str | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("--sources: a source needs `data`, a file or the name of a data set")
        if self.name is not None and not self.name.strip():
            raise ValueError(f"--sources {self.data}: its name is empty")
        _, colon, amount = self.data.rpartition(":")
        if colon and _NUMBER.fullmatch(amount) and not Path(self.data).exists():
            raise ValueError(f"--sources {self.data}: in a file an amount is a key of its own, `take: {amount}`")
        if not 0 < self.take < math.inf:
            raise ValueError(f"--sources {self.data}:{self.take}: take a share or a count above 0, or leave it out")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--sources {self.data}: limit {self.limit} must be at least 1")
        check_hold_out(f"--sources {self.data}: hold_out", self.hold_out or 0)


def check_hold_out(name: str, value: int | float) -> None:
    """Raises ValueError for a count below 0, or a share that is not in [0, 1)."""
    if not 0 <= value < (1 if isinstance(value, float) else math.inf):
        raise ValueError(f"{name} {value}: hold out a share in [0, 1), such as 0.05, or a whole number of documents")


def parse_amount(text: str) -> int | float:
    """A whole number as int, one with a point as float. Raises ValueError for what is none."""
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{text} is no number")
    return float(text) if "." in text else int(text)


def parse_source(text: str) -> Source:
    """`DATA` or `DATA:TAKE`: what follows the last colon is the part to take where it is a number."""
    data, colon, amount = text.rpartition(":")
    if colon and _NUMBER.fullmatch(amount) and not Path(text).exists():
        return Source(data=data, take=parse_amount(amount))
    return Source(data=text)


def name_all(sources: list[Source]) -> list[str]:
    """The sources' names, in order, all different. Raises ValueError where two were given the same one."""
    given = [source.name for source in sources if source.name is not None]
    for name in given:
        if given.count(name) > 1:
            raise ValueError(f"--sources: two sources have the name {name}: give each its own")
    names: list[str] = []
    for source in sources:
        name = wanted = source.name or _name_of(source.data)
        number = 1
        while source.name is None and (name in names or name in given):
            number += 1
            name = f"{wanted}-{number}"
        names.append(name)
    return names


def _name_of(data: str) -> str:
    """`train` of some/train.jsonl.gz, `folder` of folder/*.jsonl, `NAME-CONFIG-SPLIT` of a hub name."""
    base, *rest = data.split(":")
    path = Path(base)
    while any(mark in path.name for mark in "*?["):
        path = path.parent
    stem = _ENDINGS.sub("", path.name if path.name else path.resolve().name)
    return "-".join(filter(None, [stem, *rest])) or "rows"
