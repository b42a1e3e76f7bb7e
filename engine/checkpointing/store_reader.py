"""megatron-core's `torch_dist` checkpoints, read by boxes: no model, no process groups.

The format is torch.distributed.checkpoint's: `.metadata`, a pickle that says which piece of which tensor
lies where, and `.distcp` files in which every piece is an archive of `torch.save`. Archives are not
compressed, so a part of a piece is read where it lies, without loading the rest.
"""

import io
import math
import mmap
import os
import pickle
import struct
import zipfile
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from models.conversion.extents import Extent

MASTER_PREFIXES = ("optimizer.state.fp32_param.", "optimizer.state.param.")

Box = tuple[range, ...]  # one a dimension, without steps


@dataclass(frozen=True)
class _Piece:
    """A block of a global tensor, and the archive that holds it."""

    box: Box
    file: str
    start: int  # the archive's first byte in the file
    length: int

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(map(len, self.box))


class StoreReader:
    """The tensors of one `torch_dist` checkpoint. Raises ValueError for a directory that is none."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        try:
            metadata = FileSystemReader(self.directory).read_metadata()
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{directory} holds no readable torch_dist checkpoint: {error}") from None
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._storage = metadata.storage_data
        self._check_files()
        self._pieces: dict[str, list[_Piece]] = {}  # in the order of their first rows
        self._tallest: dict[str, int] = {}  # rows of the largest of them
        self._data: dict[_Piece, tuple[int, Tensor]] = {}  # first data byte, and the tensor without data

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
        for piece, place, index in self._overlaps(key, box):
            block = result[place]
            self._fill(block, piece, index)
            filled += block.numel()
        if filled != result.numel():
            raise ValueError(f"{self.directory}: pieces of {key} cover {filled} of {result.numel()} elements")
        return result

    def extents(self, key: str, index: tuple[slice, ...] = ()) -> list[Extent] | None:
        """The runs of bytes that one after the other make up a box; None where it is more than a copy of runs."""
        box, found = box_of(self.shape(key), index), []
        blank = torch.empty([len(side) for side in box], dtype=self.dtype(key), device="meta")
        for piece, place, index in self._overlaps(key, box):
            block = blank[place]
            start, whole = self._place(piece)
            part = whole[index]
            plain = whole.is_contiguous() and part.is_contiguous() and block.is_contiguous()
            if not plain or whole.dtype != blank.dtype:
                return None
            size = part.element_size()
            extent = Extent(self.directory / piece.file, start + int(part.storage_offset()) * size, part.numel() * size)
            found.append((int(block.storage_offset()) * size, extent))
        found.sort(key=lambda pair: pair[0])
        end = 0
        for offset, extent in found:
            if offset != end:
                return None
            end += extent.length
        return [extent for _, extent in found] if end == blank.nbytes else None

    def _overlaps(self, key: str, box: Box) -> Iterator[tuple[_Piece, tuple[slice, ...], tuple[slice, ...]]]:
        """The pieces that hold some of a box: (piece, where that lies in the box, and where in the piece)."""
        for piece in self._near(key, box):
            common = [_overlap(a, b) for a, b in zip(box, piece.box, strict=True)]
            if all(map(len, common)):
                place = tuple(_within(part, side) for part, side in zip(common, box, strict=True))
                yield piece, place, tuple(_within(part, side) for part, side in zip(common, piece.box, strict=True))

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for info in self._storage.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for file, end in ends.items():
            path = self.directory / file
            if not path.exists() or path.stat().st_size < end:
                raise ValueError(f"{path} is {'truncated' if path.exists() else 'missing'}")

    def _near(self, key: str, box: Box) -> list[_Piece]:
        """The pieces that may reach into a box by their first dimension; large tensors have thousands."""
        if key not in self._pieces:
            pieces = [self._piece(key, chunk) for chunk in self._tensors[key].chunks]
            self._pieces[key] = sorted(pieces, key=_first_row)
            self._tallest[key] = max((len(piece.box[0]) for piece in pieces if piece.box), default=1)
        pieces, rows = self._pieces[key], box[0] if box else range(1)
        first = bisect_right(pieces, rows.start - self._tallest[key], key=_first_row)
        return pieces[first : bisect_left(pieces, rows.stop, key=_first_row)]

    def _piece(self, key: str, chunk) -> _Piece:
        info = self._storage[MetadataIndex(key, chunk.offsets)]
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"{self.directory}: {key} is compressed, which is not supported")
        box = tuple(range(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
        return _Piece(box, info.relative_path, info.offset, info.length)

    def _place(self, piece: _Piece) -> tuple[int, Tensor]:
        """A piece's first byte of storage, and a tensor on the meta device that tells its layout."""
        if piece not in self._data:
            path = self.directory / piece.file
            with open(path, "rb", buffering=0) as file:
                found = _locate(file, piece)
            if tuple(found[1].shape) != piece.sizes:
                raise ValueError(f"{path}: a piece has shape {list(found[1].shape)}, not {list(piece.sizes)}")
            self._data[piece] = found
        return self._data[piece]

    def _fill(self, block: Tensor, piece: _Piece, index: tuple[slice, ...]) -> None:
        """Read the part of a piece that `index` cuts out into `block`."""
        start, blank = self._place(piece)
        with open(self.directory / piece.file, "rb", buffering=0) as file:
            start += int(blank.storage_offset()) * blank.element_size()
            part = blank[index]
            if not blank.is_contiguous() or blank.dtype != block.dtype:
                file.seek(piece.start)
                archive = io.BytesIO(file.read(piece.length))
                block.copy_(torch.load(archive, weights_only=True, map_location="cpu")[index])
            elif part.is_contiguous() and block.is_contiguous():
                skip = int(part.storage_offset() - blank.storage_offset())
                _read_into(file, start + skip * blank.element_size(), block)
            else:
                _copy_mapped(file, start, blank, index, block)


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


def _first_row(piece: _Piece) -> int:
    return piece.box[0].start if piece.box else 0


def _overlap(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))


def _within(part: range, whole: range) -> slice:
    return slice(part.start - whole.start, part.stop - whole.start)


def _locate(file: io.FileIO, piece: _Piece) -> tuple[int, Tensor]:
    """Find where an archive's data begins, and a tensor on the meta device that tells its layout."""
    view = cast(BinaryIO, _View(file, piece.start, piece.length))  # to typeshed a raw file is no BinaryIO
    blank = torch.load(view, weights_only=True, map_location="meta")
    with zipfile.ZipFile(view) as archive:
        record = next(entry for entry in archive.infolist() if entry.filename.endswith("/data/0"))
    if record.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{piece.file}: compressed archives are not supported")
    # A zip's local header: 26 fixed bytes, two lengths, then the name and the padding of those lengths.
    view.seek(record.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", view.read(4))
    return piece.start + record.header_offset + 30 + name_length + extra_length, blank


def _read_into(file: io.FileIO, start: int, target: Tensor) -> None:
    data = memoryview(target.reshape(-1).view(torch.uint8).numpy())
    while data:  # the kernel reads at most 2 GiB at once
        count = os.preadv(file.fileno(), [data], start)
        if not count:
            raise ValueError(f"{file.name} is truncated")
        data, start = data[count:], start + count


def _copy_mapped(file: io.FileIO, start: int, blank: Tensor, index: tuple[slice, ...], block: Tensor) -> None:
    """Copy scattered runs of a contiguous piece: of the mapped file only pages that hold some are touched.

    As bytes, because archives begin anywhere in a file and the mapped numbers may lie unaligned.
    """
    size = blank.element_size()
    *rows, columns = blank.shape
    *leading, last = (slice(*part.indices(n)) for part, n in zip(index, blank.shape, strict=True))
    page = start - start % mmap.ALLOCATIONGRANULARITY
    length = start - page + blank.numel() * size
    # Copied on write and never written to: torch takes no memory that it may not write.
    with mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=page) as mapped:
        flat = torch.frombuffer(mapped, dtype=torch.uint8, count=blank.numel() * size, offset=start - page)
        runs = flat.view(*rows, columns * size)[(*leading, slice(last.start * size, last.stop * size))]
        block.view(torch.uint8).copy_(runs)
        del flat, runs  # else the map could not be closed


class _View(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: io.FileIO, start: int, length: int):
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._position)]
        self._file.seek(self._start + self._position)
        count = self._file.readinto(view) or 0
        self._position += count
        return count
