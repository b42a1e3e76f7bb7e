"""Runs two ranks into a full disk in every stage: on a small tmpfs with ever more room, from too little for the first
file to enough. Each run must end well or with one sentence, and go on exactly once there is room.

python -m benchmarks.full_disk [--trials 16]        (mounts a tmpfs, which takes root)
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tyro

from benchmarks.kills import differences, flags, run_to_the_end, start
from engine.run_folder import RunFolder
from engine.run_status import read_status

STEPS = 6
EXTRA = ("--checkpoint.export-hf", "--checkpoint.keep", "1")


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(folder: Path, left: int) -> Path:
    """Takes all room of a file system but `left` bytes."""
    filler = folder / "filler"
    with filler.open("wb") as file:
        file.write(b"\0" * max(0, shutil.disk_usage(folder).free - left))
    return filler


def main(trials: int = 16, asynchronous: bool = True) -> int:
    """Prints how each run ends; the status is 1 where one ends otherwise than promised, or goes on to another end."""
    from tests.support.tiny import make_inputs

    extra = (*EXTRA, "--checkpoint.async", "on" if asynchronous else "off")
    wrong = 0
    with tempfile.TemporaryDirectory() as place:
        folder = make_inputs(Path(place), "qwen2_tied", 30)
        whole = RunFolder(folder / "whole")
        run_to_the_end(flags(folder, whole.path, STEPS, *extra))
        needed = 2 * sum(path.stat().st_size + 4096 for path in whole.path.rglob("*") if path.is_file())
        for number in range(trials):
            left = needed * number // (trials - 1)
            with small_disk(folder / f"disk_{number}", 4 * needed) as disk:
                filler, cut = fill(disk, left), RunFolder(disk / "run")
                process = start(flags(folder, cut.path, STEPS, *extra))
                said = process.communicate(timeout=180)[0].decode(errors="replace")
                errors = [line for line in said.splitlines() if "error: " in line]
                status = read_status(cut)
                print(
                    f"{left:,} bytes left: status {process.returncode}, {status.get('state')} at step "
                    f"{status.get('step')}: {errors[0] if errors else ''}",
                    flush=True,
                )
                # One traceback is torchrun's own, of its child that failed.
                if process.returncode and (not errors or said.count("Traceback (most") > 1):
                    wrong += 1
                    print(f"wrong:\n{said[-2500:]}", flush=True)
                filler.unlink()
                last = start(flags(folder, cut.path, STEPS, *extra))
                said = last.communicate(timeout=180)[0].decode(errors="replace")
                found = differences(cut, whole, STEPS) if last.returncode == 0 else [said[-2500:]]
                wrong += bool(found)
                print("\n".join(found), end="\n" * bool(found), flush=True)
    print("every run went on to the same end" if not wrong else f"{wrong} ends are wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
