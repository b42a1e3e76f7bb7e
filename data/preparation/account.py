"""The account of rows and tokens: what became of each, by source and by kind, as meta.json holds it."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np


@dataclass
class Tally:
    """Rows of one source or kind, and the documents that a directory holds of them."""

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    supervised_tokens: int = 0

    def add(self, copies: np.ndarray, lengths: np.ndarray, supervised: np.ndarray) -> None:
        """Adds documents that are written `copies` [documents] times; int64 tokens of each, and supervised ones."""
        self.documents += int(copies.sum())
        self.tokens += int((copies * lengths).sum())
        self.supervised_tokens += int((copies * supervised).sum())


@dataclass
class Account(Tally):
    """What became of the rows of one source; `documents` are those to train on."""

    filtered: int = 0
    cut: int = 0  # documents that rows of text gave beyond their first
    not_taken: int = 0
    held_out: int = 0
    repeated: int = 0
    encoded_tokens: int = 0
    dropped_tokens: int = 0  # of documents that were too long, or duplicates
    not_taken_tokens: int = 0
    held_out_tokens: int = 0
    repeated_tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # by reason
    files: Counter[str] = field(default_factory=Counter)  # rows of each
    unused_columns: set[str] = field(default_factory=set)
    kinds: dict[str, Tally] = field(default_factory=dict)
    valid: Tally = field(default_factory=Tally)  # what is held out

    def add_part(self, file: str, report: dict[str, Any]) -> None:
        """Adds the numbers of one chunk of a file."""
        self.rows += report["rows"]
        self.files[file] += report["rows"]
        self.filtered += report["filtered"]
        self.encoded_tokens += report["tokens"]
        self.dropped_tokens += report["dropped_tokens"]
        self.unused_columns.update(report["unused_columns"])
        for kind, rows in report["kinds"].items():
            self.kinds.setdefault(kind, Tally()).rows += rows

    def add_documents(
        self,
        lengths: np.ndarray,
        supervised: np.ndarray,
        duplicate: np.ndarray,
        held_out: np.ndarray,
        copies: np.ndarray,
    ) -> None:
        """Adds documents: for each its tokens and supervised ones (int64), whether it is a duplicate, or held out, and
        how often it is written to be trained on."""
        self.add(copies, lengths, supervised)
        self.valid.add(held_out, lengths, supervised)
        not_taken = ~duplicate & ~held_out & (copies == 0)
        more = np.maximum(copies - 1, 0)
        self.dropped_tokens += int(lengths[duplicate].sum())
        self.not_taken += int(not_taken.sum())
        self.not_taken_tokens += int(lengths[not_taken].sum())
        self.held_out += int(held_out.sum())
        self.held_out_tokens += int(lengths[held_out].sum())
        self.repeated += int(more.sum())
        self.repeated_tokens += int((lengths * more).sum())

    def check(self) -> None:
        """Asserts that every row and every token is in one place."""
        rows = self.filtered + self.dropped.total() + self.not_taken + self.held_out + self.documents
        assert self.rows == rows - self.repeated - self.cut, f"rows do not add up: {self}"
        tokens = self.dropped_tokens + self.not_taken_tokens + self.held_out_tokens + self.tokens
        assert self.encoded_tokens == tokens - self.repeated_tokens, f"tokens do not add up: {self}"

    def numbers(self) -> dict[str, int]:
        """All that is one number."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.type is int}


def total(accounts: Iterable[Account]) -> dict[str, int]:
    """The numbers of all sources together."""
    summed: Counter[str] = Counter()
    for account in accounts:
        summed.update(account.numbers())
    return dict(summed)


def kinds_together(accounts: Iterable[Account]) -> dict[str, dict[str, int]]:
    """The numbers of each kind of row over all sources."""
    summed: dict[str, Counter[str]] = {}
    for account in accounts:
        for kind, tally in account.kinds.items():
            summed.setdefault(kind, Counter()).update(vars(tally))
    return {kind: dict(numbers) for kind, numbers in summed.items()}
