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
CHECKPOINT_BLOCK = 2**18  # a load reads longer runs, and the whole of the blocks at both their ends
DATA_BLOCK = 64 * 2**10  # a document is short, and the first read of a block costs the whole block
_MAGIC, _VERSION = b"LATHESUM", 1
_HEADER = struct.Struct("<8sIIQQ")
_BLOCKS = (2**12, 2**26)  # the smallest and the largest block that a file may ask for
_AT_ONCE = 2**20


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
