"""Loads checkpoints into a running job under any layout, and exports them from it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from data.checksums import DamagedFile
from engine.checkpointing.directory import HF, STATE, ResumePoint, sync_tree
from engine.checkpointing.hf_export import Export, open_checkpoint
from engine.checkpointing.resume_point import newest_intact
from engine.checkpointing.saver import together
from engine.checkpointing.shards import MASTER, Shard, gather_weights, state_key
from engine.checkpointing.store_reader import StoreReader, master_key
from engine.mesh import Mesh
from engine.run_folder import BEING_WRITTEN, RunFolder
from models.build import SHARDING_METADATA


def sharding_metadata(mesh: Mesh) -> dict[str, Any]:
    """What megatron-core wants to know when it describes this rank's pieces of global tensors."""
    return SHARDING_METADATA | {"dp_cp_group": mesh.groups.dp_cp}


def load(point: ResumePoint, shards: list[Shard], chunks: list) -> None:
    """Fills model and optimizer from a checkpoint saved under this or any other layout.

    Each rank reads its own boxes, each byte once; weights then reach the ranks that do not update them. ValueError
    where the checkpoint lacks something.
    """
    store = StoreReader(point.directory / STATE)
    # In the order of the files: all weights, then one state after the other.
    wanted = [(_weight_key(store, shard), shard, shard.weight) for shard in shards]
    for name in dict.fromkeys(name for shard in shards for name in shard.states):
        for shard in shards:
            if name in shard.states:
                wanted.append((_stored_key(store, name, shard.key), shard, shard.states[name]))
    missing = sorted({key for key, _, _ in wanted if key not in store})
    if missing:
        raise ValueError(
            f"{point.directory} lacks {len(missing)} tensor(s) that a run continues with, {missing[0]} among them; "
            f"start a new run from it with --model {point.directory}"
        )
    for key, shard, target in wanted:
        if store.shape(key) != shard.shape:
            raise ValueError(f"{point.directory}: {key} has shape {list(store.shape(key))}, not {list(shard.shape)}")
        try:
            store.read_into(key, shard.offsets, target)
        except DamagedFile as error:
            raise DamagedFile(f"{error}{newest_intact(point.directory)}") from None
    gather_weights(chunks)


def _weight_key(store: StoreReader, shard: Shard) -> str:
    """Where the weight itself lies; a model in fp32 takes master weights where there are any."""
    masters = shard.weight.element_size() == 4 and master_key(store, shard.key)
    return masters or shard.key


def _stored_key(store: StoreReader, name: str, key: str) -> str:
    """Where a state of the optimizer lies; master weights of a run that was fp32 are its weights."""
    if name == MASTER:
        return master_key(store, key) or key
    return state_key(name, key)


def export_hf(run: RunFolder, step: int, mesh: Mesh) -> Path:
    """Writes a checkpoint as a Hugging Face directory beside it, every rank its share; returns the directory.

    In the dtype of the base model, complete or absent. Raises CheckpointFailed on every rank where one fails.
    """
    checkpoint, target = run.checkpoint(step), run.export(step)
    opened = open_checkpoint(checkpoint)
    partial = target.with_name(target.name + BEING_WRITTEN)
    job = Export(
        output=partial,
        description=opened.description,
        dtype=opened.source_dtype,
        side_files=checkpoint / HF,
        made_of=[checkpoint],
    )

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        job.begin()

    read, share = opened.reader(opened.source_dtype), (mesh.rank, mesh.world_size)
    together(begin if mesh.rank == 0 else None, partial)
    written = together(lambda: job.write_share(read, share), partial)
    together(lambda: job.write_sums(share), partial)

    def finish() -> None:
        job.finish(written)
        sync_tree(partial)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(partial, target)

    together(finish if mesh.rank == 0 else None, partial)
    return target
