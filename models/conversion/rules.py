"""Parameter rules: how each global megatron tensor is made of Hugging Face tensors, and the way back.

A family writes one table of `Entry` rows. `expand` turns it into one `Rule` per global megatron tensor.
A rule is a list of row blocks, so any slice of the megatron tensor can be gathered from a Hugging Face
directory without reading more than that slice, and the same blocks read backwards make the export.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

Dims = Mapping[str, int]
Index = tuple[slice, ...]  # of the leading dimensions; those that are left out are taken whole; steps may be above 1


class TensorReader(Protocol):
    """What a rule needs of a directory of tensors; `models.conversion.hf_reader.HFReader` is one."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read(self, name: str, index: Index = (), out: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True)
class RowRange:
    """Rows `start:stop:step` of the Hugging Face tensor `name`, or of matrix `expert` in a stack of them."""

    name: str
    start: int
    stop: int
    step: int = 1
    expert: int | None = None

    def __len__(self) -> int:
        return len(range(self.start, self.stop, self.step))


@dataclass(frozen=True)
class ExportBlock:
    """A block of a Hugging Face tensor for export: made of the megatron tensor's `index` by `lay_out`."""

    name: str
    start: int  # where the block begins in the file tensor's first dimension
    index: Index
    lay_out: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rule:
    """One global megatron tensor: its row ranges one below the other, then zero rows up to its height.

    Of stacked experts [experts, rows, ...] the row_ranges are every expert's rows, expert after expert.
    """

    key: str
    shape: tuple[int, ...]
    row_ranges: tuple[RowRange, ...]
    files: tuple[tuple[str, tuple[int, ...]], ...]  # Hugging Face tensors and their shapes, in table order
    stacked: bool = False  # whether the first dimension counts experts
    transposed: bool = False  # whether files hold the last two dimensions transposed

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the Hugging Face tensors that this rule takes up, in the table's order."""
        return dict(self.files)

    def dtype(self, reader: TensorReader) -> torch.dtype:
        """The dtype of the megatron tensor; ValueError where its parts disagree."""
        dtypes = {name: reader.dtype(name) for name, _ in self.files}
        if len(set(dtypes.values())) > 1:
            raise ValueError(f"tensors that form {self.key} have different dtypes: {dtypes}")
        return next(iter(dtypes.values()))

    def read(self, reader: TensorReader, index: Index = ()) -> Tensor:
        """Gather a slice of the global megatron tensor, reading that much and no more."""
        bounds = self.bounds(index)
        result = torch.empty([stop - start for start, stop in bounds], dtype=self.dtype(reader))
        depth = 2 if self.stacked else 1
        rest = tuple(slice(*bound) for bound in bounds[depth:])
        if not self.stacked:
            self._fill(result, reader, bounds[0][0], rest)
            return result
        for matrix, expert in zip(result, range(*bounds[0]), strict=True):
            self._fill(matrix, reader, expert * self.shape[1] + bounds[1][0], rest)
        return result

    def export_blocks(self, itemsize: int, block_bytes: int) -> Iterator[ExportBlock]:
        """Cut the Hugging Face tensors into blocks of about `block_bytes`, or of one expert's matrix, for export."""
        keyed = groupby(zip(self.row_ranges, self._offsets, strict=True), key=lambda pair: _matrix(pair[0]))
        for (name, expert), group in keyed:
            pairs = list(group)
            if expert is not None:
                yield ExportBlock(name, expert, (slice(expert, expert + 1),), self._assemble(pairs))
                continue
            for row_range, offset in pairs:
                width = math.prod(self.shape[2 if self.stacked else 1 :])
                step = max(1, block_bytes // max(1, width * itemsize))
                for first in range(0, len(row_range), step):
                    count = min(step, len(row_range) - first)
                    index = self._index(offset + first, count)
                    yield ExportBlock(name, row_range.start + first, index, self._unstack)

    def split(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield `(Hugging Face name, tensor)` from the whole megatron tensor; padding rows are left out."""
        if tuple(tensor.shape) != self.shape:
            raise ValueError(f"{self.key} has shape {list(tensor.shape)}, expected {list(self.shape)}")
        result = {name: tensor.new_empty(shape) for name, shape in self.files}
        for block in self.export_blocks(tensor.element_size(), 2**62):
            rows = block.lay_out(tensor[block.index])
            result[block.name][block.start : block.start + len(rows)] = rows
        yield from result.items()

    @cached_property
    def _offsets(self) -> list[int]:
        """The first row of each row range."""
        offsets, total = [], 0
        for row_range in self.row_ranges:
            offsets.append(total)
            total += len(row_range)
        return offsets

    def _index(self, row: int, count: int) -> Index:
        """The megatron index of `count` rows from `row` on, counted over all experts."""
        if not self.stacked:
            return (slice(row, row + count),)
        expert, row = divmod(row, self.shape[1])
        return slice(expert, expert + 1), slice(row, row + count)

    def _unstack(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(0, 1) if self.stacked else tensor

    def _assemble(self, pairs: list[tuple[RowRange, int]]) -> Callable[[Tensor], Tensor]:
        """Lays rows [1, rows, ...] of one expert out as the file holds them."""

        def lay_out(tensor: Tensor) -> Tensor:
            matrix = torch.empty_like(tensor[0])
            for row_range, offset in pairs:
                first = offset % self.shape[1]
                matrix[row_range.start : row_range.stop : row_range.step] = tensor[0, first : first + len(row_range)]
            return (matrix.t() if self.transposed else matrix)[None]

        return lay_out

    def bounds(self, index: Index) -> list[tuple[int, int]]:
        """(start, stop) of a slice in each dimension."""
        whole = tuple(slice(0, size) for size in self.shape)
        return [part.indices(size)[:2] for part, size in zip(index + whole[len(index) :], self.shape, strict=True)]

    def walk(self, first: int, count: int) -> Iterator[tuple[RowRange | None, int, int]]:
        """(row_range, rows of it to skip, rows) of `count` rows from `first` on; zero rows have no range."""
        while count > 0:
            number = bisect_right(self._offsets, first) - 1
            row_range, skip = self.row_ranges[number], first - self._offsets[number]
            here = min(len(row_range) - skip, count)
            if here <= 0:
                yield None, 0, count
                return
            yield row_range, skip, here
            first, count = first + here, count - here

    def _fill(self, out: Tensor, reader: TensorReader, first: int, rest: Index) -> None:
        """Put rows from `first` on, counted over all row ranges, into `out`; rows after the last are zero."""
        done = 0
        for row_range, skip, count in self.walk(first, len(out)):
            rows = out[done : done + count]
            if row_range is None:
                rows.zero_()
            else:
                self._read_segment(rows, reader, row_range, skip, rest)
            done += count

    def _read_segment(self, out: Tensor, reader: TensorReader, row_range: RowRange, skip: int, rest: Index) -> None:
        start = row_range.start + skip * row_range.step
        rows = slice(start, start + (len(out) - 1) * row_range.step + 1, row_range.step)
        index, target = ((*rest, rows), out.mT) if self.transposed else ((rows, *rest), out)
        if row_range.expert is not None:
            index, target = (slice(row_range.expert, row_range.expert + 1), *index), target[None]
        reader.read(row_range.name, index, target)


def _matrix(row_range: RowRange) -> tuple[str, int | None]:
    return row_range.name, row_range.expert


# A kind lays the rows of some matrices, given as {name: rows}, out as row ranges of one megatron matrix.
Kind = Callable[[Mapping[str, int], Dims], tuple[RowRange, ...]]


def stacked(rows: Mapping[str, int], dims: Dims) -> tuple[RowRange, ...]:
    """Whole tensors one below the other: a plain copy where there is one, gate above up where two."""
    return tuple(RowRange(name, 0, count) for name, count in rows.items())


def by_group(rows: Mapping[str, int], dims: Dims) -> tuple[RowRange, ...]:
    """For each query group its share of every tensor: the group's q heads, then its k, then its v."""
    groups = dims["groups"]
    share = {name: count // groups for name, count in rows.items()}
    return tuple(RowRange(n, g * share[n], (g + 1) * share[n]) for g in range(groups) for n in rows)


def interleaved(rows: Mapping[str, int], dims: Dims) -> tuple[RowRange, ...]:
    """One tensor whose rows interleave gate and up: all gates above all ups."""
    return tuple(RowRange(name, first, count, 2) for name, count in rows.items() for first in (0, 1))


@dataclass(frozen=True)
class Entry:
    """One row of a family's table.

    `key` is a megatron key and may contain `{i}`, the layer. `tensors` maps Hugging Face names to the shapes
    that files have, in the words of `Dims`, e.g. `"ffn hidden"`. Experts are stacked in the megatron tensor's
    first dimension where a name contains `{e}` (a file tensor per expert) or a shape begins with "experts".
    `rows` names the megatron tensor's rows where these are more than the sum of the parts. `only` names a
    condition of the model, e.g. `"untied"`. `transposed` says that files hold the last two dimensions
    transposed, `whole` that "experts" counts a plain tensor's rows, as in a router.
    """

    key: str
    kind: Kind
    tensors: Mapping[str, str]
    rows: str | None = None
    only: str | None = None
    transposed: bool = False
    whole: bool = False

    def rule(self, dims: Dims, layer: int | None) -> Rule:
        """This row's rule for one layer of a model of these sizes."""
        names = {name.replace("{i}", str(layer)): words.split() for name, words in self.tensors.items()}
        shapes = {name: tuple(dims[word] for word in words) for name, words in names.items()}
        per_file = any("{e}" in name for name in names)
        in_file = not self.whole and any(words[0] == "experts" for words in names.values())
        matrices = {name: shape[1:] if in_file else shape for name, shape in shapes.items()}
        if self.transposed:
            matrices = {name: shape[::-1] for name, shape in matrices.items()}
        row_ranges = self.kind({name: shape[0] for name, shape in matrices.items()}, dims)
        height = dims[self.rows] if self.rows else sum(map(len, row_ranges))
        shape = (height, *next(iter(matrices.values()))[1:])
        files = tuple(shapes.items())
        if per_file or in_file:
            experts = range(dims["experts"])
            shape = (len(experts), *shape)
            if per_file:
                row_ranges = tuple(replace(s, name=_numbered(s.name, e)) for e in experts for s in row_ranges)
                files = tuple((_numbered(name, e), size) for e in experts for name, size in files)
            else:
                row_ranges = tuple(replace(s, expert=e) for e in experts for s in row_ranges)
        key = self.key.replace("{i}", str(layer))
        return Rule(key, shape, row_ranges, files, per_file or in_file, self.transposed)


def _numbered(name: str, expert: int) -> str:
    return name.replace("{e}", str(expert))


def expand(table: Iterable[Entry], dims: Dims, num_layers: int, conditions: set[str]) -> tuple[Rule, ...]:
    """One rule per global megatron tensor, layer by layer."""
    rules: list[Rule] = []
    wanted = [entry for entry in table if entry.only is None or entry.only in conditions]
    for layered, group in groupby(wanted, key=lambda entry: "{i}" in entry.key):
        entries = list(group)
        for layer in range(num_layers) if layered else (None,):
            rules.extend(entry.rule(dims, layer) for entry in entries)
    return tuple(rules)
