"""What a run that is resumed does otherwise than before: each changed setting, and those that need to be allowed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.check_values import ALLOWED_CHANGES
from engine.cli import flag_name, merge, read_recipe
from engine.config import RunConfig
from engine.run_folder import RunFolder

# How a run is started and where it lies, not what it does; data must hold the same documents, see `data.order`.
_SILENT = ("output", "data", "checkpoint.resume", "checkpoint.resume-from", "checkpoint.allow-change")
_PATHS = ("model", "data", "valid")  # the same from wherever they are named
LAYOUT = ("tp", "cp", "pp", "vpp", "pp-layout", "ep", "etp", "sp", "micro-batch-size")
# Settings that change the course, and the name under which --checkpoint.allow-change allows them. What the model is
# without its overrides is held against the checkpoint itself, see `engine.base_model.resumed_model`.
_NEEDS = {name: name for name in ALLOWED_CHANGES if name != "model"} | {
    "override.rope-theta": "model",
    "override.max-position-embeddings": "model",
}
_NOTES = {"model": ", which is not read: the run goes on with the weights of its own checkpoint"}


@dataclass(frozen=True)
class Change:
    """One setting, named as its flag is, with its value in the run that is resumed and in this one."""

    name: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.name}: {_shown(self.before)} -> {_shown(self.after)}"


def settings(config: RunConfig) -> dict[str, Any]:
    """Every setting of a run by the name of its flag, in the order of the flags."""
    return dict(_flat(dataclasses.asdict(config)))


def read_config(path: Path) -> RunConfig:
    """What a run's config.yaml says; a setting that it does not know yet has its default. ValueError as a recipe's."""
    return merge(RunConfig(), read_recipe(path))


def changed_settings(before: RunConfig, after: RunConfig) -> list[Change]:
    """The settings in which two runs differ, in the order of the flags; paths are compared by where they lead."""
    was, now = settings(before), settings(after)
    pairs = [Change(name, was.get(name), now.get(name)) for name in {**was, **now}]
    return [one for one in pairs if _comparable(one.name, one.before) != _comparable(one.name, one.after)]


def config_of(checkpoint: Path, run: RunFolder) -> Path:
    """Where the settings lie with which a checkpoint was made: within it, or in RUN where an older one has none.

    RUN's are those of the last start, which was perhaps killed before it saved anything.
    """
    own = checkpoint / run.config.name
    return own if own.exists() else run.config


def resume_lines(config: RunConfig, path: Path, *, precision: str | None) -> tuple[str, ...]:
    """What a resumed run says of the settings that it changes, a line each.

    path: the config.yaml of what is resumed, see `config_of`; one that cannot be read is said, too.
    precision: what the checkpoint was written with, where it says so. ValueError for a change of course that
    `--checkpoint.allow-change` does not name.
    """
    try:
        before, unread = read_config(path), []
    except (ValueError, OSError) as error:
        before, unread = config, [f"not known, for the run's settings cannot be read: {error}"]
    if precision is not None:
        # An older checkpoint has no config.yaml of its own, and a start that was killed left another in RUN.
        before = merge(before, {"precision": precision})
    changes = [one for one in changed_settings(before, config) if one.name not in _SILENT]
    _refuse(changes, config.checkpoint.allow_change, config.output)
    layout = [str(one) for one in changes if one.name in LAYOUT]
    others = [f"{one}{_NOTES.get(one.name, '')}" for one in changes if one.name not in LAYOUT]
    return (*unread, *others, *([f"layout: {', '.join(layout)}"] if layout else []))


def _refuse(changes: list[Change], allowed: tuple[str, ...], run: Path) -> None:
    names = {name.replace("_", "-") for name in allowed}
    needed = [one for one in changes if one.name in _NEEDS and _NEEDS[one.name] not in names]
    if needed:
        flags = " ".join(dict.fromkeys(_NEEDS[one.name] for one in needed))
        said = " and ".join(f"--{one.name} was {_shown(one.before)} and is {_shown(one.after)}" for one in needed)
        raise ValueError(
            f"{said}, which changes the course of the run in {run}: give what it was started with, or allow the change "
            f"with --checkpoint.allow-change {flags}"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{flag_name(name)}.")
        else:
            yield f"{prefix}{flag_name(name)}", value


def _comparable(name: str, value: Any) -> Any:
    if name not in _PATHS or value is None:
        return value
    return [os.path.abspath(one) for one in ([value] if isinstance(value, str) else value)]


def _shown(value: Any) -> str:
    """A value as its flag takes it."""
    if isinstance(value, tuple | list):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)
