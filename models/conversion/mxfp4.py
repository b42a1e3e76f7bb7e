"""MXFP4: 32 values of four bits and one power of two, read by slices and written where nothing is lost.

The format is the Open Compute Project's Microscaling Formats (MX) specification 1.0: a value has a sign, two bits
of exponent and one of mantissa, a scale byte stands for 2 ** (byte - 127). Files hold a tensor NAME as NAME_blocks,
uint8 [experts, rows, groups, 16] with the first of a byte's two values in its lower half, and NAME_scales, uint8
[experts, rows, groups]. A group is 32 columns of a row. Plain files hold bf16 [experts, columns, rows].
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from models.conversion.hf_writer import HFWriter
from models.conversion.rules import Index, TensorReader

BLOCKS, SCALES = "_blocks", "_scales"
GROUP = 32
CHUNK_VALUES = 2**19  # converted at a time, so that what is in between stays in a core's cache
MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # of codes 0 to 7; codes 8 to 15 are negative


def _fours() -> Tensor:
    """The four values of any two bytes, as one int64; the bytes count as one little-endian number."""
    codes = (torch.arange(2**16)[:, None] >> torch.tensor([0, 4, 8, 12])) & 15
    values = torch.cat([MAGNITUDES, -MAGNITUDES])
    return (4 * values).bfloat16()[codes].view(torch.int64)[:, 0]


# Values four times too large and powers four times too small: so even a scale of 255 has a finite power, and zeros
# stay zeros and halves finite below it, as torch.ldexp (hence transformers) has them.
FOURS = _fours()
POWERS = torch.ldexp(torch.ones(256), torch.arange(256) - 129).bfloat16()
INVERSES = torch.ldexp(torch.ones(256), 127 - torch.arange(256)).bfloat16()


def decode(blocks: Tensor, scales: Tensor) -> Tensor:
    """The bf16 values [..., columns] of blocks [..., groups, 16] and scales [..., groups].

    No value is rounded: it has two significant bits, and bf16 has them down to 2 ** -132. What overflows (scales of
    253 and more) overflows in fp32 too, whose exponents are the same. So decoding into fp32 is a copy of this.
    """
    pairs = blocks.view(torch.uint16).to(torch.int32).flatten()
    values = FOURS.index_select(0, pairs).view(torch.bfloat16).view(*scales.shape, GROUP)
    return values.mul_(POWERS[scales.int()][..., None]).flatten(-2)


def encode(values: Tensor, name: str = "the tensor") -> tuple[Tensor, Tensor]:
    """Blocks [..., groups, 16] and scales [..., groups] of values [..., columns], from which `decode` gives them back.

    The scale is the specification's: the exponent of a group's largest magnitude less 2, which is that of 6. It serves
    wherever any does: a lower one is too low for the largest magnitude, and a higher one has none of the small values
    that it lacks. It is kept to at least 2 ** -127, which is also the scale of a group of zeros. The signs of zeros
    are kept. Raises ValueError for values that would change.
    """
    if values.shape[-1] % GROUP:
        raise ValueError(f"{name} has {values.shape[-1]} columns, and MXFP4 takes them by {GROUP}: use --dtype bf16")
    groups = values.reshape(-1, GROUP)
    blocks = torch.empty(len(groups), GROUP // 2, dtype=torch.uint8)
    scales = torch.empty(len(groups), dtype=torch.uint8)
    lost, chunk = 0, CHUNK_VALUES // GROUP
    for start in range(0, len(groups), chunk):
        some = slice(start, start + chunk)
        blocks[some], scales[some] = _encode(groups[some].bfloat16())
        lost += int((decode(blocks[some, None], scales[some, None]) != groups[some]).count_nonzero())
    if lost:
        raise ValueError(
            f"{name} cannot be written in MXFP4 without loss, which would change {lost:,} of its {values.numel():,} "
            "values: use --dtype bf16"
        )
    shape = (*values.shape[:-1], values.shape[-1] // GROUP)
    return blocks.view(*shape, GROUP // 2), scales.view(shape)


def _encode(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks [groups, 16] and scales [groups] of bf16 [groups, 32]; what has no code gets some other finite value."""
    magnitudes = groups.abs().view(torch.int16)  # the bits are ordered as the magnitudes are
    scales = ((magnitudes.amax(-1) >> 7) - 2).clamp(0, 252)  # bf16's exponent has the bias that scales have
    # With the least exponents of bf16, its bits 6 to 8 are exponent and mantissa of a code, subnormals included.
    bits = (groups * INVERSES[scales.int()][:, None]).mul_(2.0**-126).view(torch.int16)
    codes = (bits >> 12).bitwise_and_(8).bitwise_or_((bits >> 6).bitwise_and_(7)).to(torch.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4, scales.to(torch.uint8)


def mxfp4_names(reader: TensorReader) -> list[str]:
    """The tensors of which a directory holds bytes named as blocks or scales."""
    bytes_ = [name for name in reader.names() if reader.dtype(name) == torch.uint8]
    return sorted({name.removesuffix(end) for end in (BLOCKS, SCALES) for name in bytes_ if name.endswith(end)})


class Mxfp4Reader:
    """A reader that shows those of `names` that files hold in MXFP4 as bf16 tensors, transposed as plain files are.

    Values are bit for bit those of transformers' convert_moe_packed_tensors. Raises ValueError where blocks or scales
    are missing or do not fit, and where files hold some or all of `names` plain.
    """

    def __init__(self, reader: TensorReader, names: Iterable[str]):
        self._reader = reader
        present = set(reader.names())
        wanted = sorted(names)
        plain = [name for name in wanted if name in present]
        self._quantized = {name for name in wanted if present & {name + BLOCKS, name + SCALES}}
        if plain and self._quantized:
            raise ValueError(
                f"the model directory holds {plain[0]} plain and {min(self._quantized)} in MXFP4: all such tensors "
                "must be held in one way"
            )
        if plain:
            raise ValueError(
                f"config.json has a quantization_config, but the model directory holds {plain[0]} plain: remove "
                "quantization_config from config.json"
            )
        for name in sorted(self._quantized):
            self._check(name, present)

    def names(self) -> list[str]:
        hidden = {name + end for name in self._quantized for end in (BLOCKS, SCALES)}
        return sorted(self._quantized.union(self._reader.names()) - hidden)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._quantized:
            return self._reader.shape(name)
        experts, rows, groups = self._reader.shape(name + SCALES)
        return experts, groups * GROUP, rows

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16 if name in self._quantized else self._reader.dtype(name)

    def read(self, name: str, index: Index = (), out: Tensor | None = None) -> Tensor:
        """A tensor or a slice of it; of MXFP4 only the slice's rows are read, and its columns to whole groups."""
        if name not in self._quantized:
            return self._reader.read(name, index, out)
        shape = self.shape(name)
        wanted = [range(size)[part] for size, part in zip(shape, index, strict=False)]
        experts, columns, rows = wanted + [range(size) for size in shape[len(index) :]]
        if out is None:
            out = torch.empty(len(experts), len(columns), len(rows), dtype=torch.bfloat16)
        if not out.numel():
            return out
        first, last = columns[0] // GROUP, columns[-1] // GROUP
        cut = slice(columns[0] - first * GROUP, columns[-1] - first * GROUP + 1, columns.step)
        box = (slice(rows[0], rows[-1] + 1, rows.step), slice(first, last + 1))
        chunk = max(1, CHUNK_VALUES // ((last + 1 - first) * GROUP))
        for matrix, expert in zip(out, experts, strict=True):
            where = (slice(expert, expert + 1), *box)
            blocks, scales = (self._reader.read(name + end, where)[0] for end in (BLOCKS, SCALES))
            for start in range(0, len(rows), chunk):
                some = slice(start, start + chunk)
                matrix[:, some] = decode(blocks[some], scales[some])[:, cut].mT
        return out

    def _check(self, name: str, present: set[str]) -> None:
        blocks, scales = name + BLOCKS, name + SCALES
        for one, other in ((blocks, scales), (scales, blocks)):
            if one not in present:
                raise ValueError(f"the model directory holds {other} without {one}")
            if (dtype := self._reader.dtype(one)) != torch.uint8:
                raise ValueError(f"{one} has dtype {dtype}, and MXFP4 is held in bytes (U8)")
        shape, scale_shape = self._reader.shape(blocks), self._reader.shape(scales)
        if len(scale_shape) != 3 or shape != (*scale_shape, GROUP // 2):
            raise ValueError(
                f"{blocks} {list(shape)} and {scales} {list(scale_shape)} are not [experts, rows, groups, "
                f"{GROUP // 2}] and [experts, rows, groups]"
            )


Plan = dict[str, tuple[Sequence[int], torch.dtype]]


def mxfp4_plan(plan: Mapping[str, tuple[Sequence[int], torch.dtype]], names: Iterable[str]) -> Plan:
    """An export's plan {name: (shape, dtype)} with blocks and scales in place of each of `names`."""
    quantized, result = set(names), Plan()
    for name, (shape, dtype) in plan.items():
        if name not in quantized:
            result[name] = (shape, dtype)
            continue
        experts, columns, rows = shape
        groups = columns // GROUP
        result[name + BLOCKS] = ((experts, rows, groups, GROUP // 2), torch.uint8)
        result[name + SCALES] = ((experts, rows, groups), torch.uint8)
    return result


class Mxfp4Writer:
    """Writes those of `names` in MXFP4, where that loses nothing, and the rest as it comes."""

    def __init__(self, writer: HFWriter, names: Iterable[str]):
        self._writer = writer
        self._quantized = frozenset(names)

    def write(self, name: str, tensor: Tensor, start: int = 0) -> None:
        """Write a whole tensor, or some of its experts [experts, columns, rows] from expert `start` on."""
        if name not in self._quantized:
            self._writer.write(name, tensor, start)
            return
        blocks, scales = encode(tensor.mT, name)
        self._writer.write(name + BLOCKS, blocks, start)
        self._writer.write(name + SCALES, scales, start)
