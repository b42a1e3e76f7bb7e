"""A rank's file of a checkpoint as it will lie on disk, laid out once and filled at every save.

The file is a row of `torch.save` archives, as torch.distributed.checkpoint's readers want them. What an archive holds
around a tensor's data is the same at every save, so it is made once. The file's bytes lie in memory that another
process can map: it writes them while training goes on (`engine.checkpointing.image_writer`).
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from engine.checkpointing.archive import Archive, archive_of
from engine.checkpointing.shards import Shard
from engine.checkpointing.store_reader import row_blocks

PIECE_BYTES = 64 * 2**20  # of one archive: what a reader of a part of it has to look through
ALIGNMENT = 64  # of archives in the file, and of the data in an archive


@dataclass(frozen=True)
class Piece:
    """A tensor to be written: a box of a global tensor."""

    key: str
    shape: tuple[int, ...]  # of the global tensor
    offsets: tuple[int, ...]
    data: Tensor

    @property
    def archive(self) -> Archive:
        """What stands around its data in the file."""
        return archive_of(tuple(self.data.shape), self.data.dtype)


def pieces_of(shards: Sequence[Shard]) -> list[Piece]:
    """What this rank writes, in the order of the file: all weights first, then one state after the other."""
    found: dict[int, list[Piece]] = {}
    for shard in shards:
        if not shard.written:
            continue
        for number, (key, tensor) in enumerate(shard.tensors()):
            for rows in row_blocks(tensor.shape, tensor.dtype, PIECE_BYTES):
                first, *rest = shard.offsets or (0,)
                offsets = (first + rows.start, *rest) if shard.offsets else ()
                part = tensor[rows] if shard.offsets else tensor
                found.setdefault(number, []).append(Piece(key, shard.shape, offsets, part))
    return [piece for number in sorted(found) for piece in found[number]]


class Image:
    """The bytes of one rank's file. `fill` copies the pieces into it; `release` gives the memory back."""

    def __init__(self, pieces: Sequence[Piece], file: str):
        self.pieces, self.file = list(pieces), file
        self._starts: list[int] = []
        end = 0
        for piece in self.pieces:
            self._starts.append(end)
            end += piece.archive.length
            end += -end % ALIGNMENT
        self.size = end
        self.descriptor = -1
        self._memory: mmap.mmap | None = None
        self._views: list[Tensor] = []
        self._on_gpu, self._pinned = any(piece.data.is_cuda for piece in self.pieces), False

    def storage(self) -> dict[MetadataIndex, tuple[Any, ...]]:
        """Where every piece lies: (global shape, dtype, chunk, storage), as `.metadata` says it."""
        found = {}
        for piece, start in zip(self.pieces, self._starts, strict=True):
            offsets = torch.Size(piece.offsets)
            chunk = ChunkStorageMetadata(offsets, torch.Size(piece.data.shape))
            info = _StorageInfo(self.file, start, piece.archive.length)
            found[MetadataIndex(piece.key, offsets)] = (piece.shape, piece.data.dtype, chunk, info)
        return found

    def fill(self) -> None:
        """Copies all pieces into the image, from the device too."""
        if self._memory is None:
            self._allocate()
        with torch.no_grad():
            for view, piece in zip(self._views, self.pieces, strict=True):
                view.copy_(piece.data, non_blocking=True)
        if self._on_gpu:
            torch.cuda.synchronize()

    def release(self) -> None:
        """Gives the memory back; the next `fill` takes it again."""
        if self._memory is None:
            return
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._whole.data_ptr())
        self._views.clear()
        del self._whole
        self._memory.close()
        os.close(self.descriptor)
        self._memory, self.descriptor = None, -1

    def _allocate(self) -> None:
        self.descriptor = os.memfd_create(self.file)
        os.ftruncate(self.descriptor, max(self.size, 1))
        self._memory = mmap.mmap(self.descriptor, max(self.size, 1))
        self._whole = torch.frombuffer(self._memory, dtype=torch.uint8)
        if self._on_gpu:  # pinned, so that copies run at the bus's full speed
            status = torch.cuda.cudart().cudaHostRegister(self._whole.data_ptr(), len(self._whole), 0)
            self._pinned = int(status) == 0
            if not self._pinned:
                print(f"warning: {self.file}: the host's memory could not be pinned ({status}): saves take longer")
        for piece, start in zip(self.pieces, self._starts, strict=True):
            archive, data = piece.archive, start + piece.archive.data
            after = data + piece.data.nbytes
            self._memory[start:data] = archive.before
            self._memory[after : start + archive.length] = archive.after
            self._views.append(self._whole[data:after].view(piece.data.dtype).view(piece.data.shape))
