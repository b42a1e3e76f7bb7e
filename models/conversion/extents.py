"""Runs of bytes copied from file to file within the kernel, as `cp` does: what is laid out anew but not changed."""

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BLOCK_BYTES = 16 * 2**20
# The kernel or one of the file systems cannot do it, or the files lie on different ones.
UNABLE = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


@dataclass(frozen=True)
class Extent:
    """`length` bytes of a file from byte `offset` on; of zeros where there is no path."""

    path: Path | None
    offset: int
    length: int


def copy_extents(extents: Sequence[Extent], descriptor: int, at: int) -> int:
    """Copies extents one after the other to byte `at` of an open file; returns the bytes copied.

    Raises ValueError for a source that ends too early.
    """
    end = at
    for extent in extents:
        if extent.path is None:
            _write(descriptor, memoryview(bytes(extent.length)), end)
        else:
            source = os.open(extent.path, os.O_RDONLY)
            try:
                _copy(source, descriptor, extent, end)
            finally:
                os.close(source)
        end += extent.length
    return end - at


def read_extents(extents: Sequence[Extent]) -> bytearray:
    """The bytes of extents, one after the other, in memory."""
    data = bytearray()
    for extent in extents:
        if extent.path is None:
            data += bytes(extent.length)
            continue
        with open(extent.path, "rb") as file:
            file.seek(extent.offset)
            data += file.read(extent.length)
    return data


def _copy(source: int, descriptor: int, extent: Extent, at: int) -> None:
    done = 0
    while done < extent.length:
        left = extent.length - done
        try:
            count = os.copy_file_range(source, descriptor, left, extent.offset + done, at + done)
        except OSError as error:
            if error.errno not in UNABLE:
                raise
            data = os.pread(source, min(left, BLOCK_BYTES), extent.offset + done)
            _write(descriptor, memoryview(data), at + done)
            count = len(data)
        if not count:
            raise ValueError(f"{extent.path} is truncated")
        done += count


def _write(descriptor: int, data: memoryview, at: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, at)
        data, at = data[count:], at + count
