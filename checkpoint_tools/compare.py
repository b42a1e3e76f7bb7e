"""Two checkpoints or Hugging Face directories side by side, tensor by tensor and block by block."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpointing.directory import MANIFEST, METADATA, STATE
from engine.checkpointing.hf_export import Checkpoint, dtype_name, open_checkpoint
from engine.checkpointing.store_reader import StoreReader, row_blocks
from engine.checkpointing.workers import Advance
from models.conversion.hf_reader import HFReader
from models.conversion.mxfp4 import mxfp4_names
from models.conversion.rules import ExportBlock, Rule, TensorReader
from models.hf_config import describe
from models.model_directory import open_reader

BLOCK_BYTES = 8 * 2**20
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element


@dataclass(frozen=True)
class Plain:
    """The tensors of a directory under their own names."""

    reader: TensorReader | StoreReader

    def names(self) -> list[str]:
        return self.reader.keys() if isinstance(self.reader, StoreReader) else self.reader.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.reader.shape(name))

    def dtype(self, name: str) -> torch.dtype:
        return self.reader.dtype(name)

    def blocks(self, name: str) -> Iterator[slice]:
        return row_blocks(self.shape(name), self.dtype(name), BLOCK_BYTES)

    def rows(self, name: str, rows: slice) -> Tensor:
        return self.reader.read(name, (rows,) if self.shape(name) else ())


@dataclass(frozen=True)
class Converted:
    """The model tensors of a checkpoint under their Hugging Face names; they are read by its own blocks of rows."""

    opened: Checkpoint

    @cached_property
    def _blocks_of(self) -> dict[str, dict[int, tuple[Rule, ExportBlock]]]:
        """By name and first row."""
        blocks: dict[str, dict[int, tuple[Rule, ExportBlock]]] = {}
        for rule in self.opened.description.rules:
            for block in rule.export_blocks(self.opened.store.dtype(rule.key).itemsize, BLOCK_BYTES):
                blocks.setdefault(block.name, {})[block.start] = rule, block
        return blocks

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for rule in self.opened.description.rules for name, shape in rule.files}

    def names(self) -> list[str]:
        return sorted(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        rule, _ = next(iter(self._blocks_of[name].values()))
        return self.opened.store.dtype(rule.key)

    def blocks(self, name: str) -> Iterator[slice]:
        starts = sorted(self._blocks_of[name])
        for start, stop in zip(starts, [*starts[1:], self.shape(name)[0]], strict=True):
            yield slice(start, stop)

    def rows(self, name: str, rows: slice) -> Tensor:
        rule, block = self._blocks_of[name][rows.start]
        return block.lay_out(self.opened.store.read(rule.key, block.index))


Side = Plain | Converted


@dataclass
class Difference:
    """How a tensor of one side differs from its namesake; false where it does not."""

    name: str
    form: str = ""  # shapes or dtypes that differ
    total: int = 0
    elements: int = 0  # that differ in their bits, or in value where dtypes differ
    absolute: float = 0.0  # the largest difference
    relative: float = 0.0  # the largest, to the larger magnitude of the two

    def __bool__(self) -> bool:
        return bool(self.form or self.elements)

    def __str__(self) -> str:
        values = (
            f"{self.elements:,} of {self.total:,} elements differ, by at most {self.absolute:.3g}, "
            f"relatively {self.relative:.3g}"
        )
        if self.form and not self.elements:
            values = "equal values" if self.total else ""
        return f"{self.name}: " + ", ".join(filter(None, (self.form, values)))


def open_sides(path: Path, other: Path) -> tuple[Side, Side]:
    """Open both as what they are, or a checkpoint as Hugging Face tensors where the other one holds these."""
    stores = [(one / MANIFEST).exists() or (one / METADATA).exists() for one in (path, other)]
    first, second = (_open(one, convert=not all(stores)) for one in (path, other))
    return first, second


def compare(sides: tuple[Side, Side], name: str, advance: Advance) -> Difference:
    """Compare a tensor that both sides have; `advance` gets the bytes read of the first."""
    one, two = sides
    result = Difference(name)
    shapes, dtypes = [side.shape(name) for side in sides], [side.dtype(name) for side in sides]
    if shapes[0] != shapes[1]:
        result.form = f"shapes {list(shapes[0])} and {list(shapes[1])}"
        return result
    if dtypes[0] != dtypes[1]:
        result.form = f"dtypes {dtype_name(dtypes[0])} and {dtype_name(dtypes[1])}"
    for rows in (two if isinstance(two, Converted) else one).blocks(name):
        left, right = one.rows(name, rows), two.rows(name, rows)
        _add(result, left, right)
        advance(left.nbytes)
    return result


def _add(result: Difference, left: Tensor, right: Tensor) -> None:
    result.total += left.numel()
    if left.dtype == right.dtype:
        bits = BITS[left.element_size()]
        differ = left.contiguous().view(bits) != right.contiguous().view(bits)
    else:
        differ = (left.double() != right.double()) & ~(left.isnan() & right.isnan())
    if not differ.any():
        return
    left, right = left[differ].double(), right[differ].double()
    result.elements += left.numel()
    # Equal infinities, and zeros of either sign, are no distance apart; a NaN is infinitely far from any number.
    distance = torch.where(left == right, 0.0, (left - right).abs()).nan_to_num(torch.inf, torch.inf)
    larger = torch.maximum(left.abs(), right.abs())
    relative = torch.where(distance == 0, 0.0, distance / larger).nan_to_num(torch.inf, torch.inf)
    result.absolute = max(result.absolute, distance.max().item())
    result.relative = max(result.relative, relative.max().item())


def _open(path: Path, convert: bool) -> Side:
    if (path / MANIFEST).exists():
        return Converted(open_checkpoint(path)) if convert else Plain(StoreReader(path / STATE))
    if (path / METADATA).exists():
        if convert:
            raise ValueError(f"{path} does not say which model it holds: give the step directory that it lies in")
        return Plain(StoreReader(path))
    reader = HFReader(path)
    return Plain(open_reader(path, describe(path)) if mxfp4_names(reader) else reader)
