"""Average checkpoints of a run: the mean in fp64, rounded once, piece by piece.

    python checkpoint_tools/average_steps.py --run RUN --steps 7500,15000 --output OUT [--format mcore|hf]
        [--dtype source|bf16|fp32] [--num-workers N]

The fp32 master weights are averaged where a checkpoint has them, else the model's weights. Memory depends
neither on the number of steps nor on the size of the tensors.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from checkpoint_tools.common import bar, manifest, total_bytes
from checkpoint_tools.common import run as run_script
from engine.checkpointing.directory import HF, STATE, complete_or_absent, step_directories, write_manifest
from engine.checkpointing.hf_export import Checkpoint, Export, dtype_name, dtype_of, export, open_checkpoint
from engine.checkpointing.store_reader import Scratch, box_of, master_key, row_blocks
from engine.checkpointing.store_writer import Spec, write_store
from engine.checkpointing.workers import worker_count
from models.conversion.hf_reader import copy_side_files
from models.conversion.rules import Index, Rule

BLOCK_BYTES = 2 * 2**20  # of fp64 sums, which stay in a processor's cache
NARROW = {torch.float32, torch.float16, torch.bfloat16}


def main(
    run: Path,
    steps: str,
    output: Path,
    format: Literal["mcore", "hf"] = "mcore",
    dtype: Literal["source", "bf16", "fp32"] = "source",
    num_workers: int | None = None,
) -> None:
    """Average checkpoints of a run.

    Args:
        run: the run's directory, with checkpoints/step_NNNNNN in it.
        steps: step numbers, separated by commas.
        output: the directory to make; it must not exist, or be empty.
        format: mcore makes a checkpoint, hf a Hugging Face directory.
        dtype: of the result; source is what the original model had.
        num_workers: processes that average; one for each processor and at most 8 unless given.
    """
    workers = worker_count(num_workers)
    opened = [open_checkpoint(path) for path in find_steps(run, steps)]
    last = opened[-1]
    _check_same_model(opened)
    target = dtype_of(dtype, last)
    mean = Mean(opened, target)
    with complete_or_absent(output) as partial:
        if format == "hf":
            changes = {"dtype": dtype_name(target)} if target != last.source_dtype else {}
            job = Export(
                output=partial,
                description=last.description,
                dtype=target,
                side_files=last.path / HF,
                changes=changes,
            )
            export(job, mean, workers, bar("averaging", job.total_bytes))
        else:
            specs = [_spec(rule, mean) for rule in last.description.rules]
            progress = bar("averaging", total_bytes(last.description, target))
            write_store(partial / STATE, specs, num_workers=workers, bar=progress)
            _complete_checkpoint(partial, opened, target)
    print(f"{output}: mean of {len(opened)} checkpoints ({steps}), {dtype_name(target)}")


class Mean:
    """Called with (key, index): the mean of that part over all checkpoints, in fp64 and rounded once.

    Each call overwrites what the last one returned.
    """

    def __init__(self, opened: Sequence[Checkpoint], dtype: torch.dtype):
        self.dtype = dtype
        self._opened = opened
        self._scratch, self._result = (Scratch(), Scratch()), Scratch()

    def __call__(self, key: str, index: Index) -> Tensor:
        rows, *rest = box_of(self._opened[0].store.shape(key), index)
        shape = [len(rows), *map(len, rest)]
        result = self._result.empty(shape, self.dtype)
        others = [slice(side.start, side.stop) for side in rest]
        for block in row_blocks(shape, torch.float64, BLOCK_BYTES):
            result[block] = self._block(key, (slice(rows.start + block.start, rows.start + block.stop), *others))
        return result

    def _block(self, key: str, index: Index) -> Tensor:
        if self.dtype == torch.bfloat16 and len(self._opened) == 2:
            one, other = (self._read(number, key, index) for number in range(2))
            mean = mean_of_two(one, other) if {one.dtype, other.dtype} <= NARROW else None
            if mean is not None:
                return mean
        total: Tensor | None = None
        for number in range(len(self._opened)):
            part = self._read(number, key, index)
            total = part.to(torch.float64, copy=True) if total is None else total.add_(part)
        assert total is not None
        total /= len(self._opened)
        if not math.isfinite(total.sum()):  # in fp64 finite weights cannot add up to infinity
            raise ValueError(f"{key} holds values that are not finite in the checkpoints to average")
        return round_once(total, self.dtype)

    def _read(self, number: int, key: str, index: Index) -> Tensor:
        """A part of one checkpoint, which stays until the next but one is read."""
        store = self._opened[number].store
        return store.read(master_key(store, key) or key, index, self._scratch[number % 2])


def mean_of_two(one: Tensor, other: Tensor) -> Tensor | None:
    """The mean of two tensors in fp32 or less, rounded to bf16 as from fp64; None where fp32 cannot hold the sum.

    Half of a sum is rounded to fp32 at most once, so bf16 differs only where that made a tie of what was none. It
    never does for sums of two bf16 numbers (Figueroa, "When is double rounding innocuous?", SIGNUM Newsletter 30(3),
    1995: fp32 has more than twice their digits, and two).
    """
    mean = torch.add(one.float(), other.float()).mul_(0.5)
    if not math.isfinite(mean.sum()):
        return None
    result = mean.to(torch.bfloat16)
    if not one.dtype == other.dtype == torch.bfloat16:
        ties = np.flatnonzero(_ties(mean))
        exact = (one.view(-1)[ties].double() + other.view(-1)[ties]) / 2
        result.view(-1)[ties] = _round_by_odd(exact, torch.bfloat16)
    return result


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round finite fp64 values to the nearest of `dtype`, ties to even.

    torch rounds fp64 to 16 bits by way of fp32, which is twice. In bf16, whose range is that of fp32, this goes wrong
    only where the first rounding makes a tie of what was none: where the lower half of its bits is 0x8000.
    """
    if dtype.itemsize >= 4:
        return values.to(dtype)
    if dtype != torch.bfloat16:
        return _round_by_odd(values, dtype)
    rounded = values.float()
    result = rounded.to(dtype)
    ties = _ties(rounded)
    if np.count_nonzero(ties) > len(ties) // 64:  # as among means of bf16 weights, most of which are ties indeed
        ties &= rounded.view(-1).numpy() != values.view(-1).numpy()
    places = np.flatnonzero(ties)
    result.view(-1)[places] = _round_by_odd(values.view(-1)[places], dtype)
    return result


def _ties(values: Tensor) -> np.ndarray:
    """Which fp32 values, laid out flat, lie halfway between two of bf16.

    By numpy, whose comparisons and searches are several times faster than torch's on one core.
    """
    return values.view(-1).view(torch.int32).numpy() & 0xFFFF == 0x8000


def _round_by_odd(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to fp32 towards zero with the last bit set where anything was lost; the second rounding is then right.

    Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd",
    IEEE Transactions on Computers 57(4), 2008.
    """
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
    found = step_directories(folder)
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


def _spec(rule: Rule, mean: Mean) -> Spec:
    return rule.key, rule.shape, mean.dtype, lambda rows: mean(rule.key, (rows,))


def _complete_checkpoint(partial: Path, opened: Sequence[Checkpoint], dtype: torch.dtype) -> None:
    last = opened[-1]
    copy_side_files(last.path / HF, partial / HF, with_index=True)
    meta = manifest(last.description, last.source_dtype, step=last.meta["step"])
    steps = [one.meta["step"] for one in opened]
    write_manifest(partial, {**meta, "precision": dtype_name(dtype), "mean_of_steps": steps})
    open_checkpoint(partial)


if __name__ == "__main__":
    run_script(main)
