"""Which checkpoint a run continues from, so that none begins anew, or from another one, unasked."""

import os
from pathlib import Path

from engine.checkpointing.directory import ResumePoint, find_latest, read_manifest
from engine.run_folder import RunFolder


def find_resume_point(run: Path, step: int | None = None) -> ResumePoint | None:
    """Finds the checkpoint that a run continues from: that of `step`, or the newest; None for a run without any.

    ValueError where it is not there, not whole, or nothing to continue from, and where `latest` is lost: a run that has
    checkpoints never begins anew unasked.
    """
    folder = RunFolder(run)
    there = folder.checkpoint_steps()
    if step is not None:
        return _continuable(_point_of(folder, step, there))
    if promised := folder.promised():
        return _continuable(ResumePoint(promised, read_manifest(promised)))
    if (found := find_latest(run)) is not None:
        return _continuable(found)
    if folder.checkpoints.is_symlink() and not folder.checkpoints.exists():
        raise ValueError(f"{folder.checkpoints} is a link to {os.readlink(folder.checkpoints)}, which is not there")
    if there:
        whole = [number for number, path in there.items() if is_whole(path)]
        offer = f"continue from the newest whole one with --checkpoint.resume-from {whole[-1]}, or " if whole else ""
        raise ValueError(
            f"{folder.latest} is missing, and {folder.checkpoints} holds checkpoints of {_steps(there)}: {offer}"
            "start anew with --checkpoint.no-resume"
        )
    return None


def is_whole(directory: Path) -> bool:
    """Whether a directory is a complete checkpoint, as far as its manifest and the sizes of its files say."""
    try:
        read_manifest(directory)
    except ValueError:
        return False
    return True


def _point_of(run: RunFolder, step: int, there: dict[int, Path]) -> ResumePoint:
    """What --checkpoint.resume-from names."""
    if step in there:
        return ResumePoint(there[step], read_manifest(there[step]))
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
