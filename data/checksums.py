"""Checksums of large files, kept beside them: damage is found where bytes are read anyway, and named.

FILE.sums    8 bytes magic, u32 version, u32 block, u64 size of FILE, u64 count,
             u64 [count] xxh3_64 of each aligned block of FILE, u64 xxh3_64 of all that stands before

The hash is XXH3 of the library xxhash: it runs at the speed of memory, which no CRC of the standard library does.
"""

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64, xxh3_64_hexdigest, xxh3_64_intdigest

SUMS = ".sums"
CHECKPOINT_BLOCK = 2**20  # a load reads runs that are far longer
DATA_BLOCK = 64 * 2**10  # a document is short, and the first read of a block costs the whole block
_MAGIC, _VERSION = b"LATHESUM", 1
_HEADER = struct.Struct("<8sIIQQ")
_BLOCKS = (2**12, 2**26)  # the smallest and the largest block that a file may ask for
_AT_ONCE = 2**20
_KEPT_BLOCKS = 2  # an archive begins in one block and ends in another


class DamagedFile(ValueError):
    """Bytes that are not those that were written; the sentence names the file and where in it."""


class BlockSums:
    """Checksums of a file that is written from its start to its end."""

    def __init__(self, block: int = CHECKPOINT_BLOCK):
        self._block, self._size = block, 0
        self._sums: list[int] = []
        self._last = xxh3_64()  # of the block that has begun

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Take the bytes that were written next."""
        view = memoryview(data).cast("B")
        begun = self._size % self._block
        self._size += len(view)
        if begun:
            head, view = view[: self._block - begun], view[self._block - begun :]
            self._last.update(head)
            if begun + len(head) < self._block:
                return
            self._sums.append(self._last.intdigest())
            self._last.reset()
        whole = len(view) - len(view) % self._block
        self._sums += [xxh3_64_intdigest(view[start : start + self._block]) for start in range(0, whole, self._block)]
        self._last.update(view[whole:])

    def content(self) -> bytes:
        """What the sidecar of the file holds."""
        sums = self._sums + ([self._last.intdigest()] if self._size % self._block else [])
        content = _HEADER.pack(_MAGIC, _VERSION, self._block, self._size, len(sums)) + struct.pack(
            f"<{len(sums)}Q", *sums
        )
        return content + xxh3_64_intdigest(content).to_bytes(8, "little")

    def write(self, path: Path) -> None:
        """Write the sidecar of `path` so that it survives a power failure, or is not there."""
        target = sums_of(path)
        partial = target.with_name(target.name + ".tmp")
        with open(partial, "wb") as file:
            file.write(self.content())
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, target)


def sums_of(path: Path) -> Path:
    """The sidecar of a file."""
    return path.with_name(path.name + SUMS)


def write_sums(path: Path, block: int = CHECKPOINT_BLOCK) -> None:
    """Write the sidecar of a file that is there, by reading it."""
    sums, buffer = BlockSums(block), memoryview(bytearray(_AT_ONCE))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            sums.update(buffer[:count])
    sums.write(path)


def file_sum(path: Path) -> str:
    """xxh3_64 of a whole file, in hexadecimal: for files that are small."""
    total = xxh3_64()
    with open(path, "rb") as file:
        while data := file.read(_AT_ONCE):
            total.update(data)
    return total.hexdigest()


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


def own_sum(stated: dict[str, Any]) -> str:
    """The checksum of what a JSON file states, but for the field `checksum`, however it is laid out."""
    rest = {name: value for name, value in stated.items() if name != "checksum"}
    return text_sum(json.dumps(rest, sort_keys=True, separators=(",", ":")))


def leads_out(name: str) -> bool:
    """Whether a name that a file states leads out of that file's directory."""
    return Path(name).is_absolute() or ".." in Path(name).parts


def text_sum(text: str) -> str:
    """xxh3_64 of a text in UTF-8, in hexadecimal."""
    return xxh3_64_hexdigest(text.encode())


class Sums:
    """The checksums beside one file. Raises DamagedFile where they are damaged, or of a file of another length."""

    def __init__(self, path: Path):
        self.path = path
        beside = sums_of(path)
        stored, size = beside.stat().st_size, path.stat().st_size
        with open(beside, "rb") as file:
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size or stored % 8:
                raise DamagedFile(f"{beside} is cut off after {stored:,} bytes")
            magic, version, self.block, self.size, count = _HEADER.unpack(header)
            if (magic, version) != (_MAGIC, _VERSION):
                raise DamagedFile(f"{beside} is damaged: it does not begin as a file of checksums")
            plausible = _BLOCKS[0] <= self.block <= _BLOCKS[1] and count == -(-self.size // self.block)
            if not plausible or stored != _HEADER.size + 8 * count + 8:  # before any memory is taken for them
                raise DamagedFile(f"{beside} is damaged or cut off: {stored:,} bytes are not {count:,} checksums")
            rest = file.read()
        if len(rest) != 8 * count + 8 or xxh3_64_intdigest(header + rest[:-8]) != int.from_bytes(rest[-8:], "little"):
            raise DamagedFile(f"{beside} is damaged: it does not have the checksum that it states of itself")
        if size != self.size:
            raise DamagedFile(f"{path} has {size:,} bytes instead of {self.size:,}")
        self._sums = np.frombuffer(rest, "<u8", count)

    def check(self, number: int, data: memoryview) -> None:
        """Hold a whole block of the file against its checksum; DamagedFile where they differ."""
        if xxh3_64_intdigest(data) != self._sums[number]:
            start = number * self.block
            last = start + self.length(number) - 1
            raise DamagedFile(
                f"{self.path} is damaged: its bytes {start:,} to {last:,} are not those that were written"
            )

    def length(self, number: int) -> int:
        """Bytes of a block: the last one is shorter."""
        return min(self.block, self.size - number * self.block)

    def __len__(self) -> int:
        return len(self._sums)


class CheckedFile:
    """Reads a file, and holds every byte that it gives against the checksums beside the file.

    Without such, as in files of older versions, bytes are given as they are and `checked` is false. Raises
    DamagedFile for a file that is damaged or ends too early.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.sums = Sums(self.path) if sums_of(self.path).exists() else None
        self._descriptor = os.open(self.path, os.O_RDONLY)
        self.size = os.fstat(self._descriptor).st_size
        self._kept: dict[int, memoryview] = {}  # blocks of which parts were wanted, the oldest first

    @property
    def checked(self) -> bool:
        return self.sums is not None

    def read_into(self, start: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `start` on. Whole blocks are hashed where they are put."""
        if start < 0 or start + len(target) > self.size:
            raise DamagedFile(f"{self.path} is truncated: it has {self.size:,} bytes, not {start + len(target):,}")
        if self.sums is None:
            self._read(start, target)
            return
        block = self.sums.block
        while target:
            number, skip = divmod(start, block)
            length = self.sums.length(number)
            count = min(length - skip, len(target))
            if count == length:
                self._read(start, target[:count])  # one block at a time: it is hashed while the cache still has it
                self.sums.check(number, target[:count])
            else:
                target[:count] = self._block(number)[skip : skip + count]
            start, target = start + count, target[count:]

    def read(self, start: int, length: int) -> bytearray:
        """The bytes from `start` on, in memory of their own."""
        if start < 0 or length < 0 or start + length > self.size:  # before memory is taken
            raise DamagedFile(f"{self.path} is truncated: it has {self.size:,} bytes, not {start + length:,}")
        data = bytearray(length)
        self.read_into(start, memoryview(data))
        return data

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
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "CheckedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            self.close()


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
        buffer = memoryview(bytearray(file.sums.block if file.sums else _AT_ONCE))
        for start in range(0, file.size, len(buffer)):
            file.read_into(start, buffer[: min(len(buffer), file.size - start)])
