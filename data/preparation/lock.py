"""One preparation at a time into an output: a lock that the kernel drops when its process is gone."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from data.preparation.output import LOCK


@contextmanager
def only_one(parts: Path, output: Path) -> Iterator[None]:
    """Holds the lock of an output in its directory of parts, which is made where it is missing.

    Raises ValueError, naming the holder, where another process has it. A lock of a record, unlike `flock`, is not
    inherited by the workers that are forked, so that a killed process leaves none behind.
    """
    path = parts / LOCK
    descriptor = _open(path, output)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_this_process()).encode(), 0)
        yield
    finally:
        with suppress(OSError):  # the directory is gone when all its parts are joined
            path.unlink()
        os.close(descriptor)
        with suppress(OSError):  # it stays where it holds anything else
            parts.rmdir()


def _open(path: Path, output: Path) -> int:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # whoever had the lock has just removed the directory
            continue
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.pread(descriptor, 1 << 12, 0)
            os.close(descriptor)
            raise ValueError(f"--output {output} is being prepared by {_describe(holder)}: wait for it") from None
        except OSError:  # this file system has no locks
            return descriptor
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        os.close(descriptor)  # it was removed by its holder between opening and locking


def _this_process() -> dict[str, str | int]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": datetime.now().isoformat(timespec="seconds")}


def _describe(content: bytes) -> str:
    try:
        holder = json.loads(content)
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process, which has just started"
