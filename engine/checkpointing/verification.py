"""All of a checkpoint held against its checksums, and which other checkpoint of a run is intact."""

from collections.abc import Callable, Iterator
from pathlib import Path

from data.checksums import verify
from engine.checkpointing.directory import data_files, parse_manifest, size_faults, small_faults
from engine.run_folder import RunFolder


def faults(directory: Path, advance: Callable[[int], None] = lambda count: None) -> Iterator[str]:
    """A sentence for each damaged file of a checkpoint, found by reading all of it."""
    try:
        meta = parse_manifest(directory)
    except ValueError as error:
        yield str(error)
        return
    wrong = list(size_faults(directory, meta))
    yield from (f"{directory / fault}" for fault in wrong)
    yield from small_faults(directory, meta)
    for path in data_files(directory, meta):
        if path.is_file() and not any(fault.startswith(str(path.relative_to(directory)) + " ") for fault in wrong):
            try:
                verify(path)
            except ValueError as error:
                yield str(error)
            advance(path.stat().st_size)


def has_checksums(directory: Path) -> bool:
    """Whether a checkpoint was written with checksums; those of older versions were not."""
    return "checksums" in parse_manifest(directory)


def newest_intact(directory: Path) -> str:
    """Which other checkpoint beside a damaged one is the newest intact one, as the end of a sentence about damage."""
    beside = RunFolder(directory.parent.parent)
    if directory.parent.name != beside.checkpoints.name:
        return ""
    for step, other in reversed(beside.checkpoint_steps().items()):
        if other != directory and next(faults(other), None) is None:
            return (
                f"; the newest other checkpoint of {beside.path} that is intact is {other.name}: go on from it with "
                f"--checkpoint.resume-from {step}"
            )
    return f"; {beside.path} has no other checkpoint that is intact"
