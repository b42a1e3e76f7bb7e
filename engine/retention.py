"""When a checkpoint is due, and which ones go when it is complete."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

from engine.config import CheckpointConfig
from engine.reporting.metrics import read_metrics
from engine.run_folder import MANIFEST, RunFolder


def is_due(
    step: int, seconds_since_last_save: float, config: CheckpointConfig, *, last: bool = False, stopping: bool = False
) -> Literal["kept", "rescue"] | None:
    """Whether a checkpoint is due after a step, and whether it stays or is a rescue, which the next one replaces.

    seconds_since_last_save: by the clock of one rank, which all must agree on. stopping: the run has to end before its
    last step; what it saves then stays, unless rescue checkpoints are asked for.
    """
    if last or (config.every and step % config.every == 0):
        return "kept"
    rescues = bool(config.rescue_every or config.rescue_minutes)
    if stopping:
        return "rescue" if rescues else "kept"
    if config.rescue_every and step % config.rescue_every == 0:
        return "rescue"
    return "rescue" if config.rescue_minutes and seconds_since_last_save >= 60 * config.rescue_minutes else None


def to_remove(
    steps: Collection[int],
    *,
    latest: int | None,
    rescues: Collection[int] = (),
    losses: Mapping[int, float | None] | None = None,
    keep: int = 0,
    keep_every: int = 0,
    keep_best: int = 0,
) -> list[int]:
    """The steps of the checkpoints that go: never that which `latest` names, nor any later one.

    Of the others a rescue goes in any case. The `keep` newest stay (0: all; `latest` counts among them unless it is a
    rescue), every multiple of `keep_every`, and the `keep_best` of the lowest held-out loss in `losses`; of equal ones
    the earlier.
    """
    if latest is None:
        return []
    there = sorted(step for step in steps if step <= latest)
    regular = [step for step in there if step not in rescues]
    stay = {latest, *(regular[-keep:] if keep else regular)}
    if keep_every:
        stay |= {step for step in regular if step % keep_every == 0}
    measured = {step: loss for step, loss in (losses or {}).items() if loss is not None and math.isfinite(loss)}
    best = sorted((step for step in regular if step in measured), key=lambda step: (measured[step], step))
    stay |= set(best[:keep_best])
    return [step for step in there if step not in stay]


def retain(run: RunFolder, config: CheckpointConfig) -> list[Path]:
    """Removes the checkpoints that go, and their exports; returns where they stood. For one rank, after each save."""
    there = run.checkpoint_steps()
    name = run.latest.read_text(encoding="utf-8").strip() if run.latest.exists() else ""
    latest = next((step for step, path in there.items() if path.name == name), None)
    losses = {}
    if config.keep_best:
        losses = {line["step"]: line.get("valid_loss") for line in read_metrics(run.metrics)}
    going = to_remove(
        there,
        latest=latest,
        rescues=[step for step, path in there.items() if is_rescue(path)],
        losses=losses,
        keep=config.keep,
        keep_every=config.keep_every,
        keep_best=config.keep_best,
    )
    return [run.remove_checkpoint(step) for step in going]


def is_rescue(checkpoint: Path) -> bool:
    """Whether a checkpoint says of itself that the next one replaces it; not where it says nothing that can be read."""
    try:
        return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8")).get("rescue") is True
    except (OSError, ValueError, AttributeError):
        return False
