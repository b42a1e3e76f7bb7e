"""Everything in a checkpoint, a data directory or a Hugging Face directory read once and held against its checksums."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from checkpoint_tools.common import bar
from data.checked_files import fault_of
from data.checksums import SUMS, sums_of
from data.index_checks import META, index_faults
from engine.checkpointing.directory import DATA_FILES, MANIFEST, METADATA, STATE, faults, has_checksums
from engine.checkpointing.export_sums import LIST, small_faults

SHA256 = re.compile("[0-9a-f]{64}")  # the name of a large file's blob in a hub's cache


def verify_path(path: Path) -> int:
    """Print each damaged file and a last line that sums up; returns 1 where a file is damaged, else 0.

    ValueError for a path that is nothing of which this could be said.
    """
    if (path / MANIFEST).exists():
        total = sum(file.stat().st_size for file in path.rglob("*.distcp"))
        with bar("verifying", total)() as advance:
            found = list(faults(path, advance)) or _index_faults(path / STATE)
        checked = has_checksums(path) if not found else True
    elif (path / META).exists():
        found = list(index_faults(path))
        checked = any(path.glob(f"*{SUMS}"))
    elif (path / METADATA).exists():
        found, checked = _store_faults(path)
    elif any(path.glob("*.safetensors")) or (path / "config.json").exists():
        found, checked = model_faults(path)
    else:
        raise ValueError(
            f"{path} is no checkpoint, no prepared data and no Hugging Face directory"
            + ("" if path.exists() else ": it is not there")
        )
    for fault in found:
        print(fault)
    if found:
        print(f"{path}: {len(found)} damaged file(s)")
    else:
        print(f"{path} is intact" if checked else f"{path} has no checksums; only sizes and headers were checked")
    return 1 if found else 0


def _index_faults(path: Path) -> list[str]:
    """What is wrong with what a torch_dist directory says of its pieces, or with the lengths of its files."""
    from engine.checkpointing.store_reader import StoreReader

    try:
        StoreReader(path)
    except ValueError as error:
        return [str(error)]
    return []


def _store_faults(path: Path) -> tuple[list[str], bool]:
    """What is wrong with a bare torch_dist directory, and whether there were checksums."""
    if found := _index_faults(path):
        return found, False
    files = [file for file in sorted(path.glob(DATA_FILES)) if sums_of(file).exists()]
    return [fault for fault in map(fault_of, files) if fault], bool(files)


def model_faults(path: Path) -> tuple[list[str], bool]:
    """What is wrong with a Hugging Face directory, and whether there were checksums: our own, or a hub's names."""
    from models.conversion.hf_reader import HFReader

    found = []
    try:
        HFReader(path)  # headers, and that the tensors of every file are just as long as it is
    except ValueError as error:
        found.append(str(error))
    found += small_faults(path)
    checked = (path / LIST).exists()
    for file in sorted(one for one in path.rglob("*") if one.is_file() and not one.name.endswith(SUMS)):
        blob = file.resolve()
        if file.with_name(file.name + SUMS).exists():
            checked = True
            found += filter(None, [fault_of(file)])
        elif file.is_symlink() and SHA256.fullmatch(blob.name):
            checked = True
            if _sha256(blob) != blob.name:
                found.append(f"{file} is damaged: its SHA-256 is not the name of the blob in the hub's cache")
    return found, checked


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
