"""Files read together with the checksums beside them: what is damaged is found where it is read."""

import os
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from data.checksums import DamagedFile, Sums, file_sum, sums_of

_KEPT_BLOCKS = 2  # an archive begins in one block and ends in another
_PART = 2**22  # bytes that a thread reads at once, or little more


class CheckedFile:
    """Reads a file, and holds every byte that it gives against the checksums beside the file.

    Without such, as in files of older versions, bytes are given as they are and `sums` is None. Raises
    DamagedFile for a file that is damaged or ends too early.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.sums = Sums(self.path) if sums_of(self.path).exists() else None
        self._descriptor = os.open(self.path, os.O_RDONLY)
        self._closed = weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size
        self._kept: dict[int, memoryview] = {}  # blocks of which parts were wanted, the oldest first

    def read_into(self, start: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `start` on. Whole blocks are hashed where they are put."""
        if start < 0 or start + len(target) > self.size:
            raise DamagedFile(f"{self.path} is truncated: it has {self.size:,} bytes, not {start + len(target):,}")
        if self.sums is None:
            _in_parts(self._read, start, target)
            return
        block = self.sums.block
        while target:
            number, skip = divmod(start, block)
            to_the_end = start + len(target) == self.size
            count = 0 if skip else len(target) if to_the_end else len(target) // block * block
            if count:
                _in_parts(partial(self._read_blocks, self.sums), start, target[:count], block)
            else:
                count = min(self.sums.length(number) - skip, len(target))
                target[:count] = self._block(number)[skip : skip + count]
            start, target = start + count, target[count:]

    def read(self, start: int, length: int) -> bytearray:
        """The bytes from `start` on, in memory of their own."""
        if start < 0 or length < 0 or start + length > self.size:  # before memory is taken
            raise DamagedFile(f"{self.path} is truncated: it has {self.size:,} bytes, not {start + length:,}")
        data = bytearray(length)
        self.read_into(start, memoryview(data))
        return data

    def _read_blocks(self, sums: Sums, start: int, target: memoryview) -> None:
        """Read whole blocks, and hash each while the cache still has it."""
        for place in range(0, len(target), sums.block):
            part = target[place : place + sums.block]
            self._read(start + place, part)
            sums.check((start + place) // sums.block, part)

    def _block(self, number: int) -> memoryview:
        if number not in self._kept:
            assert self.sums is not None
            full = len(self._kept) >= _KEPT_BLOCKS
            buffer = self._kept.pop(next(iter(self._kept))).obj if full else bytearray(self.sums.block)
            found = memoryview(buffer)[: self.sums.length(number)]
            self._read(number * self.sums.block, found)
            self.sums.check(number, found)
            self._kept[number] = found
        return self._kept[number]

    def _read(self, start: int, target: memoryview) -> None:
        while target:  # the kernel reads at most 2 GiB at once
            count = os.preadv(self._descriptor, [target], start)
            if not count:
                raise DamagedFile(f"{self.path} is truncated: it ends before byte {start:,}")
            target, start = target[count:], start + count

    def close(self) -> None:
        """Give the descriptor back; another `close` does nothing."""
        self._closed()

    def __enter__(self) -> "CheckedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _in_parts(read: Callable[[int, memoryview], None], start: int, target: memoryview, block: int = 1) -> None:
    """Let two threads fill the parts, of whole blocks, of a long target; each hashes what it has read itself."""
    step = -(-_PART // block) * block
    if len(target) <= 2 * step:
        read(start, target)
        return
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda at: read(start + at, target[at : at + step]), range(0, len(target), step)))


class CheckedMap:
    """A mapped file of which each block is held against its checksum when some of it is first looked at."""

    def __init__(self, path: Path, mapped: memoryview):
        self.sums = Sums(path) if sums_of(path).exists() else None
        self._mapped = mapped
        self._left = len(self.sums) if self.sums else 0  # blocks that were not looked at
        self._seen = np.zeros(self._left, dtype=bool)

    def check_runs(self, start: np.ndarray, stop: np.ndarray) -> None:
        """See to it that the bytes [start, stop) of several runs are those that were written.

        Raises DamagedFile where they are not.
        """
        if self.sums is None or self._left == 0:
            return
        starts, stops = start[stop > start], stop[stop > start]
        edges = np.zeros(len(self._seen) + 1, dtype=np.int64)
        np.add.at(edges, starts // self.sums.block, 1)
        np.add.at(edges, (stops - 1) // self.sums.block + 1, -1)
        self._look_at(np.flatnonzero((np.cumsum(edges[:-1]) > 0) & ~self._seen))

    def check_run(self, start: int, stop: int) -> None:
        """The same of one run, which costs next to nothing where all of it was seen."""
        if self.sums is None or self._left == 0 or stop <= start:
            return
        first = start // self.sums.block
        self._look_at(first + np.flatnonzero(~self._seen[first : (stop - 1) // self.sums.block + 1]))

    def _look_at(self, blocks: np.ndarray) -> None:
        assert self.sums is not None
        for number in blocks.tolist():
            first = number * self.sums.block
            self.sums.check(number, self._mapped[first : first + self.sums.length(number)])
            self._seen[number] = True
            self._left -= 1


def verify(path: Path) -> None:
    """Read a whole file and hold it against the checksums beside it; DamagedFile for its first damaged block."""
    with CheckedFile(path) as file:
        block = file.sums.block if file.sums else 1
        # So long that threads share it, of whole blocks.
        buffer = memoryview(bytearray(min(max(1, file.size), -(-4 * _PART // block) * block)))
        for start in range(0, file.size, len(buffer)):
            file.read_into(start, buffer[: min(len(buffer), file.size - start)])


def fault_of(path: Path, expected: str | None = None) -> str | None:
    """What is wrong with a file, found by reading all of it; None for one that is as it was written.

    expected: its `file_sum`, for a small file; without it the checksums beside the file tell.
    """
    if expected is None:
        try:
            verify(path)
        except ValueError as error:
            return str(error)
    elif file_sum(path) != expected:
        return f"{path} is damaged: its bytes 0 to {path.stat().st_size - 1:,} are not those that were written"
    return None
