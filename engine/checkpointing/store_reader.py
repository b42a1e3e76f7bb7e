"""megatron-core's `torch_dist` checkpoints, read by boxes: no model, no process groups.

The format is torch.distributed.checkpoint's: `.metadata`, a pickle that says which piece of which tensor
lies where, and `.distcp` files in which every piece is an archive of `torch.save`. torch finds the pieces of a
box and their data; archives are not compressed, so a part of a piece is read where it lies.
"""

import io
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from data.checked_files import CheckedFile
from engine.checkpointing.archive import archive_of
from engine.checkpointing.store_metadata import open_archive, read_metadata, span_of
from models.conversion.byte_boxes import bytes_of

MASTER_PREFIXES = ("optimizer.state.fp32_param.", "optimizer.state.param.")

SPAN_BYTES = 16 * 2**20  # that are read at once for numbers that do not lie end to end
OPEN_FILES = 16  # a large checkpoint has a file a rank, and each keeps some blocks

Box = tuple[range, ...]  # one a dimension, without steps


class StoreReader:
    """The tensors of one `torch_dist` checkpoint. Raises ValueError for a directory that is none.

    What is read is held against the checksums beside the files (`data.checksums`): DamagedFile where it is not what
    was written.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._tensors, self._pieces = read_metadata(self.directory)
        # Pieces in the order of their first rows, and the rows of the tallest.
        self._sorted: dict[str, tuple[list[ChunkStorageMetadata], int]] = {}
        self._sizes = {(key, c.offsets): c.sizes for key, entry in self._tensors.items() for c in entry.chunks}
        self._data: dict[MetadataIndex, tuple[int, Tensor]] = {}  # see `_locate`
        self._files: dict[str, CheckedFile] = {}
        self._span = Scratch()

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def keys(self) -> list[str]:
        return sorted(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].properties.dtype

    def read(self, key: str, index: tuple[slice, ...] = (), scratch: "Scratch | None" = None) -> Tensor:
        """A global tensor or a box of it, reading no more than that; in `scratch`, or in memory of its own.

        `index` has one slice a leading dimension, without steps; dimensions left out are taken whole.
        """
        box = box_of(self.shape(key), index)
        result = (scratch or Scratch()).empty([len(side) for side in box], self.dtype(key))
        self._read_pieces(key, box, result)
        return result

    def read_into(self, key: str, offsets: Sequence[int], out: Tensor) -> None:
        """Fill a tensor, of any strides and on any device, with the box of its shape at `offsets` of a global tensor.

        Where `out` has another dtype, numbers are converted as `Tensor.copy_` does it. ValueError for a box that lies
        outside the tensor.
        """
        box = tuple(range(start, start + length) for start, length in zip(offsets, out.shape, strict=True))
        shape = self.shape(key)
        if len(box) != len(shape) or any(s.start < 0 or s.stop > size for s, size in zip(box, shape, strict=False)):
            raise ValueError(f"{self.directory}: {key} of {list(shape)} has no {list(out.shape)} at {list(offsets)}")
        self._read_pieces(key, box, out)

    def _read_pieces(self, key: str, box: Box, out: Tensor) -> None:
        filled = 0
        for item in self._items(key, box):
            block = _cut(out, item.dest_offsets, item.lengths)
            start, whole = self._locate(item.storage_index)
            file = self._file(self._pieces[item.storage_index].file)
            self._fill(file, start, _part(whole, item), block)
            filled += block.numel()
        if filled != out.numel():
            raise ValueError(f"{self.directory}: pieces of {key} cover {filled} of {out.numel()} elements")

    def _items(self, key: str, box: Box) -> list[ReadItem]:
        """The pieces that hold some of a box, where it lies in them, and where in the box."""
        if key not in self._sorted:
            found = sorted(self._tensors[key].chunks, key=_first_row)
            self._check_disjoint(key, found)
            self._sorted[key] = found, max((piece.sizes[0] for piece in found if piece.sizes), default=1)
        pieces, tallest = self._sorted[key]
        if box:  # large tensors have thousands of pieces: those that may reach into it by their first dimension
            first = bisect_right(pieces, box[0].start - tallest, key=_first_row)
            pieces = pieces[first : bisect_left(pieces, box[0].stop, key=_first_row)]
        offsets, sizes = torch.Size([side.start for side in box]), torch.Size(map(len, box))
        wanted = [ChunkStorageMetadata(offsets=offsets, sizes=sizes)]
        return create_read_items_for_chunk_list(key, replace(self._tensors[key], chunks=pieces), wanted)

    def _check_disjoint(self, key: str, pieces: list[ChunkStorageMetadata]) -> None:
        """Pieces that overlap would leave a hole elsewhere: all of them together have the tensor's size."""
        if len(pieces) < 2 or not self.shape(key):
            return
        starts = np.array([piece.offsets for piece in pieces])  # [pieces, dimensions]
        stops = starts + np.array([piece.sizes for piece in pieces])
        reach = np.maximum.accumulate(stops[:, 0])
        for number in (1 + np.flatnonzero(starts[1:, 0] < reach[:-1])).tolist():
            before = slice(int(np.searchsorted(reach, starts[number, 0], "right")), number)
            common = np.minimum(stops[before], stops[number]) > np.maximum(starts[before], starts[number])
            if common.all(axis=1).any():
                raise ValueError(f"{self.directory}: two pieces of {key} hold the same elements")

    def _file(self, name: str) -> CheckedFile:
        """A file, kept open; the one that was asked for first is closed where there are many."""
        if name not in self._files:
            if len(self._files) >= OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            self._files[name] = CheckedFile(self.directory / name)
        return self._files[name]

    def _locate(self, index: MetadataIndex) -> tuple[int, Tensor]:
        """The first byte of a piece's first element, and a tensor on the meta device that tells its layout."""
        if index not in self._data:
            piece, file = self._pieces[index], self._file(self._pieces[index].file)
            sizes = self._sizes[index.fqn, index.offset or torch.Size()]
            archive = archive_of(tuple(sizes), self.dtype(index.fqn))
            place = f"{file.path}: the piece at byte {piece.start:,}"
            # An archive that begins as ours is one of ours; others are looked through, which reads of both their ends.
            if piece.length == archive.length and file.read(piece.start, archive.data) == archive.before:
                start, blank = archive.data, torch.empty(sizes, dtype=self.dtype(index.fqn), device="meta")
            else:
                start, blank = open_archive(io.BufferedReader(_Window(file, piece.start, piece.length)), place)
            if blank.shape != sizes:
                raise ValueError(f"{place} has shape {list(blank.shape)}, not {list(sizes)}")
            # A view of its own, which begins at the element that `start` is the place of.
            layout = torch.empty(0, dtype=blank.dtype, device="meta").as_strided(blank.shape, blank.stride())
            self._data[index] = piece.start + start, layout
        return self._data[index]

    def _fill(self, file: CheckedFile, start: int, part: Tensor, block: Tensor) -> None:
        """Read a part of a piece into `block`; `part` is on the meta device, and its offset counts from byte `start`.

        Numbers that do not lie end to end on both sides are read with all that lies between them, some rows at once.
        """
        if not part.numel():
            return
        first = start + int(part.storage_offset()) * part.element_size()
        if block.is_cpu and part.is_contiguous() and block.is_contiguous() and part.dtype == block.dtype:
            file.read_into(first, bytes_of(block))
            return
        length = span_of(part) - int(part.storage_offset()) * part.element_size()
        if length <= SPAN_BYTES:
            span = self._span.empty([length // part.element_size()], part.dtype)
            file.read_into(first, bytes_of(span))
            block.copy_(span.as_strided(part.shape, part.stride()))
            return
        dim = next(number for number, size in enumerate(part.shape) if size > 1)
        step = max(1, part.shape[dim] * SPAN_BYTES // length)
        for row in range(0, part.shape[dim], step):
            count = min(step, part.shape[dim] - row)
            self._fill(file, start, part.narrow(dim, row, count), block.narrow(dim, row, count))


class _Window(io.RawIOBase):
    """One archive within a checked file, as a file of its own."""

    def __init__(self, file: CheckedFile, start: int, length: int):
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence])
        return self._at

    def readinto(self, buffer) -> int:
        count = max(0, min(len(buffer), self._length - self._at))
        self._file.read_into(self._start + self._at, memoryview(buffer).cast("B")[:count])
        self._at += count
        return count


class Scratch:
    """Memory for one tensor at a time: `empty` gives again what it gave before.

    Blocks that are freed and allocated anew either go back to the kernel each time, and pages that come from
    there cost more than the copying, or they leave holes between which a process grows.
    """

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        if size > len(self._bytes):
            self._bytes = torch.empty(size, dtype=torch.uint8)
        return self._bytes[:size].view(dtype).view(tuple(shape))


def box_of(shape: Sequence[int], index: tuple[slice, ...]) -> Box:
    """The box that slices of the leading dimensions cut out of a tensor; ValueError where one has a step."""
    if any(part.step not in (None, 1) for part in index):
        raise ValueError(f"{index}: a box has no steps")
    sides = (*index, *[slice(None)] * (len(shape) - len(index)))
    return tuple(range(*side.indices(size)) for side, size in zip(sides, shape, strict=True))


def row_blocks(shape: Sequence[int], dtype: torch.dtype, block_bytes: int) -> Iterator[slice]:
    """Cut a tensor's rows into slices of at most `block_bytes`, and of one row at least."""
    rows = shape[0] if shape else 1
    row_bytes = max(1, math.prod(shape[1:]) * dtype.itemsize)
    step = max(1, block_bytes // row_bytes)
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def master_key(reader: StoreReader, key: str) -> str | None:
    """The key of the fp32 master weight of a model tensor, where the optimizer's state holds one."""
    for prefix in MASTER_PREFIXES:
        if prefix + key in reader and reader.shape(prefix + key) == reader.shape(key):
            return prefix + key
    return None


def _cut(tensor: Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
    return tensor[tuple(slice(start, start + length) for start, length in zip(offsets, lengths, strict=True))]


def _part(whole: Tensor, item: ReadItem) -> Tensor:
    return _cut(whole, item.storage_offsets, item.lengths)


def _first_row(piece: ChunkStorageMetadata) -> int:
    return piece.offsets[0] if piece.offsets else 0
