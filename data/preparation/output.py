"""What preparing may remove: its own directories, and nothing that anything else has put there."""

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

LOCK, UNPACKED = "lock", "unpacked"  # in the directory of parts: who writes there; compressed files, unpacked
# Paths that a data directory, one that is still written, and the directory of parts beside them hold.
_FILES = (
    r"(meta\.json|(tokens\.(bin|idx)|(spans(_offsets)?|sources|kinds)\.npy)(\.sums)?|dropped\.jsonl|data_report\.html)"
)
_TOKENIZER = (
    r"tokenizer(/(tokenizer.*|(special_tokens_map|added_tokens|vocab)\.json|vocab\..*|merges\.txt|.*\.(jinja|model)"
    r"|additional_chat_templates(/.*\.jinja)?))?"
)
_DATA = re.compile(rf"((valid(\.partial)?)(/|$))?({_FILES}|{_TOKENIZER})?")
_PARTS = re.compile(rf"plan\.(json|partial)|\d{{6,}}\.(npz|\d+\.partial)|{LOCK}|{UNPACKED}(/.*)?")
REPLACED = ".replaced"  # the end of a data directory's name from when another took its place until it is removed


def check_output(output: Path, inputs: Iterable[str | Path | None], *, overwrite: bool) -> None:
    """Refuses an output whose replacement would remove what preparing did not make; ValueError in one sentence.

    inputs: sources, model, tokenizer and the like; what is no path of this machine is left alone.
    """
    place = output.resolve()
    for given in inputs:
        if given is None:
            continue
        for path in (Path(given), Path(str(given).split(":")[0])):  # a data set may be path:config:split
            if os.path.exists(path) and path.resolve().is_relative_to(place):
                holds = "is" if path.resolve() == place else "holds"
                raise ValueError(
                    f"--output {output} {holds} {path}, which the data is made from: choose another --output"
                )
    if overwrite:
        _check_own(output, _DATA, f"--overwrite: {output}", with_meta=True)
    for ending, known in ((".parts", _PARTS), (".partial", _DATA), (REPLACED, _DATA)):
        beside = output.with_name(output.name + ending)
        _check_own(beside, known, f"--output {output}: {beside}, where unfinished work would stand,")


def make_room(output: Path, *, overwrite: bool) -> Path | None:
    """Sets aside what stands at `output` just before the new data directory does; returns where, to be removed."""
    if not os.path.lexists(output):
        return None
    if not overwrite:
        raise ValueError(f"--output {output} came to be while the data was prepared: run again with another --output")
    check_output(output, (), overwrite=True)
    aside = output.with_name(output.name + REPLACED)
    shutil.rmtree(aside, ignore_errors=True)
    return output.rename(aside)


def clear_parts(parts: Path, *keep: str) -> None:
    """Removes what the directory of parts holds, but for its lock and the names to keep."""
    for path in parts.iterdir():
        if path.name in (LOCK, *keep):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_own(folder: Path, known: re.Pattern[str], what: str, with_meta: bool = False) -> None:
    """Refuses a link, a file, and a directory in which anything has a path that is not known."""
    if not os.path.lexists(folder):
        return
    strange = [folder.name] if folder.is_symlink() or not folder.is_dir() else []
    for path in () if strange else sorted(folder.rglob("*")):
        if path.is_symlink() or not known.fullmatch(path.relative_to(folder).as_posix()):
            strange.append(path.name)
    if strange or (with_meta and any(folder.iterdir()) and not _has_meta(folder)):
        found = f" (it holds {', '.join(strange[:3])})" if strange and folder.is_dir() else ""
        raise ValueError(f"{what} was not made by prepare_data{found}: remove it yourself, or choose another --output")


def _has_meta(folder: Path) -> bool:
    try:
        return "fingerprint" in json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False
