"""Checkpoints of a running job: complete or absent, self-contained, loadable under any other layout."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from torch import distributed
from torch.distributed.checkpoint.api import CheckpointException

from engine.checkpointing.directory import (
    HF,
    STATE,
    ResumePoint,
    read_manifest,
    sync_directory,
    sync_tree,
    write_manifest,
)
from engine.checkpointing.hf_export import Export, open_checkpoint
from engine.mesh import Mesh
from engine.run_folder import BEING_WRITTEN, RunFolder, replace_text
from models.build import SHARDING_METADATA


class CheckpointFailed(OSError):
    """A checkpoint that could not be written; every rank knows, and nothing of it is left."""


def sharding_metadata(mesh: Mesh) -> dict[str, Any]:
    """What megatron-core wants to know when it describes this rank's pieces of global tensors."""
    # Optimizer state passes through gloo to the first data-parallel rank: 12 bytes a parameter there alone.
    return SHARDING_METADATA | {
        "dp_cp_group": mesh.groups.dp_cp,
        "distrib_optim_fully_reshardable_mem_efficient": True,
    }


def _model_state(chunks: list, metadata: dict) -> dict[str, Any]:
    """Describes the weights of every chunk; a backend's private `_extra_state` stays out of the contract."""
    state = {}
    for number, chunk in enumerate(chunks):
        entries = chunk.module.sharded_state_dict(metadata=metadata)
        kept = {key: entry for key, entry in entries.items() if not key.endswith("_extra_state")}
        state[f"model{number}"] = kept
    return state


def save(
    run: RunFolder,
    step: int,
    chunks: list,
    optimizer: Any,
    mesh: Mesh,
    *,
    model_files: Path,
    manifest: dict[str, Any],
    keep: int = 0,
) -> Path:
    """Writes the checkpoint of `step` on all ranks together and returns its directory.

    It is written beside, verified, then renamed; `latest` moves last, and only then older checkpoints
    beyond `keep` go. `model_files` is copied to `hf/`. A rank that cannot write raises OSError: the other
    ranks are inside collectives then, so the caller must end the process.
    """
    target = run.checkpoint(step)
    partial = target.with_name(target.name + BEING_WRITTEN)
    logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.ERROR)
    try:
        if mesh.rank == 0:
            _check_space(target.parent, chunks, mesh)
            shutil.rmtree(partial, ignore_errors=True)
            (partial / STATE).mkdir(parents=True)
        distributed.barrier()
        metadata = sharding_metadata(mesh)
        state = _model_state(chunks, metadata)
        state["optimizer"] = optimizer.sharded_state_dict(state, metadata=metadata)
        _write_state(state, partial / STATE)
        if mesh.rank == 0:
            shutil.copytree(model_files, partial / HF)
            write_manifest(partial, manifest | {"step": step})
            sync_tree(partial)
            read_manifest(partial)
            shutil.rmtree(target, ignore_errors=True)  # the same step of a run that did not resume
            os.rename(partial, target)
            point_latest(run, target)
            run.remove_checkpoints(keep)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    distributed.barrier()
    return target


def _write_state(state: dict[str, Any], folder: Path) -> None:
    """megatron-core's writer; a failure of any rank's writing process reaches all ranks."""
    try:
        dist_checkpointing.save(state, str(folder))
    except CheckpointException as error:
        failures = ", ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
        free = shutil.disk_usage(folder.parent.parent).free / 2**30
        raise CheckpointFailed(
            f"{folder.parent.with_suffix('')} could not be written and nothing of it is left; {free:.2f} GiB are free "
            f"there; earlier checkpoints are whole, and the run resumes from the latest ({failures})"
        ) from None


def point_latest(run: RunFolder, target: Path) -> None:
    """Moves `latest` to a checkpoint in one step."""
    replace_text(run.latest, target.name + "\n")
    sync_directory(run.checkpoints)


def _check_space(folder: Path, chunks: list, mesh: Mesh) -> None:
    """Refuses to start a save that cannot fit: other ranks would wait for one that ran out of space."""
    folder.mkdir(parents=True, exist_ok=True)
    layout, needed = mesh.layout, 0
    for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
        # Experts are those that are not reduced over all data-parallel ranks.
        ranks = layout.tp if getattr(parameter, "allreduce", True) else layout.ep * layout.etp
        needed += parameter.numel() * (parameter.element_size() + 12) * ranks * layout.pp
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"no space for a checkpoint in {folder}: about {needed / 2**30:.2f} GiB are needed and "
            f"{free / 2**30:.2f} GiB are free; earlier checkpoints are whole, and the run resumes from the latest"
        )


def export_hf(run: RunFolder, step: int, mesh: Mesh) -> Path:
    """Writes a checkpoint as a Hugging Face directory beside it, every rank its share; returns the directory.

    In the dtype of the base model, complete or absent. Raises CheckpointFailed on every rank where one fails.
    """
    checkpoint, target = run.checkpoint(step), run.export(step)
    opened = open_checkpoint(checkpoint)
    partial = target.with_name(target.name + BEING_WRITTEN)
    job = Export(output=partial, description=opened.description, dtype=opened.source_dtype, side_files=checkpoint / HF)

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        job.begin()

    read, share = opened.reader(opened.source_dtype), (mesh.rank, mesh.world_size)
    _together(begin if mesh.rank == 0 else None, partial)
    written = _together(lambda: job.write_share(read, share, copy=opened.locator(opened.source_dtype)), partial)

    def finish() -> None:
        job.finish(written)
        sync_tree(partial)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(partial, target)

    _together(finish if mesh.rank == 0 else None, partial)
    return target


def _together(work: Callable[[], Any] | None, partial: Path) -> list[Any]:
    """Runs every rank's work and returns all results; where one failed, every rank raises."""
    result, failure = None, None
    try:
        result = work() if work else None
    except (OSError, ValueError) as error:
        failure = str(error)
    answers: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(answers, (result, failure))
    failures = [f"rank {rank}: {failure}" for rank, (_, failure) in enumerate(answers) if failure]
    if failures:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointFailed(f"{partial.with_suffix('')} could not be written ({'; '.join(failures)})")
    return [result for result, _ in answers]


def load(point: ResumePoint, chunks: list, optimizer: Any, mesh: Mesh) -> None:
    """Fills model and optimizer from a checkpoint saved under this or any other layout."""
    metadata = sharding_metadata(mesh)
    state = _model_state(chunks, metadata)
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=True, metadata=metadata)
    state = dist_checkpointing.load(state, str(point.directory / STATE))
    for number, chunk in enumerate(chunks):
        missing, unexpected = chunk.module.load_state_dict(state[f"model{number}"], strict=False)
        strange = [key for key in (*missing, *unexpected) if not key.endswith("_extra_state")]
        assert not strange, f"checkpoint and model disagree on {strange}"
    optimizer.load_state_dict(state["optimizer"])
