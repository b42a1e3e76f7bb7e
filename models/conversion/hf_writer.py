"""Safetensors files written tensor by tensor, or piece by piece.

The writer knows every shape before it starts, so it writes the files' headers itself (the safetensors
format: 8 bytes of header length, a JSON header, then the tensors' bytes without gaps) and the tensors in
whatever order and pieces they come: memory never holds more than what is being written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from models.conversion.byte_boxes import bytes_of
from models.conversion.hf_reader import DTYPES, INDEX, SINGLE, read_index

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class HFWriter:
    """Writes a planned set of tensors as safetensors, named and ordered as transformers does.

    `plan` maps every name to (shape, dtype). `like` may name a directory that holds the index of the
    model's origin: where it lists the same tensors, they are put into the same files again. Otherwise a
    file is filled up to `shard_bytes`. Use as a context: leaving it checks that all was written.

    Several processes may write one directory: one calls `create`; then each enters a writer of the same plan
    with `shared`, writes its part and leaves with its counts in `written`; then one calls `finish` with these.
    """

    def __init__(
        self,
        path: str | Path,
        plan: Mapping[str, tuple[Sequence[int], torch.dtype]],
        shard_bytes: float = 5e9,
        like: str | Path | None = None,
        shared: bool = False,
    ):
        self.path, self.shared = Path(path), shared
        self.plan = {name: (tuple(shape), dtype) for name, (shape, dtype) in plan.items()}
        self.written: dict[str, int] = {}  # bytes by name
        self._bytes = {name: _size(*entry) for name, entry in self.plan.items()}
        self._origin = read_index(Path(like)) if like else None
        if self._origin is not None and self._origin["weight_map"].keys() != self.plan.keys():
            self._origin = None
        self._file = self._origin["weight_map"] if self._origin else self._shards(shard_bytes)
        self._descriptors: dict[str, int] = {}
        self._offset: dict[str, int] = {}  # of a tensor's first byte in its file
        self._length: dict[str, int] = {}  # of the files
        self._header = {file: self._lay_out(file) for file in sorted(set(self._file.values()))}

    def create(self) -> None:
        """Make the files, with their headers and their full length, in place of what is there."""
        self.path.mkdir(parents=True, exist_ok=True)
        for file, header in self._header.items():
            with open(self.path / file, "wb") as created:
                created.write(len(header).to_bytes(8, "little") + header)
                created.truncate(self._length[file])

    def __enter__(self) -> Self:
        if not self.shared:
            self.create()
        try:
            for file in self._header:
                self._descriptors[file] = os.open(self.path / file, os.O_WRONLY)
        except BaseException:
            self._close()
            raise
        return self

    def write(self, name: str, tensor: Tensor, start: int = 0) -> None:
        """Write a whole tensor, or some of its rows from row `start` on; every row just once."""
        shape, dtype = self.plan[name]
        if tensor.dtype != dtype or tuple(tensor.shape[1:]) != shape[1:]:
            raise ValueError(f"{name}: {tensor.dtype} {list(tensor.shape)} is not {dtype} {list(shape)}")
        data = bytes_of(tensor.contiguous())
        descriptor, offset = self._claim(name, start, len(data))
        while data:
            count = os.pwrite(descriptor, data, offset)
            data, offset = data[count:], offset + count
        # Sends these pages to the disk already now, so that the last fsync finds little left to wait for.
        os.posix_fadvise(descriptor, offset - tensor.nbytes, tensor.nbytes, os.POSIX_FADV_DONTNEED)

    def _claim(self, name: str, start: int, length: int) -> tuple[int, int]:
        """Where bytes from row `start` on belong; ValueError for more than the tensor has."""
        shape, _ = self.plan[name]
        row_bytes = self._bytes[name] // shape[0] if shape and shape[0] else 0
        self.written[name] = self.written.get(name, 0) + length
        if start * row_bytes + length > self._bytes[name] or self.written[name] > self._bytes[name]:
            raise ValueError(f"{name}: more rows were written than it has ({list(shape)})")
        return self._descriptors[self._file[name]], self._offset[name] + start * row_bytes

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                for descriptor in self._descriptors.values():
                    os.fsync(descriptor)
                if not self.shared:
                    self.finish([self.written])
        finally:
            self._close()

    def finish(self, written: Iterable[Mapping[str, int]]) -> None:
        """Check that all processes together wrote every byte, and write the index; ValueError naming gaps."""
        missing = dict(self._bytes)
        for counts in written:
            for name, count in counts.items():
                missing[name] -= count
        unwritten = [name for name, size in missing.items() if size]
        if unwritten:
            raise ValueError(f"{len(unwritten)} tensor(s) were not written: {', '.join(unwritten[:5])}")
        total = sum(self._bytes.values())
        index = self.path / INDEX
        if self._origin and self._origin["metadata"].get("total_size") == total:
            index.write_bytes(self._origin["bytes"])
        elif set(self._file.values()) == {SINGLE}:
            index.unlink(missing_ok=True)
        else:
            content = {"metadata": {"total_size": total}, "weight_map": self._file}
            index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _shards(self, shard_bytes: float) -> dict[str, str]:
        """Fill one file after the other, as transformers does; a larger tensor has a file of its own."""
        numbers: dict[str, int] = {}
        number, used = 1, 0
        for name, size in self._bytes.items():
            if used and used + size > shard_bytes:
                number, used = number + 1, 0
            numbers[name] = number
            used += size
        if number == 1:
            return dict.fromkeys(self.plan, SINGLE)
        return {name: f"model-{one:05d}-of-{number:05d}.safetensors" for name, one in numbers.items()}

    def _lay_out(self, file: str) -> bytes:
        """A file's header, padded; wider dtypes come first, so that all data is aligned."""
        names = [name for name in self.plan if self._file[name] == file]
        names.sort(key=lambda name: (-self.plan[name][1].itemsize, name))
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            shape, dtype = self.plan[name]
            begin, end = end, end + self._bytes[name]
            entry = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
            header[name] = entry
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        for name in names:
            self._offset[name] = 8 + len(text) + header[name]["data_offsets"][0]
        self._length[file] = 8 + len(text) + end
        return text

    def _close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def _size(shape: Sequence[int], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
