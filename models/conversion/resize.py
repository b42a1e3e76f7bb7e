"""Tensors with more rows than files hold, for a tokenizer to which tokens were added."""

from collections.abc import Mapping

import torch
from torch import Tensor

from models.conversion.rules import Index, TensorReader

BLOCK_ROWS = 1024  # read at a time for a mean


class ResizedReader:
    """A reader that shows some tensors, `{name: rows}`, with more rows than files hold: each the mean of those held.

    The mean is taken in fp64, then rounded to the tensor's dtype; it is computed when it is first asked for. With it
    an added token begins in the middle of the others and does not upset their softmax.
    """

    def __init__(self, reader: TensorReader, rows: Mapping[str, int]):
        for name, count in rows.items():
            assert count >= reader.shape(name)[0], f"{name} would lose rows"
        self._reader = reader
        self._rows = dict(rows)
        self._means: dict[str, Tensor] = {}

    def names(self) -> list[str]:
        return self._reader.names()

    def shape(self, name: str) -> tuple[int, ...]:
        held = self._reader.shape(name)
        return (self._rows[name], *held[1:]) if name in self._rows else held

    def dtype(self, name: str) -> torch.dtype:
        return self._reader.dtype(name)

    def read(self, name: str, index: Index = (), out: Tensor | None = None) -> Tensor:
        """A tensor or a slice of it, put into `out` or into memory of its own."""
        if name not in self._rows:
            return self._reader.read(name, index, out)
        shape = self.shape(name)
        wanted = [range(size)[part] for size, part in zip(shape, index, strict=False)]
        wanted += [range(size) for size in shape[len(index) :]]
        if out is None:
            out = torch.empty([len(part) for part in wanted], dtype=self.dtype(name))
        rows, rest = wanted[0], index[1:]
        held = rows[: len(range(rows.start, self._reader.shape(name)[0], rows.step))]
        if held:
            self._reader.read(name, (slice(held[0], held[-1] + 1, held.step), *rest), out[: len(held)])
        if len(held) < len(rows):
            out[len(held) :] = self._mean(name)[rest]
        return out

    def _mean(self, name: str) -> Tensor:
        """The mean of the rows that files hold."""
        if name not in self._means:
            count, *row = self._reader.shape(name)
            total = torch.zeros(row, dtype=torch.float64)
            for start in range(0, count, BLOCK_ROWS):
                total += self._reader.read(name, (slice(start, min(start + BLOCK_ROWS, count)),)).double().sum(0)
            self._means[name] = (total / count).to(self.dtype(name))
        return self._means[name]
