"""A rank's state in a run, one step of it, and its checkpoint."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

from data.loader import Loader, Microbatch
from data.order import GlobalOrder
from engine.base_model import weight_reader
from engine.checkpointing import checkpoint
from engine.checkpointing.delayed_scales import DelayedScales
from engine.checkpointing.saver import Saved, Saver
from engine.checkpointing.shards import gather_weights, own_shards
from engine.costs import Stopwatch, peak_memory
from engine.first_weights import fill_weights
from engine.guards.skips import SkippedStep, skipped_until
from engine.guards.watchdog import HELD_OUT, Watchdog
from engine.mesh import Mesh, gather_samples
from engine.optim import Update, build_optimizer, set_steps_taken, steps_taken, update
from engine.prepare import Prepared
from engine.retention import retain
from engine.schedule import learning_rate
from engine.signals import StopRequest, largest, shielded
from engine.step import (
    RouterStatistics,
    StepTotals,
    run_microbatches,
    take_router_statistics,
    wrap_chunks,
)
from models.backend import activate_flash_attention_3, attention_kernel, parameter_dtype
from models.build import build_chunks
from models.layers.router import set_routers


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did, the same on every rank but for the time."""

    step: int  # counted from 1
    totals: StepTotals
    grad_norm: float  # before clipping
    lr: float
    seconds: float
    routers: RouterStatistics | None  # of models with experts
    skipped: SkippedStep | None = None  # where the update was not made


@dataclass(frozen=True, kw_only=True)
class HeldOutLosses:
    """Held-out losses per supervised token; None where there is no such token."""

    loss: float | None  # over all sets
    losses: dict[str, float | None]  # of each set
    source_losses: dict[str, float | None]  # of sets with several sources, as "set/source"


class Trainer:
    """A run on this rank, ready to step: model, optimizer, data and where the run stands."""

    def __init__(self, prepared: Prepared, mesh: Mesh):
        config, description = prepared.config, prepared.description
        self.prepared, self.config, self.mesh = prepared, config, mesh
        self.loader = self._make_loader(prepared.order)
        self.sources = told_apart(self.loader)
        self.valid_loaders = {name: self._make_loader(order) for name, order in prepared.valid_orders.items()}
        self.kernel = attention_kernel(prepared.backend, mesh.device, parameter_dtype(config.precision), description)
        if self.kernel == "varlen" and activate_flash_attention_3(config.deterministic) and mesh.is_logger:
            print("attention: FlashAttention 3, which is installed")
        chunks = build_chunks(description, prepared.transformer, backend=prepared.backend, groups=mesh.groups)
        set_routers(chunks, aux_loss=config.moe.aux_loss, frozen=config.moe.freeze_router)
        self.chunks = wrap_chunks(
            chunks,
            mesh,
            overlap=config.overlap,
            bucket_size=config.bucket_size,
            gradients=config.optim.gradients,
        )
        self.optimizer = build_optimizer(config.optim, self.chunks, mesh, bf16=config.precision != "fp32")
        shards = own_shards(self.chunks, self.optimizer, checkpoint.sharding_metadata(mesh))
        self.scales = DelayedScales(chunks, mesh)
        asynchronous = config.checkpoint.asynchronous == "on"
        self.saver = Saver(prepared.run, [*shards, *self.scales.shards()], mesh, asynchronous=asynchronous)
        self.step = 0
        if prepared.resume is None:
            fill_weights(shards, self.chunks, weight_reader(prepared.base_model))
        else:
            manifest = prepared.resume.manifest
            checkpoint.load(prepared.resume, shards, self.chunks)
            anew = self.scales.load(prepared.resume.directory)
            if anew and mesh.is_first_of_stage:
                print(f"fp8: delayed scales of {anew} modules start anew, the checkpoint has none", file=sys.stderr)
            self.loader.load_state_dict(manifest["data"])
            self.step = prepared.resume.step
            set_steps_taken(self.optimizer, manifest.get("optimizer_step", self.step))
        self.total_steps = prepared.total_steps
        self.data_state = self.loader.state_dict()  # after the last good step, also when the next one fails
        self.saved_step = self.step
        self.saved_at = time.monotonic()
        self.save_seconds: float | None = None  # of the longest save, from its begin to all that follows it
        self.waiting, self.saving = Stopwatch(), Stopwatch()
        self.skipped = skipped_until(prepared.run.skipped, self.step, most=config.guard.max_skips)

    def _make_loader(self, order: GlobalOrder) -> Loader:
        config, mesh = self.config, self.mesh
        return Loader(
            order,
            micro_batch_size=config.micro_batch_size,
            dp_rank=mesh.dp_rank,
            dp_size=mesh.dp_size,
            microbatch_multiple=config.pp if config.vpp > 1 else 1,
        )

    def train_step(self) -> StepResult:
        """One step. FloatingPointError, naming the samples, before an update that would not be finite."""
        started = time.perf_counter()
        with self.waiting:
            microbatches = self.loader.next_step()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        sources = len(self.sources)
        totals = run_microbatches(self.chunks, microbatches, self.mesh, kernel=self.kernel, sources=sources)
        step = self.step + 1
        lr = learning_rate(self.config.optim, step, self.total_steps)
        done = Update(math.nan, applied=False)
        if math.isfinite(totals.loss_sum):
            done = update(self.optimizer, lr=lr, clip_grad=self.config.optim.clip_grad)
        skipped = None if done.applied else self._skip(step, totals, done.grad_norm, microbatches)
        routers = take_router_statistics(self.chunks, self.mesh)
        self.step, self.data_state = step, self.loader.state_dict()
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        return StepResult(
            step=step,
            totals=totals,
            grad_norm=done.grad_norm,
            lr=lr,
            seconds=seconds,
            routers=routers,
            skipped=skipped,
        )

    def costs(self) -> tuple[int, int, int, int]:
        """What this rank spent since the last call, for `largest` and then `engine.costs.cost_fields`."""
        return self.waiting.take(), self.saving.take(), *peak_memory(self.mesh.device)

    def _skip(self, step: int, totals: StepTotals, grad_norm: float, microbatches: list[Microbatch]) -> SkippedStep:
        """A step whose update was not made, as it is written down; FloatingPointError unless it may be skipped.

        Loss and norm are sums over all ranks, so all ranks are here.
        """
        documents = gather_samples({sample for batch in microbatches for sample in batch.sample_ids})
        if math.isfinite(totals.loss_sum):
            wrong, samples, whose = f"the gradient's norm is {grad_norm}", documents, "samples of the step"
        else:
            wrong, samples, whose = "the loss is not finite", totals.bad_samples, "samples"
        if self.config.on_bad_step == "stop" or not self.skipped.may_skip(step):
            raise FloatingPointError(
                f"step {step}: {wrong}, the update was not made; {whose}: {self._names(samples)}"
                f"{self.skipped.account()}"
            )
        self.skipped.steps.append(step)
        return SkippedStep(
            step=step,
            reason=wrong,
            suspects=self._places(totals.bad_samples),
            documents=self._places(documents),
        )

    def _places(self, samples: tuple[tuple[int, int], ...]) -> tuple[str, ...]:
        """Where samples lie, as DATA:document."""
        indexes = self.prepared.order.indexes
        return tuple(indexes[dataset].place(document) for dataset, document in samples)

    def _names(self, samples: tuple[tuple[int, int], ...]) -> str:
        """Where at most twenty samples lie, as DATA:document."""
        names = self._places(samples[:20])
        return ", ".join(names) + (f" and {len(samples) - 20} more" if len(samples) > 20 else "")

    def held_out_losses(self, watchdog: Watchdog, stop: StopRequest, *, starting: bool = False) -> HeldOutLosses | None:
        """Measures every set of --valid in order; no weight and no place in the training data changes.

        None, on every rank, where any was told to stop before the last batch. starting: the time limit does not count.
        """
        losses, source_losses, whole = {}, {}, np.zeros(2)
        if self.chunks[0].ddp_config.overlap_param_gather:  # else forward passes start gathers that may never meet
            gather_weights(self.chunks)
        for chunk in self.chunks:
            chunk.eval()
        for name, loader in self.valid_loaders.items():
            sources = told_apart(loader)
            with self.scales.untouched():
                sums = self._held_out_sums(loader, len(sources), watchdog, stop, starting)
            if sums is None:
                break
            whole += sums[0]
            losses[name] = mean_loss(*sums[0])
            for source, pair in zip(sources, sums[1:], strict=True):
                source_losses[f"{name}/{source}"] = mean_loss(*pair)
        for chunk in self.chunks:
            chunk.train()
        if len(losses) < len(self.valid_loaders):
            return None
        return HeldOutLosses(loss=mean_loss(*whole), losses=losses, source_losses=source_losses)

    @torch.no_grad()
    def _held_out_sums(
        self, loader: Loader, sources: int, watchdog: Watchdog, stop: StopRequest, starting: bool
    ) -> np.ndarray | None:
        """Sums of token losses and supervised tokens [1 + sources, 2]: of a whole set, and of each source."""
        batches = loader.steps_in_epoch(0)
        if self.config.valid_batches:
            batches = min(batches, self.config.valid_batches)
        sums = np.zeros((1 + sources, 2))
        for number in range(batches):
            watchdog.enter(HELD_OUT, self.step)
            if any(largest(stop.signal if starting else stop.number())):
                return None
            totals = run_microbatches(
                self.chunks,
                loader.step(0, number),
                self.mesh,
                kernel=self.kernel,
                forward_only=True,
                sources=sources,
            )
            sums[:, 0] += [totals.loss_sum, *totals.source_losses]
            sums[:, 1] += [totals.supervised, *totals.source_tokens]
        return sums

    def start_save(self, *, rescue: bool = False) -> None:
        """Begins the checkpoint of the last step; `rescue` marks one that the next replaces.

        FloatingPointError where a weight is not finite, CheckpointFailed where this save or the one before failed.
        """
        description = self.prepared.description
        manifest = {
            "family": description.family,
            "source_dtype": self.prepared.base_model.dtype,
            "vocab_size": description.vocab_size,
            "padded_vocab_size": description.padded_vocab_size,
            "tied": description.tied,
            "precision": self.config.precision,
            "freeze_router": self.config.moe.freeze_router,
            "pad_documents_to": self.prepared.pad_multiple,
            "optimizer_step": steps_taken(self.optimizer),
            "rescue": rescue,
            "data": self.data_state,
        }
        self.scales.note()
        self.saved_step, self.saved_at = self.step, time.monotonic()
        with shielded(), self.saving:
            self._completed(self.saver.start(self.step, manifest))

    def finish_save(self) -> None:
        """Waits for the checkpoint that has begun, if there is one, and completes it; every rank calls it."""
        with shielded(), self.saving:
            self._completed(self.saver.finish())

    def _completed(self, saved: Saved | None) -> None:
        """What follows a checkpoint that is complete: its export, and the end of those that are not kept."""
        if saved is None:
            return
        run, keep = self.prepared.run, self.config.checkpoint
        if keep.export_hf and not saved.rescue:
            checkpoint.export_hf(run, saved.step, self.mesh)
        if self.mesh.rank == 0:
            try:
                retain(run, keep)
            except OSError as error:  # the next save tries again
                print(f"warning: a checkpoint that is not kept could not be removed: {error}", flush=True)
        self.save_seconds = max(self.save_seconds or 0.0, time.monotonic() - saved.began)


def told_apart(loader: Loader) -> list[str]:
    """The sources whose losses are measured one by one: none where there is but one."""
    return loader.source_names if len(loader.source_names) > 1 else []


def mean_loss(loss_sum: float, supervised: float) -> float | None:
    """A loss per supervised token; None where there is no such token."""
    return float(loss_sum / supervised) if supervised else None
