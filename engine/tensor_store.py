"""megatron-core's `torch_dist` checkpoints, read and written tensor by tensor: no model, no process groups.

The format is torch.distributed.checkpoint's: `.metadata`, a pickle that says which piece of which tensor
lies where, and `.distcp` files in which every piece is an archive of `torch.save`. Archives are not
compressed, so rows of a piece are read where they lie, without loading the rest.
"""

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

PIECE_BYTES = 64 * 2**20  # what a streaming writer holds in memory
FILE_BYTES = 4 * 2**30
# What megatron-core's loader wants beside torch's own files.
MEGATRON_METADATA = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
MASTER_PREFIXES = ("optimizer.state.fp32_param.", "optimizer.state.param.")

# (key, global shape, dtype, a function that makes the rows of a slice)
Spec = tuple[str, Sequence[int], torch.dtype, Callable[[slice], Tensor]]


@dataclass(frozen=True)
class _Piece:
    """A block of a global tensor, and the archive that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int  # the archive's first byte in the file
    length: int


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
        self._storage: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        self._check_files()
        self._data: dict[_Piece, tuple[int, Tensor]] = {}  # first data byte, and the tensor without data

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def keys(self) -> list[str]:
        return sorted(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].properties.dtype

    def read(self, key: str, index: tuple[slice, ...] = ()) -> Tensor:
        """A global tensor or a slice of it (one slice a leading dimension, without steps), from its pieces."""
        shape = self.shape(key)
        first, last, _ = (index[0] if index else slice(None)).indices(shape[0] if shape else 1)
        result = torch.empty((last - first, *shape[1:]) if shape else (), dtype=self.dtype(key))
        filled = 0
        for piece in self._pieces(key):
            top = piece.offsets[0] if shape else 0
            lower, upper = max(first, top), min(last, top + (piece.sizes[0] if shape else 1))
            if lower < upper:
                place = [slice(lower - first, upper - first)] if shape else []
                place += [slice(o, o + n) for o, n in zip(piece.offsets[1:], piece.sizes[1:], strict=True)]
                block = result[tuple(place)]
                self._fill(block, piece, lower - top)
                filled += block.numel()
        if filled != result.numel():
            raise ValueError(f"{self.directory}: pieces of {key} cover {filled} of {result.numel()} elements")
        return result[(slice(None), *index[1:])] if index[1:] else result

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for info in self._storage.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for file, end in ends.items():
            path = self.directory / file
            if not path.exists() or path.stat().st_size < end:
                raise ValueError(f"{path} is {'truncated' if path.exists() else 'missing'}")

    def _pieces(self, key: str) -> Iterator[_Piece]:
        for chunk in self._tensors[key].chunks:
            info = self._storage[MetadataIndex(key, chunk.offsets)]
            if getattr(info, "transform_descriptors", None):
                raise ValueError(f"{self.directory}: {key} is compressed, which is not supported")
            where = (info.relative_path, info.offset, info.length)
            yield _Piece(tuple(chunk.offsets), tuple(chunk.sizes), *where)

    def _fill(self, block: Tensor, piece: _Piece, first_row: int) -> None:
        """Read a piece's rows from `first_row` on into `block`."""
        path = self.directory / piece.file
        with open(path, "rb", buffering=0) as file:
            if piece not in self._data:
                self._data[piece] = _locate(file, piece)
            start, blank = self._data[piece]
            if tuple(blank.shape) != piece.sizes:
                raise ValueError(f"{path}: a piece has shape {list(blank.shape)}, not {list(piece.sizes)}")
            if not blank.is_contiguous():
                file.seek(piece.start)
                whole = torch.load(io.BytesIO(file.read(piece.length)), weights_only=True, map_location="cpu")
                block.copy_(whole[first_row : first_row + len(block)] if whole.dim() else whole)
                return
            row_elements = blank[0].numel() if blank.dim() else 0
            file.seek(start + (int(blank.storage_offset()) + first_row * row_elements) * blank.element_size())
            direct = block.is_contiguous() and block.dtype == blank.dtype
            target = block if direct else torch.empty(block.shape, dtype=blank.dtype)
            _read_into(file, target)
            if not direct:
                block.copy_(target)


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


def _read_into(file: io.FileIO, target: Tensor) -> None:
    data = memoryview(target.reshape(-1).view(torch.uint8).numpy())
    while data:  # the kernel reads at most 2 GiB at once
        count = file.readinto(data)
        if not count:
            raise ValueError(f"{file.name} is truncated")
        data = data[count:]


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


def write_store(directory: str | Path, specs: Iterable[Spec], piece_bytes: int = PIECE_BYTES) -> None:
    """Write a `torch_dist` checkpoint that `megatron.core.dist_checkpointing.load` reads under any layout.

    Every tensor is made and written in pieces of rows, so memory holds about two pieces, whatever the size
    of the tensors. A row that is larger than `piece_bytes` is a piece by itself.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    metadata = Metadata(state_dict_metadata={}, planner_data={}, storage_data={}, version=CURRENT_DCP_VERSION)
    files = _DataFiles(directory)
    with files:
        for key, shape, dtype, produce in specs:
            shape = torch.Size(shape)
            chunks = [ChunkStorageMetadata(*chunk) for chunk in _chunks(shape, dtype, piece_bytes)]
            properties = TensorProperties(dtype=dtype)
            metadata.state_dict_metadata[key] = TensorStorageMetadata(properties, shape, chunks)
            for chunk in chunks:
                rows = slice(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]) if shape else slice(None)
                tensor = produce(rows)
                if tensor.shape != chunk.sizes or tensor.dtype != dtype:
                    raise ValueError(f"{key}: {tensor.dtype} {list(tensor.shape)} is not {list(chunk.sizes)}")
                metadata.storage_data[MetadataIndex(key, chunk.offsets)] = files.append(tensor)
    (directory / "metadata.json").write_text(json.dumps(MEGATRON_METADATA), encoding="utf-8")
    torch.save({}, directory / "common.pt")
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def row_blocks(shape: Sequence[int], dtype: torch.dtype, block_bytes: int = PIECE_BYTES) -> Iterator[slice]:
    """Cut a tensor's rows into slices of at most `block_bytes`, and of one row at least."""
    rows = shape[0] if shape else 1
    row_bytes = max(1, torch.Size(shape[1:]).numel() * dtype.itemsize)
    step = max(1, block_bytes // row_bytes)
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def master_key(reader: StoreReader, key: str) -> str | None:
    """The key of the fp32 master weight of a model tensor, where the optimizer's state holds one."""
    for prefix in MASTER_PREFIXES:
        if prefix + key in reader and reader.shape(prefix + key) == reader.shape(key):
            return prefix + key
    return None


def _chunks(shape: torch.Size, dtype: torch.dtype, limit: int) -> Iterator[tuple[torch.Size, torch.Size]]:
    """(offsets, sizes) of the pieces of a tensor."""
    if not shape:
        yield torch.Size(), torch.Size()
    for rows in row_blocks(shape, dtype, limit) if shape else ():
        yield (
            torch.Size((rows.start, *[0] * (len(shape) - 1))),
            torch.Size((rows.stop - rows.start, *shape[1:])),
        )


class _DataFiles:
    """The `.distcp` files being written, one after the other."""

    def __init__(self, directory: Path):
        self._directory, self._count = directory, 0
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._file:
            self._file.close()

    def append(self, tensor: Tensor) -> _StorageInfo:
        # Through memory: torch.save straight into a file turns a full disk into an obscure RuntimeError.
        buffer = io.BytesIO()
        torch.save(tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor, buffer)
        if self._file is None or self._file.tell() > FILE_BYTES:
            self.__exit__(None, None, None)
            name = f"__0_{self._count}.distcp"
            self._file = open(self._directory / name, "wb")  # noqa: SIM115  (closed on leaving)
            self._count += 1
        start = self._file.tell()
        length = self._file.write(buffer.getbuffer())
        return _StorageInfo(Path(self._file.name).name, start, length)
