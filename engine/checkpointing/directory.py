"""What a checkpoint directory holds, and how a directory comes to be complete or absent.

step_000300/
    lathe.json   format, step, family, dtypes, vocabulary, and the size of every other file
    state/       megatron's torch_dist format: model tensors by key, the optimizer's under `optimizer.`
    hf/          config, generation config, tokenizer and templates of the model, byte for byte
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.run_folder import RunFolder, replace_text

FORMAT = 1
MANIFEST = "lathe.json"
STATE = "state"
HF = "hf"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def complete_or_absent(target: str | Path) -> Iterator[Path]:
    """Yield a directory beside `target` to write into; rename it when all went well, else remove it.

    Refuses (ValueError) a target that exists and is not empty. A full disk becomes an OSError that says so.
    """
    target = Path(os.path.abspath(target))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already and is not an empty directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f"{target.name}.tmp-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        sync_tree(partial)
        os.rename(partial, target)
        sync_directory(target.parent)
    except OSError as error:
        if error.errno in NO_SPACE:
            message = f"no space left while writing {target} (the partial output was removed)"
            raise OSError(error.errno, message) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_manifest(directory: str | Path, meta: dict[str, Any]) -> None:
    """Write lathe.json, the last file of a checkpoint: `meta`, and the size in bytes of every other file."""
    directory = Path(directory)
    meta = {"format": FORMAT, **meta, "files": _sizes(directory)}
    partial = directory / (MANIFEST + ".tmp")
    partial.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    _sync_file(partial)
    os.rename(partial, directory / MANIFEST)
    sync_directory(directory)


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The contents of lathe.json; ValueError where the checkpoint is not there or not whole."""
    path = Path(directory) / MANIFEST
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        files = meta["files"]
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{directory} is not a complete checkpoint: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged") from None
    if meta.get("format") != FORMAT:
        raise ValueError(f"{path} has format {meta.get('format')}, this version reads format {FORMAT}")
    found = _sizes(Path(directory))
    for name, size in files.items():
        if name not in found:
            raise ValueError(f"{directory} is not a complete checkpoint: {name} is missing")
        if found[name] != size:
            raise ValueError(
                f"{directory} is not a complete checkpoint: {name} has {found[name]} bytes instead of {size}"
            )
    return meta


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to continue from, with its manifest."""

    directory: Path
    manifest: dict[str, Any]

    @property
    def run(self) -> Path:
        """The run that it belongs to."""
        return self.directory.parent.parent

    @property
    def step(self) -> int:
        """The last step whose update the checkpoint holds."""
        return self.manifest["step"]


def find_latest(run: Path) -> ResumePoint | None:
    """Finds the checkpoint that `latest` names; None for a run without one, ValueError for one that is not whole."""
    pointer = RunFolder(run).latest
    if not pointer.exists():
        return None
    directory = pointer.parent / pointer.read_text(encoding="utf-8").strip()
    try:
        return ResumePoint(directory, read_manifest(directory))
    except ValueError as error:
        raise ValueError(
            f"{error}; write the name of a whole checkpoint into {pointer}, or start with another --output "
            "or --checkpoint.no-resume"
        ) from None


def point_latest(run: RunFolder, target: Path) -> None:
    """Moves `latest` to a checkpoint in one step."""
    replace_text(run.latest, target.name + "\n")
    sync_directory(run.checkpoints)


def sync_tree(directory: Path) -> None:
    """Make all files of a directory survive a power failure."""
    for folder, _, files in os.walk(directory):
        for file in files:
            _sync_file(Path(folder) / file)
        sync_directory(Path(folder))


def sync_directory(directory: Path) -> None:
    """Make the names in a directory survive a power failure."""
    _sync_file(directory)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sizes(directory: Path) -> dict[str, int]:
    return {
        str(file.relative_to(directory)): file.stat().st_size
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name not in (MANIFEST, MANIFEST + ".tmp")
    }
