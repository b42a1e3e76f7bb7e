"""All that RUN holds, and the name of every file in it: the loop, the report, the tools and the sweep ask here."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
from pathlib import Path
from typing import Any

FAILED = "failed: "  # what `unfinished` begins with after a loss or a gradient that was not finite
BEING_WRITTEN = ".tmp"  # the end of a name that does not count yet
MANIFEST = "lathe.json"  # the last file of a checkpoint that is written
# Files by which a directory is known as a model's, prepared data or a checkpoint: RUN never holds them itself.
_OF_OTHERS = ("config.json", "tokens.idx", "meta.json", MANIFEST)
_STEP = re.compile(r"step_(\d{6,})")


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
        self.status = self.path / "status.json"  # the same for scripts, see `engine.run_status`
        self.errors = self.path / "errors"  # rank_N.txt, what each rank that failed had to say
        self.lock = self.path / "lock.json"  # there while a job works here, see `engine.run_lock`
        self.skipped = self.path / "skipped.jsonl"  # steps that --on-bad-step skip left out, with their documents
        self.heartbeats = self.path / "heartbeats"  # while a run runs: where each rank stands
        self.stacks = self.path / "stacks"  # rank_N.txt, what ranks were doing when the watchdog ended them
        self.collectives = self.path / "collectives_rank_"  # and the rank: NCCL's last ones, where one timed out
        self.model_files = self.path / "model_files"  # config, tokenizer and templates, as checkpoints hold them
        self.checkpoints = self.path / "checkpoints"  # step_NNNNNN/, see `engine.checkpointing.directory`
        self.latest = self.checkpoints / "latest"  # the name of the newest
        self.exports = self.path / "hf"  # step_NNNNNN/, by --checkpoint.export-hf
        self.evaluation = self.path / "evaluation"  # summary.json and MODEL/NAME/, by `lathe evaluate --watch`
        self.jobs = self.path / "jobs.json"  # the jobs that were queued for it
        self.slurm = self.path / "slurm"  # their scripts and logs
        self.logs = self.path / "logs"  # JOB.RESTART/, what each rank printed; see `examples/slurm/train_job.sh`

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step stands."""
        return self.checkpoints / f"step_{step:06d}"

    def export(self, step: int) -> Path:
        """Where the checkpoint of a step is exported to."""
        return self.exports / self.checkpoint(step).name

    def checkpoint_steps(self) -> dict[int, Path]:
        """The checkpoints by step, in order, those that are still being written left out."""
        paths = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        numbered = ((_step_of(path), path) for path in paths)
        return dict(sorted((step, path) for step, path in numbered if step is not None))

    def why_unfinished(self) -> str:
        """How the run stands; empty for one that is done or was never begun."""
        if not self.unfinished.exists():
            return ""
        return self.unfinished.read_text(encoding="utf-8").strip() or "ended while this was written"

    def is_foreign(self) -> bool:
        """Whether the directory is a model, prepared data or a checkpoint, into which no run writes anything."""
        return any((self.path / name).exists() for name in _OF_OTHERS) or any(self.path.glob("*.safetensors"))

    def set_aside(self) -> Path | None:
        """Moves all that an earlier run left to `earlier.N`; returns where, None if there was nothing.

        What is no run's stays: averages and exports made by hand, the log of a job.
        """
        kinds = [self.config, self.metrics, self.tensorboard, self.report, self.wandb_id, self.unfinished]
        kinds += [
            self.skipped,
            self.evaluation,
            self.stacks,
            self.model_files,
            self.errors,
            self.path / "wandb",
            *sorted(self.path.glob("beyond.*")),
            *sorted(self.path.glob(f"{self.collectives.name}*")),
        ]
        alone = [path for path in kinds if os.path.lexists(path)]
        stores = [folder for folder in (self.checkpoints, self.exports) if _entries(folder)]
        if not alone and not stores:
            return None
        aside = next_folder(self.path, "earlier")
        for folder in stores:  # checkpoints first: without `latest` nobody takes the rest for a run to go on with
            _move(sorted(_entries(folder), key=lambda path: path != self.latest), folder, aside)
        for path in alone:
            path.rename(aside / path.name)
        if self.status.exists():  # that of the run that begins replaces it in one move
            shutil.copyfile(self.status, aside / self.status.name)
        return aside

    def beyond(self, step: int) -> list[Path]:
        """The checkpoints, exports and scores of later steps."""
        exports = ((_step_of(path), path) for path in [*_entries(self.exports), *_entries(self.evaluation)])
        found = [path for number, path in self.checkpoint_steps().items() if number > step]
        return found + sorted(path for number, path in exports if number is not None and number > step)

    def set_beyond_aside(self, step: int, lines: list[str]) -> Path:
        """Moves what later steps left to `beyond.N`, with these lines of metrics; returns where.

        `latest` must name the step already, so that a run that is killed in here goes on from it.
        """
        aside, paths = next_folder(self.path, "beyond"), self.beyond(step)
        (aside / self.metrics.name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        for folder in (self.checkpoints, self.exports, self.evaluation):
            if own := [path for path in paths if path.parent == folder]:
                _move(own, folder, aside)
        return aside

    def remove_leftovers(self) -> None:
        """Removes what interrupted saves, exports and removals left behind."""
        for folder in (self.checkpoints, self.exports):
            for path in folder.glob(f"step_*{BEING_WRITTEN}"):
                shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(self.model_files.with_name(self.model_files.name + BEING_WRITTEN), ignore_errors=True)
        for path in (self.metrics, self.skipped, self.report, self.status, self.lock, self.latest):
            for beside in path.parent.glob(f"{path.name}*{BEING_WRITTEN}"):
                beside.unlink(missing_ok=True)

    def complete_checkpoint(self, partial: Path, step: int) -> Path:
        """Gives a checkpoint that was written beside its place its name, and moves `latest` to it; returns its place.

        `latest.tmp` is written first: where it names a checkpoint that is there, the process was killed between the two
        moves, and `promised` says so.
        """
        target = self.checkpoint(step)
        promise = self.latest.with_name(self.latest.name + BEING_WRITTEN)
        write_durably(promise, target.name + "\n")
        shutil.rmtree(target, ignore_errors=True)  # the same step of a run that did not resume
        os.rename(partial, target)
        sync(self.checkpoints)  # so that `latest` never names what a power failure has taken back
        os.replace(promise, self.latest)
        sync(self.checkpoints)
        return target

    def promised(self) -> Path | None:
        """The checkpoint that `latest` was about to be moved to when the process was killed; None if there is none."""
        promise = self.latest.with_name(self.latest.name + BEING_WRITTEN)
        name = promise.read_text(encoding="utf-8").strip() if promise.exists() else ""
        if not _STEP.fullmatch(name) or not (self.checkpoints / name).is_dir():
            return None
        by_hand = self.latest.exists() and self.latest.stat().st_mtime > promise.stat().st_mtime
        return None if by_hand else self.checkpoints / name

    def pointed(self) -> Path | None:
        """The checkpoint that `latest` names; None where it is not there, ValueError where it names something else."""
        if not self.latest.exists():
            return None
        name = self.latest.read_text(encoding="utf-8").strip()
        if not _STEP.fullmatch(name):
            raise ValueError(f"{self.latest} is damaged: it names {name[:80]!r}, and no checkpoint; remove it")
        return self.checkpoints / name

    def point_latest(self, step: int) -> None:
        """Moves `latest` to a checkpoint in one step."""
        write_durably(self.latest.with_name(self.latest.name + BEING_WRITTEN), self.checkpoint(step).name + "\n")
        os.replace(self.latest.with_name(self.latest.name + BEING_WRITTEN), self.latest)
        sync(self.checkpoints)

    def remove_checkpoint(self, step: int) -> Path:
        """Removes a checkpoint and its export: renamed first, so that none of them is ever there in part."""
        for path in (self.export(step), self.checkpoint(step)):
            leaving = path.with_name(f"{path.name}.old{BEING_WRITTEN}")
            if path.exists():
                os.rename(path, leaving)
            shutil.rmtree(leaving, ignore_errors=True)
        return self.checkpoint(step)


def next_folder(path: Path, name: str) -> Path:
    """Makes the folder NAME.N in a directory, of the lowest number that no such folder has."""
    number = 1
    while (path / f"{name}.{number}").exists():
        number += 1
    folder = path / f"{name}.{number}"
    folder.mkdir()
    return folder


def replace_text(path: Path, text: str) -> None:
    """Writes a file in one move: a reader finds the old text or the new one, never a part of it.

    Several processes may write it at once: each has a name of its own for what it writes.
    """
    beside = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}{BEING_WRITTEN}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where the file is not there, cannot be read or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_durably(path: Path, text: str) -> None:
    """Writes a file that survives a power failure."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def sync(path: Path) -> None:
    """Makes a file, or the names in a directory, survive a power failure, where its file system knows how."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _step_of(path: Path) -> int | None:
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else None


def _entries(folder: Path) -> list[Path]:
    """What a folder of steps holds, without earlier runs that were set aside within it."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in found if not re.fullmatch(r"earlier\.\d+", path.name)]


def _move(paths: list[Path], folder: Path, aside: Path) -> None:
    """Moves what lies in `folder` to a folder of its name in `aside`, without leaving its file system.

    Where the folder is a link to another place, it goes into a folder there, to which a link in `aside` leads.
    """
    target = aside / folder.name
    if folder.is_symlink() or os.path.ismount(folder):
        (folder / aside.name).mkdir(exist_ok=True)
        target.symlink_to(Path("..") / folder.name / aside.name)
    else:
        target.mkdir(exist_ok=True)
    for path in paths:
        os.rename(path, target / path.name)
