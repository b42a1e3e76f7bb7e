"""The settings of a sweep's runs: a recipe's warmup at the sweep's length, and all that its results are made of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engine.changes import LAYOUT, settings
from engine.cli import is_given, parse_run, split_weight, take_files
from engine.config import RunConfig
from examples.made_of import named, weights_fingerprint

# Beside the layout, what leaves the course of a run as it is but for rounding, and its rate, which the sweep is about.
SAME_COURSE = ("output", "optim.lr", "max-dropped", "backend", "recompute", "overlap", "bucket-size")


def own_length(config: RunConfig, flags: list[str]) -> tuple[RunConfig, list[str]]:
    """The sweep's runs, with the warmup and the decay of a recipe cut to a shorter length; and what to say of it.

    ValueError where the recipe's own length is counted in epochs, so that its warmup cannot be set against it.
    """
    files, rest = take_files(flags)
    if not files or config.steps is None or not is_given("steps", rest):
        return config, []
    recipe = parse_run([str(file) for file in files])
    changes, lines = {}, []
    for name in ("warmup_steps", "decay_steps"):
        steps = getattr(config.optim, name)
        if not steps or is_given(f"optim.{name}", rest):
            continue
        if recipe.epochs is not None:
            raise ValueError(
                f"the recipe's {name} {steps:,} belong to a run of {recipe.epochs:g} epoch(s) and cannot be scaled to "
                f"--steps {config.steps:,}: give --optim.{name.replace('_', '-')} for the sweep's runs behind --"
            )
        if recipe.steps is not None and config.steps < recipe.steps:
            changes[name] = max(1, round(steps * config.steps / recipe.steps))
            lines.append(
                f"{name}: {steps:,} of the recipe's {recipe.steps:,} steps, {changes[name]:,} of the sweep's "
                f"{config.steps:,}"
            )
    return replace(config, optim=replace(config.optim, **changes)), lines


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
