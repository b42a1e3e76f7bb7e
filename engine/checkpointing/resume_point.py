"""Which checkpoint a run continues from, so that none begins anew, or from another one, unasked."""

import os
from pathlib import Path
from typing import Any

from data.checked_files import fault_of
from engine.checkpointing.directory import ResumePoint, data_files, read_manifest
from engine.run_folder import RunFolder


def find_resume_point(run: Path, step: int | None = None) -> ResumePoint | None:
    """Finds the checkpoint that a run continues from: that of `step`, or the newest; None for a run without any.

    ValueError where it is not there, not whole, or nothing to continue from, and where `latest` is lost: a run that has
    checkpoints never begins anew unasked.
    """
    folder = RunFolder(run)
    there = folder.checkpoint_steps()
    if step is not None:
        return _continuable(_opened(_named(folder, step, there)))
    if (found := folder.promised() or folder.pointed()) is not None:
        return _continuable(_opened(found))
    if folder.checkpoints.is_symlink() and not folder.checkpoints.exists():
        raise ValueError(f"{folder.checkpoints} is a link to {os.readlink(folder.checkpoints)}, which is not there")
    if there:
        whole = [number for number, path in there.items() if _manifest_to_continue(path)]
        offer = f"continue from the newest whole one with --checkpoint.resume-from {whole[-1]}, or " if whole else ""
        raise ValueError(
            f"{folder.latest} is missing, and {folder.checkpoints} holds checkpoints of {_steps(there)}: {offer}"
            "start anew with --checkpoint.no-resume"
        )
    return None


def newest_intact(directory: Path, *, at_most: int = 32 * 2**30) -> str:
    """Which other checkpoint beside a damaged one a run can go on from, as the end of a sentence about the damage.

    One of more than `at_most` bytes is held against its manifest alone, and the sentence says so: the ranks of a
    large run would each read all of it.
    """
    run = RunFolder(directory.absolute().parent.parent)
    for step, other in reversed(run.checkpoint_steps().items()):
        meta = _manifest_to_continue(other)
        if other.name == directory.name or meta is None:
            continue
        small = sum(meta["files"].values()) <= at_most
        if not small or all(fault_of(path) is None for path in data_files(other, meta)):
            intact = "intact" if small else "intact as far as its manifest says"
            return (
                f"; the newest other checkpoint of {run.path} that is {intact} is {other.name}: go on from it with "
                f"--checkpoint.resume-from {step}, or start anew with --checkpoint.no-resume"
            )
    return f"; {run.path} has no other checkpoint that is intact: start anew with --checkpoint.no-resume"


def _opened(directory: Path) -> ResumePoint:
    try:
        point = ResumePoint(directory, read_manifest(directory))
    except ValueError as error:
        raise ValueError(f"{error}{newest_intact(directory)}") from None
    if "data" in point.manifest and RunFolder(point.run).checkpoint(point.step).name != directory.name:
        raise ValueError(f"{directory} holds step {point.step:,}: give it the name of that step, or remove it")
    return point


def _manifest_to_continue(directory: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint with a place in the data, whole as far as it says; None of any other directory."""
    try:
        meta = read_manifest(directory)
    except ValueError:
        return None
    return meta if "data" in meta else None


def _named(run: RunFolder, step: int, there: dict[int, Path]) -> Path:
    """What --checkpoint.resume-from names."""
    if step in there:
        return there[step]
    aside = [path for kind in ("beyond", "earlier") for path in run.path.glob(f"{kind}.*/checkpoints/step_*")]
    aside = [path for path in aside if path.name == run.checkpoint(step).name]
    hint = f" (one was moved to {aside[0]}: move it back to go on from it)" if aside else ""
    raise ValueError(
        f"--checkpoint.resume-from {step}: {run.checkpoints} holds no checkpoint of that step{hint}; it has "
        f"{_steps(there) if there else 'none at all'}"
    )


def _continuable(point: ResumePoint) -> ResumePoint:
    """Refuses a checkpoint that an average or a conversion made."""
    if "data" not in point.manifest:
        raise ValueError(
            f"{point.directory} has no optimizer state and no place in the data, as an average or a conversion makes "
            f"it: start a new run from it with --model {point.directory} and another --output"
        )
    return point


def _steps(there: dict[int, Path]) -> str:
    return f"step{'s' if len(there) > 1 else ''} {', '.join(map(str, there))}"
