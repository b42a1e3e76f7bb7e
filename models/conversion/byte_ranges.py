"""Bytes that are laid out anew but not changed: which they are, and their copy within the kernel, as `cp` does.

Beside the plain way, through memory, conversions take 1/1.3 to 1/1.4 of the time (docs/performance.md).
"""

import errno
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.conversion.rules import Index, Rule

BLOCK_BYTES = 16 * 2**20
READ_BYTES = 2**20  # a processor's cache still has them when they are written
# The kernel or one of the file systems cannot do it, or the files lie on different ones.
UNABLE = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


@dataclass(frozen=True)
class ByteRange:
    """`length` bytes of a file from byte `offset` on; of zeros where there is no path."""

    path: Path | None
    offset: int
    length: int


def copy_byte_ranges(byte_ranges: Sequence[ByteRange], descriptor: int, at: int) -> int:
    """Copies byte ranges one after the other to byte `at` of an open file; returns the bytes copied.

    Raises ValueError for a file that ends too early.
    """
    end = at
    for byte_range in byte_ranges:
        if byte_range.path is None:
            _write(descriptor, memoryview(bytes(byte_range.length)), end)
        else:
            opened = os.open(byte_range.path, os.O_RDONLY)
            try:
                _copy(opened, descriptor, byte_range, end)
            finally:
                os.close(opened)
        end += byte_range.length
    return end - at


def iterate_byte_ranges(byte_ranges: Sequence[ByteRange]) -> Iterator[memoryview]:
    """The bytes of byte ranges in blocks, each of which is overwritten by the next; ValueError for a cut-off file."""
    buffer = memoryview(bytearray(READ_BYTES))
    for byte_range in byte_ranges:
        if byte_range.path is None:
            yield memoryview(bytes(byte_range.length))
            continue
        with open(byte_range.path, "rb", buffering=0) as file:
            file.seek(byte_range.offset)
            left = byte_range.length
            while left:
                count = file.readinto(buffer[: min(left, READ_BYTES)])
                if not count:
                    raise ValueError(f"{byte_range.path} is truncated")
                yield buffer[:count]
                left -= count


def _copy(opened: int, descriptor: int, byte_range: ByteRange, at: int) -> None:
    done = 0
    while done < byte_range.length:
        left = byte_range.length - done
        try:
            count = os.copy_file_range(opened, descriptor, left, byte_range.offset + done, at + done)
        except OSError as error:
            if error.errno not in UNABLE:
                raise
            data = os.pread(opened, min(left, BLOCK_BYTES), byte_range.offset + done)
            _write(descriptor, memoryview(data), at + done)
            count = len(data)
        if not count:
            raise ValueError(f"{byte_range.path} is truncated")
        done += count


def _write(descriptor: int, data: memoryview, at: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, at)
        data, at = data[count:], at + count


def plain_ranges(
    rule: Rule, index: Index, first_byte: Callable[[str], tuple[Path, int]], itemsize: int
) -> list[ByteRange] | None:
    """The bytes that one after the other make up a slice; None where it is more than a copy of whole rows.

    first_byte: the file of a Hugging Face tensor and the byte at which its data begins.
    """
    bounds, depth = rule.bounds(index), 2 if rule.stacked else 1
    uncut = all(bound == (0, size) for bound, size in zip(bounds[depth:], rule.shape[depth:], strict=True))
    if rule.transposed or not uncut or any(row_range.step != 1 for row_range in rule.row_ranges):
        return None
    (first, last), row_bytes = bounds[0], math.prod(rule.shape[depth:]) * itemsize
    if rule.stacked:
        top, bottom = bounds[1]
        if last - first != 1 and (top, bottom) != (0, rule.shape[1]):
            return None
        first, last = first * rule.shape[1] + top, (last - 1) * rule.shape[1] + bottom
    sizes = dict(rule.files)
    found: list[ByteRange] = []
    for row_range, skip, count in rule.walk(first, last - first):
        if row_range is None:
            found.append(ByteRange(None, 0, count * row_bytes))
            continue
        row = row_range.start + skip
        if row_range.expert is not None:
            row += row_range.expert * sizes[row_range.name][1]
        path, start = first_byte(row_range.name)
        found.append(ByteRange(path, start + row * row_bytes, count * row_bytes))
    return found
