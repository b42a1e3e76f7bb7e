"""What a model was made of: base model, data, settings, course and averaging, in a file that travels with it.

provenance.json    `base_model` and `data` from the start of a run on; in an export also `steps`, `settings`, `course`
                   and Lathe's version; `earlier` is the same of a round of training before this one

A run writes it beside its model files, so that checkpoints and exports have it although base model, data and RUN are
gone. It names no path of a machine: of what lies on disk the last part of its name, of a hub's model or data set the
name there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from data.documents import Documents
from data.index_checks import read_meta
from engine.checkpointing.directory import HF, parse_manifest
from engine.cli import split_weight
from engine.reporting.metrics import read_metrics
from engine.run_folder import RunFolder, read_object

FILE = "provenance.json"
# The settings of a run that decide what is learned: neither paths, layout, logs nor guards.
SETTINGS = (
    "seq_len",
    "global_batch_size",
    "batch_unit",
    "too_long",
    "steps",
    "epochs",
    "seed",
    "precision",
    "fp8",
    "optim",
    "override",
    "moe",
    "mcore",
)
COUNTS = ("rows", "filtered", "held_out", "not_taken", "repeated", "documents", "tokens", "supervised_tokens")
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_HUB_CACHE = re.compile(r"models--(\w[\w.-]*?)--(\w[\w.-]*)")  # the folder of a model in the cache of a hub
_FILE_NAME = re.compile(r"\.(jsonl|ndjson|json|csv|tsv|parquet|arrow|feather)(\.(gz|zst))?$")


def read_provenance(directory: Path) -> dict[str, Any]:
    """What provenance.json of a directory says; nothing where there is none, or one that Lathe did not write."""
    found = read_object(directory / FILE)
    return found if "lathe" in found else {}


def write_provenance(directory: Path, provenance: Mapping[str, Any]) -> None:
    """Writes provenance.json."""
    text = json.dumps(provenance, indent=2, ensure_ascii=False)
    (directory / FILE).write_text(text + "\n", encoding="utf-8")


def provenance_at_start(
    base: Mapping[str, Any], model: str | None, weights: Path, data: Sequence[str], indexes: Sequence[Documents]
) -> dict[str, Any]:
    """What a run that begins knows of what it is made of.

    base: what its base model says of itself; model: --model, and weights: where it lies; data: --data, and indexes:
    the same opened.
    """
    found = {
        "lathe": version(),
        "base_model": base.get("base_model") or _base_name(model, weights),
        "data": [_of_data(*split_weight(one), index.meta) for one, index in zip(data, indexes, strict=True)],
    }
    return {**found, "earlier": dict(base)} if base.get("steps") else found


def provenance_of(checkpoints: Sequence[Path]) -> dict[str, Any]:
    """What the export of a checkpoint of a run, or of the mean of several, is made of.

    Nothing where a run has not written the checkpoint: then what lies in its `hf/` says all there is.
    """
    last = checkpoints[-1]
    config, run = RunFolder(last).config, RunFolder(last.parent.parent)
    if not config.exists():
        return {}
    steps = [parse_manifest(path)["step"] for path in checkpoints]
    return complete(read_provenance(last / HF), config, run.metrics, steps)


def complete(begun: Mapping[str, Any], config: Path, metrics: Path, steps: Sequence[int]) -> dict[str, Any]:
    """What a run knew at its start, with its settings (config.yaml) and its course (metrics.jsonl) up to the last step.

    Without steps, as where nobody knows of which step a model is, the course is that of the whole run.
    A run that older versions began has nothing of the first; then the settings tell the names.
    """
    settings = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    if not begun:
        data = settings.get("data") or []
        model = settings.get("model")
        pairs = [split_weight(one) for one in data]
        begun = {
            "base_model": _base_name(model, Path(model or "")),
            "data": [_of_data(path, weight, _meta_of(Path(path))) for path, weight in pairs],
        }
    earlier = {"earlier": begun["earlier"]} if "earlier" in begun else {}
    return {
        "lathe": version(),
        "base_model": begun.get("base_model"),
        "steps": list(steps),
        "data": begun.get("data", []),
        "settings": {name: settings[name] for name in SETTINGS if settings.get(name) is not None},
        "course": course([line for line in read_metrics(metrics) if not steps or line["step"] <= max(steps)]),
        **earlier,
    }


def course(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What lines of metrics.jsonl sum up to: steps, tokens, losses; nothing where there are none."""
    if not lines:
        return {}
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    held_out = [(line["valid_loss"], line["step"]) for line in lines if line.get("valid_loss") is not None]
    found: dict[str, Any] = {
        "steps": lines[-1]["step"],
        "skipped_steps": sum(bool(line.get("skipped")) for line in lines),
        "tokens": sum(line["tokens"] for line in lines),
        "supervised_tokens": sum(line["supervised_tokens"] for line in lines),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
    }
    if held_out:
        best, at = min(held_out)
        found |= {"valid_loss": held_out[-1][0], "valid_step": held_out[-1][1], "best_valid_loss": best}
        found["best_valid_step"] = at
    return found


def hub_name(name: str) -> str | None:
    """The hub's OWNER/NAME of a model or data set, of which more may follow after a colon; None for a path."""
    base = name.partition(":")[0]
    is_name = _HUB_NAME.fullmatch(base) and not _FILE_NAME.search(base)
    return base if is_name and not Path(base).exists() else None


def version() -> str:
    """Lathe's version."""
    try:
        return metadata.version("lathe")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


def _base_name(model: str | None, weights: Path) -> dict[str, Any]:
    """What --model is called, and whether that is its name on the hub."""
    if model is None:
        return {"name": "built-in demo", "hub": False}
    cached = next((match for part in weights.parts if (match := _HUB_CACHE.fullmatch(part))), None)
    name = f"{cached[1]}/{cached[2]}" if cached else hub_name(model)
    return {"name": name or Path(model).absolute().name, "hub": name is not None}


def _meta_of(data: Path) -> dict[str, Any]:
    try:
        return read_meta(data)
    except (OSError, ValueError):
        return {}


def _of_data(path: str, weight: float, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Counts of a data directory as its meta.json has them."""
    dropped = {reason: one["count"] for reason, one in meta.get("dropped", {}).items()}
    found = {"name": Path(path).absolute().name, "weight": weight, "fingerprint": meta.get("fingerprint")}
    found |= {name: meta[name] for name in COUNTS if name in meta}
    found |= {"dropped": dropped} if dropped else {}
    found |= {"prompts": prompts} if (prompts := _prompts(meta.get("options", {}))) else {}
    return found | {"sources": [_of_source(source) for source in meta.get("sources", [])]}


def _prompts(options: Mapping[str, Any]) -> list[dict[str, str]]:
    """The texts around questions that data were prepared with, for all sources and for single ones."""
    found: list[dict[str, str]] = []
    for one in (options, *options.get("sources", [])):
        prompt = one.get("prompt") or {}
        system = prompt.get("system") if one.get("system") is None else one["system"]
        turns = {role: text for role, text in (("system", system), ("user", prompt.get("user"))) if text is not None}
        if turns and turns not in found:
            found.append(turns)
    return found


def _of_source(source: Mapping[str, Any]) -> dict[str, Any]:
    read_as = [file["name"] for file in source.get("files", [])]
    data = source.get("data", "")
    found = {"name": source["name"], "hub": hub_name(data) if read_as == [data] else None}
    return found | {name: source[name] for name in COUNTS if name in source}
