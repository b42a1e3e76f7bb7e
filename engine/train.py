"""The training loop: plain calls, in the order in which things happen."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from engine import host
from engine.base_model import config_overrides, weight_reader
from engine.checkpointing import checkpoint
from engine.checkpointing.model_files import write_model_files
from engine.mesh import Mesh, build_mesh
from engine.optim import build_optimizer, learning_rate, update
from engine.prepare import Prepared, make_loader, model_config, total_steps, write_config
from engine.reporting.flops import device_peak, step_flops
from engine.reporting.metrics import MetricsLog, read_metrics
from engine.reporting.report import write_report
from engine.signals import FAILED, UNFINISHED, StopRequest, shielded
from engine.startup_lines import sample_document, start_lines
from engine.step import (
    RouterStatistics,
    StepTotals,
    gather_samples,
    run_microbatches,
    take_router_statistics,
    wrap_chunks,
)
from models.build import build_chunks, load_weights
from models.layer_spec import attention_kernel, parameter_dtype
from models.layers.router import set_routers


class Trainer:
    """A run on this rank, ready to step: model, optimizer, data and where the run stands."""

    def __init__(self, prepared: Prepared, mesh: Mesh):
        config = prepared.config
        self.prepared, self.config, self.mesh = prepared, config, mesh
        self.loader = make_loader(prepared, prepared.data, mesh)
        self.valid_loader = make_loader(prepared, prepared.valid, mesh, shuffle=False) if prepared.valid else None
        self.kernel = attention_kernel(prepared.backend, mesh.device, parameter_dtype(config.precision))
        megatron = model_config(config, prepared.description)
        chunks = build_chunks(prepared.description, megatron, backend=prepared.backend, groups=mesh.groups)
        set_routers(chunks, aux_loss=config.moe.aux_loss, frozen=config.moe.freeze_router)
        if prepared.resume is None:
            wide = config.precision == "fp32"
            read = weight_reader(prepared.source, prepared.description, wide=wide)
            load_weights(chunks, checkpoint.sharding_metadata(mesh), read)
        self.chunks = wrap_chunks(chunks, mesh)
        self.optimizer = build_optimizer(config.optim, self.chunks, mesh, bf16=config.precision != "fp32")
        self.step = 0
        if prepared.resume is not None:
            checkpoint.load(prepared.resume, self.chunks, self.optimizer, mesh)
            self.loader.load_state_dict(prepared.resume.manifest["data"])
            self.step = prepared.resume.step
        self.total_steps = total_steps(config, self.loader)
        self.model_files = config.output / "model_files"
        self.data_state = self.loader.state_dict()  # after the last good step, also when the next one fails
        self.saved_step = self.step
        self.routers: RouterStatistics | None = None  # of the last step

    def train_step(self) -> tuple[StepTotals, float, float]:
        """One step: returns (totals, gradient norm, learning rate). FloatingPointError before a bad update."""
        microbatches = self.loader.next_step()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        totals = run_microbatches(self.chunks, microbatches, self.mesh, kernel=self.kernel)
        step = self.step + 1
        if not math.isfinite(totals.loss_sum):
            raise FloatingPointError(
                f"step {step}: the loss is not finite, the update was not made; samples: "
                f"{self._names(totals.bad_samples)}"
            )
        lr = learning_rate(self.config.optim, step, self.total_steps)
        done = update(self.optimizer, lr=lr, clip_grad=self.config.optim.clip_grad)
        if not done.applied:
            samples = gather_samples({sample for batch in microbatches for sample in batch.sample_ids})
            raise FloatingPointError(
                f"step {step}: the gradient's norm is {done.grad_norm}, the update was not made; samples of the step: "
                f"{self._names(samples)}"
            )
        self.routers = take_router_statistics(self.chunks, self.mesh)
        self.step, self.data_state = step, self.loader.state_dict()
        return totals, done.grad_norm, lr

    def _names(self, samples: tuple[tuple[int, int], ...]) -> str:
        """Samples as DATA:document, at most twenty of them."""
        names = [f"{self.prepared.data[source][0].path}:{document}" for source, document in samples[:20]]
        return ", ".join(names) + (f" and {len(samples) - 20} more" if len(samples) > 20 else "")

    def valid_loss(self) -> float:
        """The held-out loss per supervised token, over --valid in order."""
        assert self.valid_loader is not None
        batches = self.valid_loader.steps_in_epoch(0)
        if self.config.valid_batches:
            batches = min(batches, self.config.valid_batches)
        loss_sum, supervised = 0.0, 0
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            for number in range(batches):
                microbatches = self.valid_loader.step(0, number)
                totals = run_microbatches(self.chunks, microbatches, self.mesh, kernel=self.kernel, forward_only=True)
                loss_sum, supervised = loss_sum + totals.loss_sum, supervised + totals.supervised
        for chunk in self.chunks:
            chunk.train()
        return loss_sum / max(supervised, 1)

    def save(self) -> Path:
        """Writes the checkpoint of the last step."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)
        description = self.prepared.description
        manifest = {
            "family": description.family,
            "source_dtype": self.prepared.source.dtype,
            "vocab_size": description.vocab_size,
            "padded_vocab_size": description.padded_vocab_size,
            "tied": description.tied,
            "precision": self.config.precision,
            "freeze_router": self.config.moe.freeze_router,
            "pad_documents_to": self.prepared.pad_multiple,
            "data": self.data_state,
        }
        self.saved_step = self.step
        with shielded():
            target = checkpoint.save(
                self.config.output,
                self.step,
                self.chunks,
                self.optimizer,
                self.mesh,
                model_files=self.model_files,
                manifest=manifest,
                keep=self.config.checkpoint.keep,
            )
            if self.config.checkpoint.export_hf:
                checkpoint.export_hf(target, self.mesh)
        return target


def train(prepared: Prepared) -> None:
    """Runs a prepared job to its end on this rank; call it on every rank."""
    config = prepared.config
    on_host = host.enable()
    mesh = build_mesh(config.layout)
    trainer = Trainer(prepared, mesh)
    if mesh.rank == 0:
        source = prepared.source.files  # perhaps in RUN itself: read before RUN is made ready
        overrides = config_overrides(config.override, source, prepared.description.vocab_size)
        write_model_files(source, trainer.model_files, overrides=overrides, data=data_files(prepared))
        print(start_lines(trainer, on_host), flush=True)
        prepare_output(prepared)
    distributed.barrier()
    log = make_log(trainer) if mesh.is_logger else None
    unfinished = config.output / UNFINISHED
    if mesh.rank == 0 and math.isfinite(prepared.stop_at):
        at = time.strftime("%H:%M:%S", time.localtime(prepared.stop_at))
        print(f"saves and stops at {at}, before the job's end", flush=True)
    stop = StopRequest(prepared.stop_at)
    try:
        with stop.listening():
            reason = loop(trainer, log, stop)
    except FloatingPointError as error:
        if mesh.is_logger:
            unfinished.write_text(f"{FAILED}{error}\n", encoding="utf-8")
        raise
    finally:
        if log is not None:
            log.close()
    if mesh.is_logger:
        if reason:
            words = f"saved and stopped after step {trainer.step:,} of {trainer.total_steps:,}: {reason}"
            unfinished.write_text(words + "\n", encoding="utf-8")
            print(f"{words}; the same command continues", flush=True)
        else:
            unfinished.unlink(missing_ok=True)
        silent = sum(not line["supervised_tokens"] for line in read_metrics(config.output / "metrics.jsonl"))
        if silent:
            print(f"{silent:,} of {trainer.step:,} steps had no supervised token and changed nothing by loss")
        report = write_report(config.output, sample=sample_document(trainer), fill=None)
        print(f"report: {report}", flush=True)
    distributed.barrier()


def data_files(prepared: Prepared) -> dict[str, Any]:
    """What `write_model_files` takes from the data: of several directories, from the one that has most tokens."""
    indexes = [index for index, _ in prepared.data + prepared.valid]
    largest = max(indexes, key=lambda index: index.meta.get("vocab_size", 0))
    return largest.meta | {"tokenizer": largest.path / "tokenizer"}


def prepare_output(prepared: Prepared) -> None:
    """Makes RUN ready on one rank: the config, no leftovers, and nothing of an earlier run that is not continued."""
    output = prepared.config.output
    checkpoint.remove_unfinished(output)
    if prepared.resume is None and (aside := checkpoint.set_aside(output)):
        print(f"what an earlier run saved was moved to {' and '.join(map(str, aside))}", flush=True)
    write_config(prepared.config)
    (output / UNFINISHED).write_text("running, or killed\n", encoding="utf-8")


def loop(trainer: Trainer, log: MetricsLog | None, stop: StopRequest) -> str | None:
    """Steps until the run is over or has to stop, saving and measuring on the way; returns why it stopped early."""
    config = trainer.config
    while trainer.step < trainer.total_steps:
        started = time.perf_counter()
        try:
            totals, grad_norm, lr = trainer.train_step()
        except FloatingPointError:
            if trainer.step > trainer.saved_step:  # every rank is here; the weights are those before the step
                trainer.save()
            raise
        if trainer.mesh.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        last = trainer.step == trainer.total_steps
        extra: dict[str, Any] = {}
        every = config.valid_every
        if trainer.valid_loader is not None and (last or (every and trainer.step % every == 0)):
            extra["valid_loss"] = trainer.valid_loss()
        if log is not None:
            write_line(trainer, log, totals, grad_norm, lr, seconds, extra)
        reason = None if last else stop.reason()
        if last or reason or (config.checkpoint.every and trainer.step % config.checkpoint.every == 0):
            trainer.save()
        if reason:
            return reason
    return None


def write_line(
    trainer: Trainer,
    log: MetricsLog,
    totals: StepTotals,
    grad_norm: float,
    lr: float,
    seconds: float,
    extra: dict[str, Any],
) -> None:
    """Adds the step's line to metrics.jsonl and its mirrors."""
    if (routers := trainer.routers) is not None:
        extra = {
            **extra,
            "tokens_per_expert": list(routers.tokens_per_expert),
            "expert_imbalance": list(routers.expert_imbalance),
        }
        if trainer.config.moe.aux_loss:
            extra["aux_loss"] = routers.aux_loss / max(totals.supervised, 1)
    flops = step_flops(trainer.prepared.description, totals.tokens, totals.squared_lengths, totals.windowed_squares)
    tflops = flops / seconds / trainer.mesh.world_size / 1e12
    cuda = trainer.mesh.device.type == "cuda"
    peak = trainer.config.log.peak_tflops or device_peak(torch.cuda.get_device_name() if cuda else None)
    log.write(
        trainer.step,
        loss=totals.loss if totals.supervised else None,
        grad_norm=grad_norm,
        lr=lr,
        tokens=totals.tokens,
        supervised_tokens=totals.supervised,
        padding_tokens=totals.padding,
        seconds=seconds,
        tflops=tflops,
        mfu=tflops / peak if peak else None,
        bin_fill=totals.tokens / (totals.bins * trainer.config.seq_len) if totals.bins else None,
        **extra,
    )


def make_log(trainer: Trainer) -> MetricsLog:
    """Opens RUN's metrics, rewound to where the run stands."""
    log = trainer.config.log
    return MetricsLog(
        trainer.config.output,
        total_steps=trainer.total_steps,
        start_step=trainer.step,
        wandb=log.wandb_project if log.wandb else None,
        config=dataclasses.asdict(trainer.config),
        progress_every=log.print_every,
    )
