"""Parameter rules: how each global megatron tensor is made of Hugging Face tensors, and the way back.

A family writes one table of `Entry` rows. `expand` turns it into one `Rule` per global megatron tensor.
A rule is a list of row blocks, so any slice of the megatron tensor can be gathered from a Hugging Face
directory without reading more than that slice, and the same blocks read backwards make the export.
"""

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

Dims = Mapping[str, int]


class TensorReader(Protocol):
    """What a rule needs of a directory of tensors; `models.hf_io.HFReader` is one."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Segment:
    """Rows `start:stop` of the Hugging Face tensor `name`."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Rule:
    """One global megatron tensor: its segments one below the other, then zero rows up to `shape[0]`."""

    key: str
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the Hugging Face tensors that this rule takes up, in the table's order."""
        rows: dict[str, int] = {}
        for segment in self.segments:
            rows[segment.name] = max(rows.get(segment.name, 0), segment.stop)
        return {name: (count, *self.shape[1:]) for name, count in rows.items()}

    def dtype(self, reader: TensorReader) -> torch.dtype:
        """The dtype of the megatron tensor; ValueError where its parts disagree."""
        dtypes = {name: reader.dtype(name) for name in self.hf_shapes()}
        if len(set(dtypes.values())) > 1:
            raise ValueError(f"tensors that form {self.key} have different dtypes: {dtypes}")
        return next(iter(dtypes.values()))

    def read(self, reader: TensorReader, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        """Gather `[rows, columns]` of the global megatron tensor, reading that much and no more."""
        first, last, _ = (rows or slice(None)).indices(self.shape[0])
        parts: list[Tensor] = []
        offset = 0
        for segment in self.segments:
            lower = max(first, offset)
            upper = min(last, offset + segment.stop - segment.start)
            if lower < upper:
                shift = segment.start - offset
                parts.append(reader.read(segment.name, slice(lower + shift, upper + shift), columns))
            offset += segment.stop - segment.start
        missing = last - max(first, offset)
        if missing > 0 or not parts:
            tail = [len(range(*(columns or slice(None)).indices(n))) for n in self.shape[1:2]]
            parts.append(torch.zeros(max(missing, 0), *tail, *self.shape[2:], dtype=self.dtype(reader)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def split(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield `(Hugging Face name, tensor)` from the whole megatron tensor; padding rows are left out.

        A part that lies in one block is a view of `tensor`, so that nothing is copied for it.
        """
        if tuple(tensor.shape) != self.shape:
            raise ValueError(f"{self.key} has shape {list(tensor.shape)}, expected {list(self.shape)}")
        blocks: dict[str, list[tuple[int, Tensor]]] = {}
        offset = 0
        for segment in self.segments:
            length = segment.stop - segment.start
            blocks.setdefault(segment.name, []).append((segment.start, tensor[offset : offset + length]))
            offset += length
        for name, found in blocks.items():
            ordered = [block for _, block in sorted(found, key=lambda item: item[0])]
            yield name, ordered[0] if len(ordered) == 1 else torch.cat(ordered)


# A kind lays the rows of some tensors, given as {name: rows}, out as segments of one megatron tensor.
Kind = Callable[[Mapping[str, int], Dims], tuple[Segment, ...]]


def stacked(rows: Mapping[str, int], dims: Dims) -> tuple[Segment, ...]:
    """Whole tensors one below the other: a plain copy where there is one, gate above up where two."""
    return tuple(Segment(name, 0, count) for name, count in rows.items())


def by_group(rows: Mapping[str, int], dims: Dims) -> tuple[Segment, ...]:
    """For each query group its share of every tensor: the group's q heads, then its k, then its v."""
    groups = dims["groups"]
    share = {name: count // groups for name, count in rows.items()}
    return tuple(Segment(n, g * share[n], (g + 1) * share[n]) for g in range(groups) for n in rows)


@dataclass(frozen=True)
class Entry:
    """One row of a family's table.

    `key` is a megatron key and may contain `{i}`, the layer. `tensors` maps Hugging Face names to their
    shapes in the words of `Dims`, e.g. `"ffn hidden"`. `rows` names the megatron tensor's rows where
    these are more than the sum of the parts. `only` names a condition of the model, e.g. `"untied"`.
    """

    key: str
    kind: Kind
    tensors: Mapping[str, str]
    rows: str | None = None
    only: str | None = None

    def rule(self, dims: Dims, layer: int | None) -> Rule:
        names = [name.replace("{i}", str(layer)) for name in self.tensors]
        shapes = [tuple(dims[word] for word in words.split()) for words in self.tensors.values()]
        heights = {name: shape[0] for name, shape in zip(names, shapes, strict=True)}
        total = dims[self.rows] if self.rows else sum(heights.values())
        key = self.key.replace("{i}", str(layer))
        return Rule(key, (total, *shapes[0][1:]), self.kind(heights, dims))


@dataclass(frozen=True, kw_only=True)
class Family:
    """All that is particular to one model family; every file in `models/families/` makes one."""

    name: str  # transformers' model_type
    architecture: str  # the class named in config.json
    table: tuple[Entry, ...]
    fields: Mapping[str, str]  # megatron TransformerConfig field -> config.json field
    constants: Mapping[str, Any]  # megatron TransformerConfig field -> value
    requires: Mapping[str, Any]  # config.json field -> the only value that is understood
    harmless: tuple[str, ...] = ()  # config.json fields that never change the mathematics
    buffers: tuple[str, ...] = ()  # patterns of tensors in old files that are computed, not learned
    tied_copy: tuple[str, str] | None = None  # (copy, original): a tied model's files may hold both


def expand(table: Iterable[Entry], dims: Dims, num_layers: int, conditions: set[str]) -> tuple[Rule, ...]:
    """One rule per global megatron tensor, layer by layer."""
    rules: list[Rule] = []
    wanted = [entry for entry in table if entry.only is None or entry.only in conditions]
    for layered, run in groupby(wanted, key=lambda entry: "{i}" in entry.key):
        entries = list(run)
        for layer in range(num_layers) if layered else (None,):
            rules.extend(entry.rule(dims, layer) for entry in entries)
    return tuple(rules)


def check_tensors(rules: Iterable[Rule], reader: TensorReader, family: Family, tied: bool) -> tuple[str, ...]:
    """Check that every tensor of a directory belongs to one rule, and every rule finds its tensors.

    Returns the names that are rightly left out: computed buffers, and a tied model's second copy of its
    embeddings. Raises ValueError naming missing, extra or misshapen tensors and how many there are.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for rule in rules:
        for name, shape in rule.hf_shapes().items():
            assert name not in expected, f"two rules take {name}"
            expected[name] = shape
    present = set(reader.names())
    extra = present - expected.keys()
    left_out = {n for n in extra if any(fnmatch.fnmatchcase(n, pattern) for pattern in family.buffers)}
    if tied and family.tied_copy and family.tied_copy[0] in extra and family.tied_copy[1] in present:
        _check_tied_copy(reader, *family.tied_copy)
        left_out.add(family.tied_copy[0])
    _refuse("lacks", sorted(expected.keys() - present), family)
    _refuse("has", sorted(extra - left_out), family)
    wrong = [
        f"{name} {list(reader.shape(name))} instead of {list(shape)}"
        for name, shape in expected.items()
        if tuple(reader.shape(name)) != shape
    ]
    _refuse("has misshapen", wrong, family)
    return tuple(sorted(left_out))


def _refuse(verb: str, names: list[str], family: Family) -> None:
    if names:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        tail = f" that no rule of {family.name} matches" if verb == "has" else ""
        raise ValueError(f"the model directory {verb} {len(names)} tensor(s){tail}: {shown}")


def _check_tied_copy(reader: TensorReader, copy: str, original: str, block_rows: int = 8192) -> None:
    """A tied model whose files hold both tensors must hold them equal: one of them would be lost."""
    same = reader.shape(copy) == reader.shape(original) and reader.dtype(copy) == reader.dtype(original)
    for start in range(0, reader.shape(copy)[0] if same else 0, block_rows):
        rows = slice(start, start + block_rows)
        same = same and torch.equal(reader.read(copy, rows), reader.read(original, rows))
    if not same:
        raise ValueError(
            f"config.json says tie_word_embeddings, but {copy} differs from {original}: "
            "set tie_word_embeddings to false or remove the tensor"
        )
