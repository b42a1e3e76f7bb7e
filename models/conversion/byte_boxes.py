"""Boxes of a tensor whose numbers lie in a file, read by bytes: a run of rows is one call."""

import itertools
import math
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

GAP_BYTES = 16 * 2**10  # between parts of a box: up to so many are read through, which costs less than a call
BLOCK_BYTES = 2**20  # read at a time where a box is no run of bytes


class ByteFile(Protocol):
    """A file that is open for reading by bytes; `PlainFile` is one."""

    def read_into(self, start: int, target: memoryview) -> None: ...
    def close(self) -> None: ...


class PlainFile:
    """Reads a file by bytes; ValueError where it ends too early."""

    def __init__(self, path: Path):
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        self._closed = weakref.finalize(self, os.close, self._descriptor)

    def read_into(self, start: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `start` on."""
        while target:  # the kernel reads at most 2 GiB at once
            count = os.preadv(self._descriptor, [target], start)
            if not count:
                raise ValueError(f"{self.path} is truncated or damaged: it ends before byte {start:,}")
            target, start = target[count:], start + count

    def close(self) -> None:
        """Give the descriptor back; another `close` does nothing."""
        self._closed()


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor; one of a single number is contiguous whatever its strides say."""
    return memoryview(tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy())


def read_box(file: ByteFile, first: int, shape: Sequence[int], sides: Sequence[range], out: Tensor) -> None:
    """Read a box of a tensor whose data begins at byte `first` of a file.

    `shape` is the tensor's, `sides` says which places of each dimension are read, and none is empty; `out` is
    contiguous memory of the box's shape and the tensor's dtype.
    """
    size = out.element_size()
    strides = [math.prod(shape[number + 1 :]) * size for number in range(len(shape))]  # in bytes
    # What lies behind this dimension is taken whole, so that a run of it is a run of bytes.
    inner = max((number for number, side in enumerate(sides) if side != range(shape[number])), default=0)
    if sides[inner].step != 1 and inner + 1 < len(shape):
        inner += 1
    run = sides[inner]
    run_bytes = (run[-1] - run[0] + 1) * strides[inner]
    rows, pitch = (sides[inner - 1], strides[inner - 1] * sides[inner - 1].step) if inner else (range(1), 0)
    flat = out.view(-1, len(rows), out.numel() // math.prod(map(len, sides[:inner])))
    for block, places in zip(flat, itertools.product(*sides[: max(0, inner - 1)]), strict=True):
        start = first + sum(place * stride for place, stride in zip(places, strides, strict=False))
        start += run[0] * strides[inner] + (rows[0] * strides[inner - 1] if inner else 0)
        if run.step == 1 and (len(rows) == 1 or pitch - run_bytes > GAP_BYTES):
            memory = bytes_of(block)
            for number in range(len(rows)):
                file.read_into(start + number * pitch, memory[number * run_bytes : (number + 1) * run_bytes])
            continue
        step = max(1, BLOCK_BYTES // max(pitch, run_bytes))
        for number in range(0, len(rows), step):
            some = block[number : number + step]
            covered = torch.empty((len(some) - 1) * pitch + run_bytes, dtype=torch.uint8)
            file.read_into(start + number * pitch, bytes_of(covered))
            some.copy_(covered.view(out.dtype).as_strided(some.shape, (pitch // size, run.step)))
