"""The process that writes a rank's file of a checkpoint while the rank trains: standard library and checksums alone.

It maps the memory in which the file's bytes lie (`engine.checkpointing.image`), so it starts in no time and holds
nothing of its own. It ends with the process that started it, however that ends; until then it is deaf to signals that
end jobs, which reach every process of a job while the rank still wants its file.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

from data.checksums import BlockSums

BLOCK = 16 * 2**20  # bytes written at once
PR_SET_PDEATHSIG = 1  # prctl(2)
ROOT = Path(__file__).parents[2]


class ImageWriter:
    """A process that writes the first `size` bytes of a descriptor's memory to `path`."""

    def __init__(self, descriptor: int, size: int, path: Path):
        self.path = path
        command = [sys.executable, "-m", __name__, str(os.getpid()), str(descriptor), str(size), str(path)]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            command,
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # torchrun and terminals signal whole groups of processes
            # Without the working directory on the path, where a user may have a folder of the same name as ours.
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"},
        )
        self._failure: str | None = None

    def running(self) -> bool:
        return self._process.poll() is None

    def failure(self) -> str:
        """Waits for the end; returns what went wrong, or nothing."""
        if self._failure is None:
            _, said = self._process.communicate()
            lines = said.decode(errors="replace").strip().splitlines()
            status = self._process.returncode
            self._failure = (lines[-1:] or [f"its writing process ended with status {status}"])[0] if status else ""
        return self._failure

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


def write(descriptor: int, size: int, path: Path) -> None:
    """Writes the file, durably, and its checksums beside it."""
    sums = BlockSums()
    target = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
    try:
        if size:
            with mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) as memory, memoryview(memory) as view:
                for start in range(0, size, BLOCK):
                    with view[start : start + BLOCK] as block:
                        _write_all(target, block)
                        sums.update(block)
        os.fsync(target)
    finally:
        os.close(target)
    sums.write(path)


def _write_all(target: int, block: memoryview) -> None:
    done = 0
    while done < len(block):
        done += os.write(target, block[done:])


def main(parent: int, descriptor: int, size: int, path: Path) -> int:
    """The life of the process; returns its exit status."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it had ended before the line above
        return 1
    try:
        write(descriptor, size, path)
    except OSError as error:
        print(f"{path.name}: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    own_parent, own_descriptor, own_size = map(int, sys.argv[1:4])
    sys.exit(main(own_parent, own_descriptor, own_size, Path(sys.argv[4])))
