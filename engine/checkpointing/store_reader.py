"""megatron-core's `torch_dist` checkpoints, read by boxes: no model, no process groups.

The format is torch.distributed.checkpoint's: `.metadata`, a pickle that says which piece of which tensor
lies where, and `.distcp` files in which every piece is an archive of `torch.save`. torch finds the pieces of a
box and their data; archives are not compressed, so a part of a piece is read where it lies.
"""

import io
import math
import mmap
import os
import pickle
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from models.conversion.byte_ranges import ByteRange

MASTER_PREFIXES = ("optimizer.state.fp32_param.", "optimizer.state.param.")

Box = tuple[range, ...]  # one a dimension, without steps


class StoreReader:
    """The tensors of one `torch_dist` checkpoint. Raises ValueError for a directory that is none."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._files = FileSystemReader(self.directory)
        try:
            metadata = self._files.read_metadata()
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{directory} holds no readable torch_dist checkpoint: {error}") from None
        entries = metadata.state_dict_metadata.items()
        self._tensors = {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}
        self._storage = metadata.storage_data
        self._check_files()
        # Pieces in the order of their first rows, and the rows of the tallest.
        self._sorted: dict[str, tuple[list[ChunkStorageMetadata], int]] = {}
        self._sizes = {(key, c.offsets): c.sizes for key, entry in self._tensors.items() for c in entry.chunks}
        self._data: dict[MetadataIndex, tuple[int, Tensor]] = {}  # see `_locate`

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
        filled = 0
        for item in self._items(key, box):
            block = _cut(result, item.dest_offsets, item.lengths)
            self._fill(block, item)
            filled += block.numel()
        if filled != result.numel():
            raise ValueError(f"{self.directory}: pieces of {key} cover {filled} of {result.numel()} elements")
        return result

    def read_into(self, key: str, offsets: Sequence[int], out: Tensor) -> None:
        """Fills `out` with the box of its shape that begins at `offsets`, in whichever dtype."""
        index = tuple(slice(start, start + length) for start, length in zip(offsets, out.shape, strict=True))
        out.copy_(self.read(key, index))

    def byte_ranges(self, key: str, index: tuple[slice, ...] = ()) -> list[ByteRange] | None:
        """The bytes that one after the other make up a box; None where it is more than a copy of whole ranges."""
        box, found = box_of(self.shape(key), index), []
        blank = torch.empty([len(side) for side in box], dtype=self.dtype(key), device="meta")
        for item in self._items(key, box):
            block = _cut(blank, item.dest_offsets, item.lengths)
            start, whole = self._locate(item.storage_index)
            part = _cut(whole, item.storage_offsets, item.lengths)
            plain = whole.is_contiguous() and part.is_contiguous() and block.is_contiguous()
            if not plain or whole.dtype != blank.dtype:
                return None
            start += int(part.storage_offset() - whole.storage_offset()) * part.element_size()
            path = self.directory / self._storage[item.storage_index].relative_path
            found.append((int(block.storage_offset()) * part.element_size(), ByteRange(path, start, part.nbytes)))
        found.sort(key=lambda pair: pair[0])
        end = 0
        for offset, byte_range in found:
            if offset != end:
                return None
            end += byte_range.length
        return [byte_range for _, byte_range in found] if end == blank.nbytes else None

    def _items(self, key: str, box: Box) -> list[ReadItem]:
        """The pieces that hold some of a box, where it lies in them, and where in the box."""
        if key not in self._sorted:
            found = sorted(self._tensors[key].chunks, key=_first_row)
            self._sorted[key] = found, max((piece.sizes[0] for piece in found if piece.sizes), default=1)
        pieces, tallest = self._sorted[key]
        if box:  # large tensors have thousands of pieces: those that may reach into it by their first dimension
            first = bisect_right(pieces, box[0].start - tallest, key=_first_row)
            pieces = pieces[first : bisect_left(pieces, box[0].stop, key=_first_row)]
        offsets, sizes = torch.Size([side.start for side in box]), torch.Size(map(len, box))
        wanted = [ChunkStorageMetadata(offsets=offsets, sizes=sizes)]
        return create_read_items_for_chunk_list(key, replace(self._tensors[key], chunks=pieces), wanted)

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for index, info in self._storage.items():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
            if getattr(info, "transform_descriptors", None):
                raise ValueError(f"{self.directory}: {index.fqn} is compressed, which is not supported")
        for file, end in ends.items():
            path = self.directory / file
            if not path.exists() or path.stat().st_size < end:
                raise ValueError(f"{path} is {'truncated' if path.exists() else 'missing'}")

    def _fill(self, block: Tensor, item: ReadItem) -> None:
        """Read the part of a piece that an item names into `block`."""
        start, whole = self._locate(item.storage_index)
        part = _cut(whole, item.storage_offsets, item.lengths)
        info = self._storage[item.storage_index]
        with open(self.directory / info.relative_path, "rb", buffering=0) as file:
            if not whole.is_contiguous() or whole.dtype != block.dtype:
                found = torch.load(self._files._slice_file(file, info), weights_only=True, map_location="cpu")
                block.copy_(_cut(found, item.storage_offsets, item.lengths))
            elif part.is_contiguous() and block.is_contiguous():
                skip = int(part.storage_offset() - whole.storage_offset())
                _read_into(file, start + skip * whole.element_size(), block)
            else:
                _copy_mapped(file, start, whole, part, block)

    def _locate(self, index: MetadataIndex) -> tuple[int, Tensor]:
        """The first byte of a piece's first element, and a tensor on the meta device that tells its layout."""
        if index not in self._data:
            info = self._storage[index]
            path = self.directory / info.relative_path
            with open(path, "rb", buffering=0) as file:
                archive = self._files._slice_file(file, info)
                blank = torch.load(archive, weights_only=True, map_location="meta")
                sizes = self._sizes[index.fqn, index.offset or torch.Size()]
                if blank.shape != sizes:
                    raise ValueError(f"{path}: a piece has shape {list(blank.shape)}, not {list(sizes)}")
                archive.seek(0)
                opened: Any = torch._C.PyTorchFileReader(archive)
                start = info.offset + opened.get_record_offset("data/0")
            self._data[index] = start + int(blank.storage_offset()) * blank.element_size(), blank
        return self._data[index]


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


def _first_row(piece: ChunkStorageMetadata) -> int:
    return piece.offsets[0] if piece.offsets else 0


def _read_into(file: io.FileIO, start: int, target: Tensor) -> None:
    data = memoryview(target.reshape(-1).view(torch.uint8).numpy())
    while data:  # the kernel reads at most 2 GiB at once
        count = os.preadv(file.fileno(), [data], start)
        if not count:
            raise ValueError(f"{file.name} is truncated")
        data, start = data[count:], start + count


def _copy_mapped(file: io.FileIO, start: int, whole: Tensor, part: Tensor, block: Tensor) -> None:
    """Copy a part of a contiguous piece: of the mapped file only pages that hold some of it are touched.

    As bytes, because archives begin anywhere in a file and the mapped numbers may lie unaligned.
    """
    size = whole.element_size()
    page = start - start % mmap.ALLOCATIONGRANULARITY
    length = start - page + whole.numel() * size
    # Copied on write and never written to: torch takes no memory that it may not write.
    with mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=page) as mapped:
        flat = torch.frombuffer(mapped, dtype=torch.uint8, count=whole.numel() * size, offset=start - page)
        shape, strides = (*part.shape, size), (*(stride * size for stride in part.stride()), 1)
        skip = int(part.storage_offset() - whole.storage_offset()) * size
        block.unsqueeze(-1).view(torch.uint8).copy_(flat.as_strided(shape, strides, skip))
        del flat  # else the map could not be closed
