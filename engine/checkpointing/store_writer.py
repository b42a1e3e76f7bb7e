"""megatron-core's `torch_dist` checkpoints, written piece by piece and by several processes.

Every process writes files of its own and returns where its pieces lie; the first puts that into `.metadata`.
"""

import json
import os
import pickle
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from data.checksums import BlockSums
from engine.checkpointing.archive import archive_of
from engine.checkpointing.directory import METADATA
from engine.checkpointing.store_reader import row_blocks
from engine.checkpointing.workers import Advance, Bar, no_bar, run_workers, share_of
from models.conversion.byte_boxes import bytes_of

# What a writer makes and writes at once. Blocks of malloc above 32 MiB go back to the kernel each time they are
# freed, and pages that come from there cost more than the copying.
PIECE_BYTES = 16 * 2**20
FILE_BYTES = 4 * 2**30
# What megatron-core's loader wants beside torch's own files.
MEGATRON_METADATA = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}

# (key, global shape, dtype, a function that makes the rows of a slice)
Spec = tuple[str, Sequence[int], torch.dtype, Callable[[slice], Tensor]]
Storage = dict[MetadataIndex, _StorageInfo]


def write_store(
    directory: str | Path,
    specs: Iterable[Spec],
    piece_bytes: int = PIECE_BYTES,
    num_workers: int = 1,
    bar: Bar = no_bar,
) -> None:
    """Write a `torch_dist` checkpoint that `megatron.core.dist_checkpointing.load` reads under any layout.

    Every tensor is made and written in pieces of rows, so a process holds about one piece, whatever the size
    of the tensors. A row (of stacked experts, a matrix) larger than `piece_bytes` is a piece by itself.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    metadata = Metadata(state_dict_metadata={}, planner_data={}, storage_data={}, version=CURRENT_DCP_VERSION)
    pieces: list[tuple[Spec, ChunkStorageMetadata]] = []
    for spec in specs:
        key, shape, dtype, _ = spec
        chunks = _chunks(torch.Size(shape), dtype, piece_bytes)
        properties = TensorProperties(dtype=dtype)
        metadata.state_dict_metadata[key] = TensorStorageMetadata(properties, torch.Size(shape), chunks)
        pieces += [(spec, chunk) for chunk in chunks]
    write = partial(_write_share, directory, pieces, num_workers)
    for storage in run_workers(write, range(num_workers), bar):
        metadata.storage_data.update(storage)
    write_companions(directory)
    (directory / METADATA).write_bytes(pickle.dumps(metadata))


def write_companions(directory: Path) -> None:
    """Write what megatron-core's loader wants beside torch's own files; nothing of ours reads it."""
    (directory / "metadata.json").write_text(json.dumps(MEGATRON_METADATA), encoding="utf-8")
    torch.save({}, directory / "common.pt")


def _chunks(shape: torch.Size, dtype: torch.dtype, limit: int) -> list[ChunkStorageMetadata]:
    if not shape:
        return [ChunkStorageMetadata(shape, shape)]
    return [
        ChunkStorageMetadata(
            torch.Size((rows.start, *[0] * (len(shape) - 1))), torch.Size((rows.stop - rows.start, *shape[1:]))
        )
        for rows in row_blocks(shape, dtype, limit)
    ]


def _write_share(
    directory: Path,
    pieces: Sequence[tuple[Spec, ChunkStorageMetadata]],
    workers: int,
    number: int,
    advance: Advance,
) -> Storage:
    """Make and write one worker's pieces; returns where they lie."""
    storage: Storage = {}
    sizes = [chunk.sizes.numel() * spec[2].itemsize for spec, chunk in pieces]
    with _DataFiles(directory, number) as files:
        for one in share_of(sizes, number, workers):
            (key, shape, dtype, produce), chunk = pieces[one]
            rows = slice(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]) if shape else slice(None)
            tensor = produce(rows)
            if tensor.shape != chunk.sizes or tensor.dtype != dtype:
                raise ValueError(f"{key}: {tensor.dtype} {list(tensor.shape)} is not {list(chunk.sizes)}")
            storage[MetadataIndex(key, chunk.offsets)] = files.append(tensor)
            advance(tensor.nbytes)
    return storage


class _DataFiles:
    """The `.distcp` files of one worker, written one after the other."""

    def __init__(self, directory: Path, worker: int):
        self._directory, self._worker, self._count = directory, worker, 0
        self._file: _Archives | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._file:
            self._file.close()

    def append(self, tensor: Tensor) -> _StorageInfo:
        return self._current().append(tensor)

    def _current(self) -> "_Archives":
        if self._file is None or self._file.end > FILE_BYTES:
            self.__exit__(None, None, None)
            self._file = _Archives(self._directory / f"__{self._worker}_{self._count}.distcp")
            self._count += 1
        return self._file


class _Archives:
    """One file of `torch.save` archives, written without a buffer between."""

    def __init__(self, path: Path):
        self.path, self.end = path, 0
        self._descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        self._sums = BlockSums()

    def append(self, tensor: Tensor) -> _StorageInfo:
        start, archive = self.end, archive_of(tuple(tensor.shape), tensor.dtype)
        for block in (memoryview(archive.before), bytes_of(tensor.contiguous()), memoryview(archive.after)):
            self._sums.update(block)
            while block:
                count = os.pwrite(self._descriptor, block, self.end)
                block, self.end = block[count:], self.end + count
        # Sends these pages to the disk already now, so that the last fsync finds little left to wait for.
        os.posix_fadvise(self._descriptor, start, self.end - start, os.POSIX_FADV_DONTNEED)
        return _StorageInfo(self.path.name, start, self.end - start)

    def close(self) -> None:
        """Make the file survive a power failure, in the process that wrote it: several wait for a disk at once."""
        try:
            os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
        self._sums.write(self.path)
