"""Steps that are skipped because their loss or gradient is not finite: how many may be, and what they held."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import distributed

from engine.reporting.metrics import read_metrics

IN_A_ROW = 3  # what fails more often is no matter of single documents


@dataclass(frozen=True, kw_only=True)
class SkippedStep:
    """A step whose update was not made: a line of RUN/skipped.jsonl."""

    step: int
    reason: str
    suspects: tuple[str, ...]  # of `documents`, those of microbatches whose loss is not finite
    documents: tuple[str, ...]  # the whole batch as DATA:document; none of it was learned from


class SkippedSteps:
    """The steps of a run that were skipped, and whether one more may be; the same on every rank."""

    def __init__(self, most: int, steps: list[int]):
        self.most = most
        self.steps = steps  # in order

    def may_skip(self, step: int) -> bool:
        """Whether so few were skipped that this step may be, too."""
        return len(self.steps) < self.most and self.steps[-IN_A_ROW:] != list(range(step - IN_A_ROW, step))

    def account(self) -> str:
        """What was skipped so far, as the end of an error message; empty for nothing."""
        return f"; skipped before: {', '.join(map(str, self.steps))}" if self.steps else ""


def skipped_until(path: Path, step: int, *, most: int) -> SkippedSteps:
    """What a run that stands at `step` has skipped by its file, which one rank reads for all; every rank calls it."""
    known = [[line["step"] for line in read_metrics(path)] if distributed.get_rank() == 0 else []]
    distributed.broadcast_object_list(known, src=0)
    return SkippedSteps(most, [one for one in known[0] if one <= step])


def write_down(path: Path, skipped: SkippedStep) -> None:
    """Appends a line to RUN/skipped.jsonl."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(skipped)) + "\n")
