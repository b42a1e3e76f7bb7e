"""What a data directory says of itself: rows that its preparation lost, and rows that bear no supervised token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_DROPPED = 0.01  # the share of rows that may be lost unless a run allows more
# How the reasons begin for which a preparation drops rows because it was told to.
ON_REQUEST = ("duplicate", "overlaps a test question", "longer than --max-length")


@dataclass(frozen=True, kw_only=True)
class Lost:
    """Rows that a preparation dropped without having been asked to."""

    rows: int  # that passed --where
    count: int  # of them dropped
    reason: str  # the commonest
    most: int  # dropped for it

    @property
    def share(self) -> float:
        """Of the rows, those that were dropped."""
        return self.count / self.rows

    def __str__(self) -> str:
        return f'{self.count:,} of {self.rows:,} rows ({self.share:.2%}), {self.most:,} of them for "{self.reason}"'


def lost_rows(meta: Mapping[str, Any]) -> Lost | None:
    """What a directory's meta.json says of lost rows; None where there are none or it says nothing."""
    lost = {reason: count for reason, count in _dropped(meta).items() if not reason.startswith(ON_REQUEST)}
    rows = meta.get("rows", 0) - meta.get("filtered", 0)
    if not lost or not rows:
        return None
    reason = max(lost, key=lost.__getitem__)
    return Lost(rows=rows, count=sum(lost.values()), reason=reason, most=lost[reason])


def _dropped(counts: Mapping[str, Any]) -> dict[str, int]:
    """Dropped rows of a directory or a source by reason."""
    dropped = counts.get("dropped", {})
    return {reason: drop["count"] if isinstance(drop, Mapping) else drop for reason, drop in dropped.items()}


def unsupervised(meta: Mapping[str, Any]) -> list[str]:
    """The sources and kinds of row that have rows and no supervised token, in words.

    None of a directory of held-out documents, which counts the rows of the whole that it was taken from.
    """
    if "held_out_of" in meta:
        return []
    kinds, sources = meta.get("kind_counts", {}), meta.get("sources", [])
    left_out = _left_out(meta)  # of which kind, it does not say
    silent = [f"the {one['rows']:,} rows of kind {kind}" for kind, one in kinds.items() if _is_silent(one, left_out)]
    for one in sources:
        if _is_silent(one, _left_out(one) + one.get("filtered", 0)):
            silent.append(f"the {one['rows']:,} rows of source {one['name']}")
    return silent


def _left_out(counts: Mapping[str, Any]) -> int:
    """The rows of a directory or source that are none of its documents because it was prepared so."""
    dropped = sum(drop for reason, drop in _dropped(counts).items() if reason.startswith(ON_REQUEST))
    return counts.get("held_out", 0) + counts.get("not_taken", 0) + dropped


def _is_silent(counts: Mapping[str, Any], left_out: int) -> bool:
    """Whether there are rows that should be trained, and no supervised token."""
    expected = counts.get("documents", 0) or counts.get("rows", 0) > left_out
    return bool(expected) and counts.get("supervised_tokens") == 0
