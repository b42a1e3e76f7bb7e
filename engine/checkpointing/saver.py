"""Checkpoints of a running job, written beside the training: complete or absent, `latest` last."""

from __future__ import annotations

import pickle
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata

from data.checksums import sums_of
from engine.checkpointing.directory import FP8, HF, METADATA, STATE, read_manifest, sync_tree, write_manifest
from engine.checkpointing.image import Image, pieces_of
from engine.checkpointing.image_writer import ImageWriter
from engine.checkpointing.shards import Shard
from engine.checkpointing.store_writer import write_companions
from engine.mesh import Mesh, outcomes
from engine.run_folder import BEING_WRITTEN, RunFolder

# How far a rank's part of a save is, in the order in which the furthest back of all ranks decides.
IDLE, WRITTEN, WRITING, FAILED = range(4)


class CheckpointFailed(OSError):
    """A checkpoint that could not be written; every rank knows, and nothing of it is left."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete."""

    step: int
    directory: Path
    rescue: bool  # the next one takes its place
    began: float  # of time.monotonic


@dataclass(frozen=True)
class _Save:
    """A save that has begun."""

    step: int
    manifest: dict[str, Any]
    writer: ImageWriter
    began: float


class Saver:
    """Writes checkpoints of one run; every rank has one, and calls it at the same places.

    `start` copies this rank's part of a checkpoint into the host's memory and returns; a process of its own writes it.
    `progress` says how far that is, and `finish`, called once all ranks have written or to wait for it, completes the
    directory: manifest, rename, `latest`. Without `asynchronous`, `start` finishes by itself and keeps no memory.
    """

    def __init__(self, run: RunFolder, shards: Sequence[Shard], mesh: Mesh, *, asynchronous: bool):
        self._run, self._shards, self._rank, self._asynchronous = run, shards, mesh.rank, asynchronous
        self._image = Image(pieces_of(shards), f"__{mesh.rank}_0.distcp")
        self._metadata: bytes | None = None  # on the first rank, from the first save on
        self._sizes: dict[str, int] = {}  # of the files, on the first rank of all ranks'; from the first save on
        self._save: _Save | None = None

    def start(self, step: int, manifest: dict[str, Any]) -> Saved | None:
        """Begins the checkpoint of `step`, once the one before is complete; returns what is complete then, if anything.

        CheckpointFailed on every rank where one cannot; FloatingPointError where a weight or a state is not finite.
        """
        before, began = self.finish(), time.monotonic()
        partial = self._partial(step)
        self._describe_once(partial)
        self._check_finite(step)

        def begin() -> None:
            _check_space(partial.parent, sum(self._sizes.values()))
            shutil.rmtree(partial, ignore_errors=True)
            (partial / STATE).mkdir(parents=True)

        def launch() -> None:
            self._image.fill()
            writer = ImageWriter(self._image.descriptor, self._image.size, partial / STATE / self._image.file)
            self._save = _Save(step, manifest, writer, began)

        together(begin if self._rank == 0 else None, partial)
        try:
            together(launch, partial)
        except CheckpointFailed:  # of another rank: what this one has begun ends, too
            self._give_up()
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return before if self._asynchronous else self.finish()

    def progress(self) -> int:
        """How far this rank's part of a save is; where all ranks are at least at WRITTEN, `finish` does not wait."""
        if self._save is None:
            return IDLE
        if self._save.writer.running():
            return WRITING
        return FAILED if self._save.writer.failure() else WRITTEN

    def finish(self) -> Saved | None:
        """Waits for a save that has begun and completes it on all ranks together; returns it.

        CheckpointFailed on every rank where one failed; nothing of it is left then.
        """
        if self._save is None:
            return None
        save, self._save = self._save, None
        target, partial = self._run.checkpoint(save.step), self._partial(save.step)

        def written() -> None:
            if failure := save.writer.failure():
                raise OSError(failure)

        try:
            together(written, partial)
            together((lambda: self._complete(save, partial)) if self._rank == 0 else None, partial)
        finally:
            if not self._asynchronous:
                self._image.release()
        return Saved(save.step, target, save.manifest["rescue"], save.began)

    def close(self) -> None:
        """Ends a writing process that is left, and gives the memory back."""
        self._give_up()
        self._image.release()

    def _give_up(self) -> None:
        if self._save is not None:
            self._save.writer.kill()
            self._save = None

    def _partial(self, step: int) -> Path:
        target = self._run.checkpoint(step)
        return target.with_name(target.name + BEING_WRITTEN)

    def _complete(self, save: _Save, partial: Path) -> None:
        """The first rank's: what makes the files of all ranks a checkpoint."""
        assert self._metadata is not None
        for file, size in self._sizes.items():
            path = partial / STATE / file
            found = path.stat().st_size if path.exists() and sums_of(path).exists() else None
            if found != size:
                raise OSError(
                    f"{path}, which its rank has written, {'is not seen' if found is None else f'has {found:,} bytes'} "
                    f"by rank 0: all ranks must see one {self._run.path}"
                )
        (partial / STATE / METADATA).write_bytes(self._metadata)
        write_companions(partial / STATE)
        shutil.copytree(self._run.model_files, partial / HF)
        if self._run.config.exists():
            shutil.copyfile(self._run.config, partial / self._run.config.name)
        write_manifest(partial, save.manifest | {"step": save.step})
        sync_tree(partial)
        read_manifest(partial)
        self._run.complete_checkpoint(partial, save.step)

    def _describe_once(self, partial: Path) -> None:
        """At the first save, tells the first rank what all ranks write, which never changes."""
        if self._sizes:
            return
        self._sizes = {self._image.file: self._image.size}
        own = (self._sizes, self._image.storage())
        gathered: list[Any] = [None] * distributed.get_world_size()
        distributed.gather_object(own, gathered if self._rank == 0 else None, dst=0)

        def describe() -> None:
            self._sizes = {file: size for sizes, _ in gathered for file, size in sizes.items()}
            self._metadata = pickle.dumps(_metadata([storage for _, storage in gathered]))

        together(describe if self._rank == 0 else None, partial)

    @torch.no_grad()
    def _check_finite(self, step: int) -> None:
        """FloatingPointError on every rank where a number of any is not finite."""
        tensors = [
            (key, tensor)
            for shard in self._shards
            for key, tensor in shard.tensors()
            if tensor.numel() and not key.startswith(FP8)
        ]
        extremes = [torch.stack(torch.aminmax(tensor)).float() for _, tensor in tensors]
        fine = torch.stack(extremes).isfinite().all(dim=1).tolist() if extremes else []
        bad = sorted({key for (key, _), good in zip(tensors, fine, strict=True) if not good})[:3]
        answers: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(answers, bad)
        names = sorted({key for answer in answers for key in answer})[:3]
        if names:
            raise FloatingPointError(
                f"step {step}: {', '.join(names)} hold values that are not finite; the checkpoint was not written, "
                "and earlier ones are whole"
            )


def _metadata(parts: Sequence[dict]) -> Metadata:
    """`.metadata` of what all ranks write; checks that the pieces cover every tensor."""
    tensors: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, Any] = {}
    for part in parts:
        for index, (shape, dtype, chunk, info) in part.items():
            if index in storage:
                raise ValueError(f"{index.fqn}: two ranks write {index.offset}")
            blank = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])
            tensors.setdefault(index.fqn, blank).chunks.append(chunk)
            storage[index] = info
    for key, entry in tensors.items():
        covered = sum(chunk.sizes.numel() for chunk in entry.chunks)
        if covered != entry.size.numel():
            raise ValueError(f"{key}: the ranks write {covered} of {entry.size.numel()} elements")
    return Metadata(
        state_dict_metadata=dict(tensors), planner_data={}, storage_data=storage, version=CURRENT_DCP_VERSION
    )


def _check_space(folder: Path, needed: int) -> None:
    """Refuses to start a save that cannot fit."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"no space for a checkpoint in {folder}: {needed / 2**30:.2f} GiB are needed and {free / 2**30:.2f} GiB "
            "are free"
        )


def together(work: Callable[[], Any] | None, partial: Path) -> list[Any]:
    """Runs every rank's work and returns all results; where one failed, every rank raises CheckpointFailed.

    `partial`, what was being written, is removed then.
    """
    answers = outcomes(work)
    failures = [f"rank {rank}: {failure}" for rank, (_, failure) in enumerate(answers) if failure is not None]
    if failures:
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(partial.parents[1]).free / 2**30
        target = partial.with_suffix("")
        named = (target.parent / "latest").read_text() if (target.parent / "latest").exists() else ""
        left = "could not be written and nothing of it is left"
        if target.exists() and named.strip() == target.name:
            left = "is complete, but what follows a save failed"
        raise CheckpointFailed(
            f"{target} {left}; {free:.2f} GiB are free there; "
            f"earlier checkpoints are whole, and the run resumes from the latest ({'; '.join(failures[:8])})"
        )
    return [result for result, _ in answers]
