"""What a checkpoint directory holds, and how a directory comes to be complete or absent.

step_000300/
    lathe.json   format, step, family, dtypes, vocabulary, and the size of every other file
    state/       megatron's torch_dist format: model tensors by key, the optimizer's under `optimizer.`
    hf/          config, generation config, tokenizer and templates of the model, byte for byte
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def step_directories(folder: Path) -> dict[int, Path]:
    """The checkpoints of a run's folder by step, those that are still being written left out."""
    paths = folder.iterdir() if folder.is_dir() else ()
    named = ((re.fullmatch(r"step_(\d{6,})", path.name), path) for path in paths)
    return {int(match[1]): path for match, path in named if match}


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
