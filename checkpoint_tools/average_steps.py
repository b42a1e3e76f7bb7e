"""Average checkpoints of a run: the mean in fp64, rounded once, piece by piece.

    python checkpoint_tools/average_steps.py --run RUN --steps 7500,15000 --output OUT [--format mcore|hf]
        [--dtype source|bf16|fp32] [--num-workers N] [--push-to-hub OWNER/NAME [--private]]
    python checkpoint_tools/average_steps.py recipe.yaml     (what its `average:` section says)

The fp32 master weights are averaged where a checkpoint has them, else the model's weights. Memory depends
neither on the number of steps nor on the size of the tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from checkpoint_tools.common import bar, manifest, run_script, total_bytes
from checkpoint_tools.publish import destination, publish
from engine.checkpointing.directory import HF, STATE, complete_or_absent, write_manifest
from engine.checkpointing.workers import worker_count
from engine.run_folder import RunFolder

if TYPE_CHECKING:
    import torch

    from engine.checkpointing.hf_export import Checkpoint


def main(
    run: Path,
    steps: str,
    output: Path,
    format: Literal["mcore", "hf"] = "mcore",
    dtype: Literal["source", "bf16", "fp32"] = "source",
    num_workers: int | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
) -> None:
    """Average checkpoints of a run.

    Args:
        run: the run's directory, with checkpoints/step_NNNNNN in it.
        steps: step numbers, separated by commas.
        output: the directory to make; it must not exist, or be empty.
        format: mcore makes a checkpoint, hf a Hugging Face directory.
        dtype: of the result; source is what the original model had.
        num_workers: processes that average; one for each processor and at most 8 unless given.
        push_to_hub: OWNER/NAME on the hub, to which the directory is then published; see `lathe publish`.
        private: with push_to_hub, only the owner may read it.
    """
    workers = worker_count(num_workers)
    paths = find_steps(run, steps)
    if push_to_hub is not None and format != "hf":
        raise ValueError(f"--push-to-hub {push_to_hub} takes a Hugging Face directory: add --format hf")
    hub = destination(push_to_hub, private)
    from checkpoint_tools.mean import Mean
    from engine.checkpointing.hf_export import Export, dtype_name, dtype_of, export, open_checkpoint
    from engine.checkpointing.store_writer import write_store

    opened = [open_checkpoint(path) for path in paths]
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
                made_of=paths,
            )
            export(job, mean, workers, bar("averaging", job.total_bytes))
        else:
            specs = [
                (rule.key, rule.shape, target, lambda rows, key=rule.key: mean(key, (rows,)))
                for rule in last.description.rules
            ]
            progress = bar("averaging", total_bytes(last.description, target))
            write_store(partial / STATE, specs, num_workers=workers, bar=progress)
            _complete_checkpoint(partial, opened, target)
    print(f"{output}: mean of {len(opened)} checkpoints ({steps}), {dtype_name(target)}")
    if hub is not None:
        publish(output, hub.repo, hub=hub)


def find_steps(run: Path, steps: str) -> list[Path]:
    """The step directories that `--steps` asks for; ValueError naming those that exist if one does not."""
    try:
        wanted = [int(step) for step in steps.split(",")]
    except ValueError:
        raise ValueError(f"--steps {steps}: give step numbers separated by commas, e.g. 100,200") from None
    if len(set(wanted)) != len(wanted):
        raise ValueError(f"--steps {steps}: a step is named twice")
    folder = RunFolder(run)
    found = folder.checkpoint_steps()
    missing = [step for step in wanted if step not in found]
    if missing:
        there = ", ".join(str(step) for step in sorted(found)) or "none"
        raise ValueError(f"{folder.checkpoints} has no step {', '.join(map(str, missing))}; steps that exist: {there}")
    return [found[step] for step in wanted]


def _check_same_model(opened: Sequence[Checkpoint]) -> None:
    first = opened[0]
    for other in opened[1:]:
        # Which covers keys and shapes, as each was checked against its description.
        if other.description != first.description:
            raise ValueError(f"{other.path} holds another model than {first.path}: their configs differ")
        if other.meta["source_dtype"] != first.meta["source_dtype"]:
            raise ValueError(f"{other.path} and {first.path} come from models of different dtypes")


def _complete_checkpoint(partial: Path, opened: Sequence[Checkpoint], dtype: torch.dtype) -> None:
    from engine.checkpointing.hf_export import dtype_name, open_checkpoint
    from engine.checkpointing.provenance import provenance_of, write_provenance
    from models.conversion.hf_reader import copy_side_files

    last = opened[-1]
    copy_side_files(last.path / HF, partial / HF, with_index=True)
    if provenance := provenance_of([one.path for one in opened]):
        write_provenance(partial / HF, provenance)
    meta = manifest(last.description, last.source_dtype, step=last.meta["step"])
    steps = [one.meta["step"] for one in opened]
    write_manifest(partial, {**meta, "precision": dtype_name(dtype), "mean_of_steps": steps})
    open_checkpoint(partial)


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:], section="average"))
