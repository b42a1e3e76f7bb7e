"""What `torch.save` writes around a tensor's data, which depends on its shape and dtype alone."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch

# Nothing else that `torch.save` writes of a tensor is as long, so that data of this length is known by it.
LONG = 64 * 2**10


@dataclass(frozen=True)
class Archive:
    """A `torch.save` archive of a tensor without the tensor's data, which stands between `before` and `after`."""

    before: bytes
    after: bytes
    length: int  # with the data

    @property
    def data(self) -> int:
        """Where in the archive the data begins."""
        return len(self.before)


@cache
def archive_of(shape: tuple[int, ...], dtype: torch.dtype) -> Archive:
    """The archive of all contiguous tensors of a shape and dtype.

    It bears no checksums of its own, which no reader of torch looks at: then it is the same whatever the data is.
    """
    checked = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    size = torch.Size(shape).numel() * dtype.itemsize
    output = _Output(size)
    try:
        torch.save(torch.empty(shape, dtype=dtype), cast(Any, output))
    finally:
        torch.serialization.set_crc32_options(checked)
    written = output.getvalue()
    start, gap = output.gap, 0
    if start < 0:
        reader: Any = torch._C.PyTorchFileReader(io.BytesIO(written))
        start, gap = reader.get_record_offset("data/0"), size
    return Archive(written[:start], written[start + gap :], len(written) - gap + size)


class _Output(io.BytesIO):
    """Keeps what is written but for the data, where that is long."""

    def __init__(self, size: int):
        super().__init__()
        self._size, self.gap = size, -1

    def write(self, data) -> int:
        length = memoryview(data).nbytes
        if length == self._size >= LONG and self.gap < 0:
            self.gap = self.tell()
            return length
        return super().write(data)
