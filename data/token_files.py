"""megatron-core's IndexedDataset on disk: tokens end to end in NAME.bin, where each sequence lies in NAME.idx.

NAME.bin    all tokens, one sequence after the other
NAME.idx    9 bytes magic, u64 version, u8 dtype code, u64 sequences, u64 boundaries,
            int32 [sequences] lengths, int64 [sequences] byte offsets, int64 [boundaries] sequence numbers at
            document boundaries, and in multimodal files int8 [sequences] modes, 0 for text
"""

import mmap
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CODES = ("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16")  # 1, 2, ... 8
_AT_ONCE = 2**20  # sequences that are checked at once
DTYPES = {code: np.dtype(name) for code, name in enumerate(_CODES, start=1)}


class TokenFiles(NamedTuple):
    """One mapped pair of files; arrays are read-only views of the maps, but for `lengths`."""

    tokens: np.ndarray  # [all tokens]
    lengths: np.ndarray  # int32 [sequences]
    pointers: np.ndarray  # int64 [sequences], bytes from the start of the .bin
    modes: np.ndarray | None  # int8 [sequences]

    def sequence(self, number: int) -> np.ndarray:
        """Return the tokens [length] of a sequence."""
        start = int(self.pointers[number]) // self.tokens.itemsize
        return self.tokens[start : start + int(self.lengths[number])]


def map_token_files(idx: Path, bin_: Path) -> TokenFiles:
    """Map both files; ValueError where they are no such files, cut off, or do not belong together."""
    index = map_file(idx) if idx.stat().st_size >= _HEADER.size else b""
    if index[: len(_MAGIC)] != _MAGIC:
        raise ValueError(f"{idx} is not the index of a megatron-core data set, or is cut off")
    _, version, code, count, boundaries = _HEADER.unpack_from(index)
    if version != 1 or code not in DTYPES:
        raise ValueError(f"{idx} has version {version} and dtype code {code}, which megatron-core does not know")
    size = _HEADER.size + 12 * count + 8 * boundaries
    if len(index) not in (size, size + count):
        raise ValueError(f"{idx} is cut off: its header asks for {size:,} bytes and it has {len(index):,}")
    # a copy, because the header's 34 bytes leave the mapped numbers unaligned
    lengths = np.frombuffer(index, np.int32, count, _HEADER.size).copy()
    pointers = np.frombuffer(index, np.int64, count, _HEADER.size + 4 * count)
    modes = np.frombuffer(index, np.int8, count, size) if len(index) > size else None
    dtype = DTYPES[code]
    stored = bin_.stat().st_size
    tokens = np.frombuffer(map_file(bin_), dtype) if stored and stored % dtype.itemsize == 0 else np.empty(0, dtype)
    if stored != lengths.sum(dtype=np.int64) * dtype.itemsize:
        raise ValueError(f"{bin_} and {idx.name} do not belong together")
    _check_places(idx, lengths, pointers, dtype.itemsize)
    return TokenFiles(tokens, lengths, pointers, modes)


def _check_places(idx: Path, lengths: np.ndarray, pointers: np.ndarray, itemsize: int) -> None:
    """Refuse sequences that do not lie end to end."""
    if len(lengths) and lengths.min() < 0:
        raise ValueError(f"{idx} is damaged: it has a sequence of {lengths.min()} tokens")
    start = 0
    for first in range(0, len(lengths), _AT_ONCE):
        ends = start + np.cumsum(lengths[first : first + _AT_ONCE], dtype=np.int64) * itemsize
        if pointers[first] != start or (pointers[first + 1 : first + _AT_ONCE] != ends[:-1]).any():
            raise ValueError(f"{idx} is damaged: it does not place its sequences end to end")
        start = int(ends[-1])


def write_idx(path: Path, dtype: np.dtype, lengths: np.ndarray) -> None:
    """Write the index of sequences of these lengths, int32 [sequences], each a document of its own."""
    code = next(code for code, known in DTYPES.items() if known == dtype)
    pointers = np.zeros(len(lengths), dtype=np.int64)
    np.cumsum(lengths[:-1].astype(np.int64) * dtype.itemsize, out=pointers[1:])
    with open(path, "wb") as file:
        file.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1))
        for part in (lengths, pointers, np.arange(len(lengths) + 1, dtype=np.int64)):
            file.write(part.tobytes())


def map_file(path: Path) -> mmap.mmap:
    """Map a file that is not empty, read-only."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
