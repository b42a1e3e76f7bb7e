"""Checksums of an exported Hugging Face directory: damage is named before such a model is trained again.

The weights have theirs beside them (`data.checksums`), where their readers look. All other files are small; their
checksums stand in `checksums.json`, which nobody but Lathe reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.checked_files import fault_of
from data.checksums import SUMS, DamagedFile, file_sum, leads_out, text_sum, write_sums

LIST = "checksums.json"
WEIGHTS = "*.safetensors"


def write_weight_sums(directory: Path, share: tuple[int, int]) -> None:
    """Writes the checksums of the weights beside them: of the files of one process, `share` = (rank, ranks)."""
    rank, ranks = share
    for path in sorted(directory.glob(WEIGHTS))[rank::ranks]:
        write_sums(path)


def write_small_sums(directory: Path) -> None:
    """Writes `checksums.json`, the last file of an export."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != LIST]
    small = [path for path in paths if not path.match(WEIGHTS) and not path.name.endswith(SUMS)]
    sums = {path.relative_to(directory).as_posix(): file_sum(path) for path in small}
    content = {"files": sums, "checksum": _own_sum(sums)}
    (directory / LIST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def small_faults(directory: Path) -> Iterator[str]:
    """The small files of an export that are not as they were written; nothing for other directories.

    A file that is missing is none of them: what a model needs is missed by those who read it.
    """
    path = directory / LIST
    if not path.exists():
        return
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        whole = content["checksum"] == _own_sum(content["files"]) and text.endswith("\n")
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        yield f"{path} is damaged: it does not have the checksum that it states of itself"
        return
    for name, expected in content["files"].items():
        file = directory / name
        if leads_out(name):
            yield f"{path} names a file outside its directory: {name}"
        elif file.is_file() and (fault := fault_of(file, expected)):
            yield fault


def check_small_files(directory: Path) -> None:
    """DamagedFile for the first small file of an export that is not as it was written."""
    fault = next(small_faults(directory), None)
    if fault is not None:
        raise DamagedFile(f"{fault}; if you changed it yourself, remove {directory / LIST}")


def _own_sum(sums: dict[str, Any]) -> str:
    return text_sum(json.dumps(sums, sort_keys=True))
