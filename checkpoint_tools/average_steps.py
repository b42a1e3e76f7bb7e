"""Average checkpoints of a run: the mean in fp64, rounded once, piece by piece.

    python checkpoint_tools/average_steps.py --run RUN --steps 7500,15000 --output OUT [--format mcore|hf]
        [--dtype source|bf16|fp32]

The fp32 master weights are averaged where a checkpoint has them, else the model's weights. Memory depends
neither on the number of steps nor on the size of the tensors.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from checkpoint_tools.common import Checkpoint, dtype_name, dtype_of, open_checkpoint, progress
from checkpoint_tools.common import run as run_script
from checkpoint_tools.hf_to_mcore import manifest
from checkpoint_tools.mcore_to_hf import change_config, export
from engine.checkpoint_format import HF, STATE, complete_or_absent, write_manifest
from engine.tensor_store import master_key, row_blocks, write_store
from models.hf_io import copy_side_files
from models.rules import Index

PIECE_BYTES = 32 * 2**20  # of the result, as it is written
BLOCK_BYTES = 2 * 2**20  # of fp64 sums, which stay in a processor's cache


def main(
    run: Path,
    steps: str,
    output: Path,
    format: Literal["mcore", "hf"] = "mcore",
    dtype: Literal["source", "bf16", "fp32"] = "source",
) -> None:
    """Average checkpoints of a run.

    Args:
        run: the run's directory, with checkpoints/step_NNNNNN in it.
        steps: step numbers, separated by commas.
        output: the directory to make; it must not exist, or be empty.
        format: mcore makes a checkpoint, hf a Hugging Face directory.
        dtype: of the result; source is what the original model had.
    """
    opened = [open_checkpoint(path) for path in find_steps(run, steps)]
    last = opened[-1]
    _check_same_model(opened)
    target = dtype_of(dtype, last.meta)
    with complete_or_absent(output) as partial:
        if format == "hf":
            export(partial, last.description, Mean(opened, target), target, last.path / HF, PIECE_BYTES)
            if target != dtype_of("source", last.meta):
                change_config(partial, {"dtype": dtype_name(target)})
        else:
            _write_checkpoint(partial, opened, target)
    print(f"{output}: mean of {len(opened)} checkpoints ({steps}), {dtype_name(target)}")


class Mean:
    """Called with (key, index): the mean of that part over all checkpoints, in fp64 and rounded once."""

    def __init__(self, opened: Sequence[Checkpoint], dtype: torch.dtype):
        self._opened, self._dtype = opened, dtype

    def __call__(self, key: str, index: Index) -> Tensor:
        sizes = self._opened[0].store.shape(key)
        whole = tuple(slice(0, size) for size in sizes)
        rows, *rest = (slice(*part.indices(n)) for part, n in zip(index + whole[len(index) :], sizes, strict=True))
        shape = [part.stop - part.start for part in (rows, *rest)]
        result = torch.empty(shape, dtype=self._dtype)
        for block in row_blocks(shape, torch.float64, BLOCK_BYTES):
            result[block] = self._block(key, (slice(rows.start + block.start, rows.start + block.stop), *rest))
        return result

    def _block(self, key: str, index: Index) -> Tensor:
        total: Tensor | None = None
        for one in self._opened:
            part = one.store.read(master_key(one.store, key) or key, index)
            total = part.double() if total is None else total.add_(part)
        assert total is not None
        total /= len(self._opened)
        if not math.isfinite(total.sum()):  # in fp64 finite weights cannot add up to infinity
            raise ValueError(f"{key} holds values that are not finite in the checkpoints to average")
        return round_once(total, self._dtype)


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round finite fp64 values to the nearest of `dtype`, ties to even.

    torch rounds fp64 to 16 bits by way of fp32, which is twice. Here the first rounding is to odd: towards
    zero with the last bit set where anything was lost, after which the second rounds correctly (Boldo and
    Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd",
    IEEE Transactions on Computers 57(4), 2008).
    """
    if dtype.itemsize >= 4:
        return values.to(dtype)
    rounded = values.float()
    back = rounded.double()
    bits = rounded.view(torch.int32)
    bits -= (back.abs() > values.abs()).view(torch.int8)
    bits |= back != values
    return rounded.to(dtype)


def find_steps(run: Path, steps: str) -> list[Path]:
    """The step directories that `--steps` asks for; ValueError naming those that exist if one does not."""
    try:
        wanted = [int(step) for step in steps.split(",")]
    except ValueError:
        raise ValueError(f"--steps {steps}: give step numbers separated by commas, e.g. 100,200") from None
    if len(set(wanted)) != len(wanted):
        raise ValueError(f"--steps {steps}: a step is named twice")
    folder = run / "checkpoints"
    found = {
        int(match.group(1)): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(r"step_(\d{6,})", path.name))
    }
    missing = [step for step in wanted if step not in found]
    if missing:
        there = ", ".join(str(step) for step in sorted(found)) or "none"
        raise ValueError(f"{folder} has no step {', '.join(map(str, missing))}; steps that exist: {there}")
    return [found[step] for step in wanted]


def _check_same_model(opened: Sequence[Checkpoint]) -> None:
    first = opened[0]
    for other in opened[1:]:
        # Which covers keys and shapes, as each was checked against its description.
        if other.description != first.description:
            raise ValueError(f"{other.path} holds another model than {first.path}: their configs differ")
        if other.meta["source_dtype"] != first.meta["source_dtype"]:
            raise ValueError(f"{other.path} and {first.path} come from models of different dtypes")


def _write_checkpoint(partial: Path, opened: Sequence[Checkpoint], dtype: torch.dtype) -> None:
    last = opened[-1]
    mean = Mean(opened, dtype)
    total = sum(torch.Size(rule.shape).numel() * dtype.itemsize for rule in last.description.rules)
    with progress("averaging", total) as advance:

        def spec(rule):
            def produce(rows: slice) -> Tensor:
                tensor = mean(rule.key, (rows,))
                advance(tensor.nbytes)
                return tensor

            return rule.key, rule.shape, dtype, produce

        write_store(partial / STATE, map(spec, last.description.rules), PIECE_BYTES)
    copy_side_files(last.path / HF, partial / HF, with_index=True)
    meta = manifest(last.description, dtype_of("source", last.meta), step=last.meta["step"])
    steps = [one.meta["step"] for one in opened]
    write_manifest(partial, {**meta, "precision": dtype_name(dtype), "mean_of_steps": steps})
    open_checkpoint(partial)


if __name__ == "__main__":
    run_script(main)
