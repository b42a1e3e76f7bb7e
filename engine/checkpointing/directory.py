"""What a checkpoint directory holds, and how a directory comes to be complete or absent.

step_000300/
    lathe.json   format, step, family, dtypes, vocabulary, and size and checksum of every other file
    state/       megatron's torch_dist format: model tensors by key, the optimizer's under `optimizer.`
    config.yaml  the settings of the run, where one wrote it
    hf/          config, generation config, tokenizer and templates of the model, byte for byte
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.checked_files import fault_of
from data.checksums import DamagedFile, file_sum, leads_out, own_sum, sums_of, write_sums
from engine.run_folder import MANIFEST, sync, write_durably

FORMAT = 1
STATE = "state"
HF = "hf"
DATA_FILES = "*.distcp"
FP8 = "fp8."  # keys of what FP8 carries from step to step, beside those of the model and of the optimizer
METADATA = ".metadata"  # of `state`: which piece of which tensor lies where
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
        sync(target.parent)
    except OSError as error:
        if error.errno in NO_SPACE:
            message = f"no space left while writing {target} (the partial output was removed)"
            raise OSError(error.errno, message) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_manifest(directory: str | Path, meta: dict[str, Any]) -> None:
    """Write lathe.json, the last file of a checkpoint: `meta`, and of every other file its size and checksum.

    Large files have their checksums beside them (`data.checksums`), which are made here where their writer made none.
    """
    directory = Path(directory)
    for path in sorted((directory / STATE).glob(DATA_FILES)):
        if not sums_of(path).exists():
            write_sums(path)
    sizes = _sizes(directory)
    checksums = {name: file_sum(directory / name) for name in sizes if not _is_data(name)}
    meta = {"format": FORMAT, **meta, "files": sizes, "checksums": checksums}
    meta["checksum"] = own_sum(meta)
    partial = directory / (MANIFEST + ".tmp")
    write_durably(partial, json.dumps(meta, indent=2) + "\n")
    os.rename(partial, directory / MANIFEST)
    sync(directory)


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The contents of lathe.json; ValueError where the checkpoint is not there, not whole, or damaged.

    All files but those of the large tensors are held against their checksums; those are as they are read.
    """
    directory = Path(directory)
    meta = parse_manifest(directory)
    if (missing := next(iter(size_faults(directory, meta).values()), None)) is not None:
        raise ValueError(f"{directory} is not a complete checkpoint: {missing}")
    if (damage := next(small_faults(directory, meta), None)) is not None:
        raise DamagedFile(damage)
    return meta


def parse_manifest(directory: Path) -> dict[str, Any]:
    """What lathe.json says, whatever became of the files that it lists; ValueError where it is not there or damaged."""
    path = directory / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        meta = json.loads(text)
        files, checksums = meta["files"], meta.get("checksums", {})
        names = [*files, *checksums]
        if not all(isinstance(size, int) for size in files.values()) or not isinstance(checksums, dict):
            raise ValueError
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{directory} is not a complete checkpoint: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} is damaged") from None
    if ("checksum" in meta or checksums) and (meta.get("checksum") != own_sum(meta) or not text.endswith("\n")):
        raise DamagedFile(f"{path} is damaged: it does not have the checksum that it states of itself")
    if meta.get("format") != FORMAT:
        raise ValueError(f"{path} has format {meta.get('format')}, this version reads format {FORMAT}")
    if strangers := list(filter(leads_out, names)):
        raise ValueError(f"{path} names a file outside its directory: {strangers[0]}")
    return meta


def size_faults(directory: Path, meta: dict[str, Any]) -> dict[str, str]:
    """What is missing from a checkpoint, or has another size than its manifest says: a sentence by the file's name."""
    found, wrong = _sizes(directory), {}
    for name, size in meta["files"].items():
        if name not in found:
            wrong[name] = f"{name} is missing"
        elif found[name] != size:
            wrong[name] = f"{name} has {found[name]} bytes instead of {size}"
    return wrong


def small_faults(directory: Path, meta: dict[str, Any]) -> Iterator[str]:
    """The files that do not have the checksum which the manifest states, but for those with checksums beside them."""
    for name, expected in meta.get("checksums", {}).items():
        path = directory / name
        if path.is_file() and (fault := fault_of(path, expected)):
            yield fault


def data_files(directory: Path, meta: dict[str, Any]) -> list[Path]:
    """The files of the large tensors of a checkpoint."""
    return [directory / name for name in meta["files"] if _is_data(name)]


def _is_data(name: str) -> bool:
    return Path(name).parent == Path(STATE) and Path(name).match(DATA_FILES)


def faults(directory: Path, advance: Callable[[int], None] = lambda count: None) -> Iterator[str]:
    """A sentence for each damaged file of a checkpoint, found by reading all of it."""
    try:
        meta = parse_manifest(directory)
    except ValueError as error:
        yield str(error)
        return
    wrong = size_faults(directory, meta)
    yield from (f"{directory / fault}" for fault in wrong.values())
    yield from small_faults(directory, meta)
    for path in data_files(directory, meta):
        if path.relative_to(directory).as_posix() not in wrong:
            if fault := fault_of(path):
                yield fault
            advance(path.stat().st_size)


def has_checksums(directory: Path) -> bool:
    """Whether a checkpoint was written with checksums; those of older versions were not."""
    return "checksums" in parse_manifest(directory)


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


def sync_tree(directory: Path) -> None:
    """Make all files of a directory survive a power failure."""
    for folder, _, files in os.walk(directory):
        for file in files:
            sync(Path(folder) / file)
        sync(Path(folder))


def _sizes(directory: Path) -> dict[str, int]:
    return {
        str(file.relative_to(directory)): file.stat().st_size
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name not in (MANIFEST, MANIFEST + ".tmp")
    }
