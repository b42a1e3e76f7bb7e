"""All that RUN holds, and the name of every file in it: the loop, the report, the tools and the sweep ask here."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

FAILED = "failed: "  # what `unfinished` begins with after a loss or a gradient that was not finite
BEING_WRITTEN = ".tmp"  # the end of a name that does not count yet


class RunFolder:
    """The directory of one training run; nothing is made or read before a method is called."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.yaml"  # the run's settings, which start it again
        self.metrics = self.path / "metrics.jsonl"  # one line a step: the record
        self.tensorboard = self.path / "tensorboard"  # a mirror of it
        self.report = self.path / "report.html"  # the same as a page
        self.wandb_id = self.path / "wandb_id"  # the Weights & Biases run to go on in
        self.unfinished = self.path / "unfinished"  # there until the last step is done; says how the run stands
        self.skipped = self.path / "skipped.jsonl"  # steps that --on-bad-step skip left out, with their documents
        self.heartbeats = self.path / "heartbeats"  # while a run runs: where each rank stands
        self.stacks = self.path / "stacks"  # rank_N.txt, what ranks were doing when the watchdog ended them
        self.model_files = self.path / "model_files"  # config, tokenizer and templates, as checkpoints hold them
        self.checkpoints = self.path / "checkpoints"  # step_NNNNNN/, see `engine.checkpointing.directory`
        self.latest = self.checkpoints / "latest"  # the name of the newest
        self.exports = self.path / "hf"  # step_NNNNNN/, by --checkpoint.export-hf

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step stands."""
        return self.checkpoints / f"step_{step:06d}"

    def export(self, step: int) -> Path:
        """Where the checkpoint of a step is exported to."""
        return self.exports / self.checkpoint(step).name

    def checkpoint_steps(self) -> dict[int, Path]:
        """The checkpoints by step, in order, those that are still being written left out."""
        paths = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        named = ((re.fullmatch(r"step_(\d{6,})", path.name), path) for path in paths)
        return dict(sorted((int(match[1]), path) for match, path in named if match))

    def why_unfinished(self) -> str:
        """How the run stands; empty for one that is done or was never begun."""
        if not self.unfinished.exists():
            return ""
        return self.unfinished.read_text(encoding="utf-8").strip() or "ended while this was written"

    def set_aside(self) -> list[Path]:
        """Moves what an earlier run had saved to `checkpoints.N` and `hf.N`; returns where, if anywhere."""
        folders, number = (self.checkpoints, self.exports), 1
        while any(folder.with_name(f"{folder.name}.{number}").exists() for folder in folders):
            number += 1
        return [folder.rename(folder.with_name(f"{folder.name}.{number}")) for folder in folders if folder.exists()]

    def remove_leftovers(self) -> None:
        """Removes what interrupted saves and exports left behind."""
        for folder in (self.checkpoints, self.exports):
            for path in folder.glob(f"step_*{BEING_WRITTEN}"):
                shutil.rmtree(path, ignore_errors=True)

    def remove_checkpoints(self, keep: int) -> None:
        """Removes the checkpoints of the lowest steps beyond `keep`, and their exports; 0 keeps all."""
        steps = list(self.checkpoint_steps().items())
        for step, path in steps[: -keep if keep else 0]:
            shutil.rmtree(path)
            shutil.rmtree(self.export(step), ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Writes a file in one move: a reader finds the old text or the new one, never a part of it."""
    beside = path.with_name(path.name + BEING_WRITTEN)
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
