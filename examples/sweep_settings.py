"""The settings of a sweep's runs: a recipe's warmup at the sweep's length, and all that its results are made of."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.changes import LAYOUT, settings
from engine.cli import is_given, parse_run, read_recipe, split_weight, take_files
from engine.config import RunConfig
from examples.made_of import named, weights_fingerprint

# Beside the layout, what leaves the course of a run as it is but for rounding, and its rate, which the sweep is about.
SAME_COURSE = (
    "output",
    "optim.lr",
    "max-dropped",
    "backend",
    "recompute",
    "recompute-modules",
    "overlap",
    "bucket-size",
)


def own_length(config: RunConfig, flags: list[str]) -> tuple[RunConfig, list[str]]:
    """The sweep's runs, with the warmup and the decay of a recipe cut to a shorter length; and what to say of it.

    ValueError where the sweep's length cannot be set against the recipe's, for one is counted in epochs.
    """
    files, rest = take_files(flags)
    changes, lines = {}, []
    for name in ("warmup_steps", "decay_steps"):
        steps, recipe = getattr(config.optim, name), _recipe_of(files, name)
        if not steps or recipe is None or is_given(f"optim.{name}", rest):
            continue
        was, now = (recipe.steps, recipe.epochs), (config.steps, config.epochs)
        if was in (now, (None, None)):
            continue
        own: float | None = None
        whole: float | None = None
        if config.epochs is None and recipe.epochs is None:
            own, whole = config.steps, recipe.steps
        elif config.steps is None and recipe.steps is None:
            own, whole = config.epochs, recipe.epochs
        if own is None or whole is None:
            raise ValueError(
                f"the recipe's {name} {steps:,} belong to a run of {_words(*was)} and cannot be scaled to "
                f"{_flags(*now)}: give --optim.{name.replace('_', '-')} for the sweep's runs behind --"
            )
        if own < whole:
            changes[name] = max(1, round(steps * own / whole))
            lines.append(
                f"{name}: {steps:,} of the recipe's {_words(*was)}, {changes[name]:,} of the sweep's {_words(*now)}"
            )
    return replace(config, optim=replace(config.optim, **changes)), lines


def _recipe_of(files: list[Path], name: str) -> RunConfig | None:
    """The files up to the last one that sets a field of `optim`, whose length it belongs to; None where none does."""
    for count in range(len(files), 0, -1):
        optim = read_recipe(files[count - 1]).get("optim") or {}
        if name in {str(key).replace("-", "_") for key in optim}:
            return parse_run([str(file) for file in files[:count]])
    return None


def _words(steps: int | None, epochs: float | None) -> str:
    counts = [f"{steps:,} steps"] if steps is not None else []
    return " or ".join([*counts, *([f"{epochs:g} epoch(s)"] if epochs is not None else [])])


def _flags(steps: int | None, epochs: float | None) -> str:
    counts = [f"--steps {steps:,}"] if steps is not None else []
    return " ".join([*counts, *([f"--epochs {epochs:g}"] if epochs is not None else [])]) or "--epochs 1"


def longer(config: RunConfig, before: RunConfig) -> bool:
    """Whether a run may go on beyond the end of one that is done."""

    def limits(one: RunConfig) -> tuple[float, float]:
        epochs = one.epochs or (1.0 if one.steps is None else math.inf)
        return (math.inf if one.steps is None else one.steps), epochs

    return any(now > was for now, was in zip(limits(config), limits(before), strict=True))


def made_of(config: RunConfig) -> dict[str, Any]:
    """All that decides the course and the losses of a sweep's run but for its rate, by the names of the flags."""
    from data.index import open_index

    def content(path: str, weight: float) -> str:
        try:
            return f"{open_index(path).fingerprint} {weight:g}"
        except (ValueError, OSError):  # which the run itself will say
            return ""

    sets = {"data": [split_weight(one) for one in config.data]}
    sets["valid"] = [(one.partition("=")[2] or one, 1.0) for one in config.valid]
    found = {name: value for name, value in settings(config).items() if name.split(".")[0] not in ("log", "checkpoint")}
    found = {name: value for name, value in found.items() if name not in (*LAYOUT, *SAME_COURSE)}
    if config.optim.schedule == "constant":  # the only course that knows nothing of the run's length
        del found["steps"], found["epochs"]
    found["model"] = config.model and named(config.model, weights_fingerprint(config.model))
    for flag, pairs in sets.items():
        found[flag] = [named(f"{path}:{weight:g}", content(path, weight)) for path, weight in pairs]
    return found
