"""The training loop: plain calls, in the order in which things happen."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import torch
from torch import distributed

from engine import host
from engine.base_model import config_overrides
from engine.checkpointing.model_files import write_model_files
from engine.checkpointing.saver import FAILED as SAVE_FAILED
from engine.checkpointing.saver import WRITTEN
from engine.cli import dump_run
from engine.config import RunConfig
from engine.guards.agreement import check_agreement
from engine.guards.skips import write_down
from engine.guards.spikes import Spikes
from engine.guards.watchdog import SAVE, STEP, Watchdog
from engine.mesh import Mesh, build_mesh
from engine.prepare import Prepared
from engine.reporting.flops import device_peak, step_flops
from engine.reporting.metrics import AT_START, MetricsLog, read_metrics, rewind
from engine.reporting.progress import held_out_text
from engine.reporting.report import write_report
from engine.run_data import model_data
from engine.run_folder import FAILED, RunFolder
from engine.signals import StopRequest, largest, reason
from engine.startup_lines import sample_document, start_lines
from engine.trainer import HeldOutLosses, StepResult, Trainer, mean_loss
from models.description import ModelDescription


def train(prepared: Prepared) -> None:
    """Runs a prepared job to its end on this rank; call it on every rank."""
    stop, guard = StopRequest(prepared.stop_at), prepared.config.guard
    on_host = host.enable()
    with stop.listening():
        mesh = build_mesh(prepared.config.layout)
        with Watchdog(prepared.run, mesh.rank, patience=guard.patience, minutes=guard.minutes) as watchdog:
            agreement = check_agreement(prepared, mesh.device)
            if mesh.rank == 0:
                print("\n".join(agreement), flush=True)
            if stops := signalled(stop):  # weights take the longest of all before the first step
                return stopped_early(prepared, mesh, stops)
            run_training(prepared, mesh, stop, watchdog, on_host)


def run_training(prepared: Prepared, mesh: Mesh, stop: StopRequest, watchdog: Watchdog, on_host: bool) -> None:
    """Reads the weights and trains to the end of the run, or to where it has to stop."""
    trainer = Trainer(prepared, mesh)
    if mesh.rank == 0:
        begin(prepared, start_lines(prepared, mesh, trainer.step, on_host))
    distributed.barrier()
    run, config = prepared.run, prepared.config
    if stops := signalled(stop):
        trainer.saver.close()
        return stopped_early(prepared, mesh, stops)
    log = open_log(run, config, trainer.step, prepared.total_steps) if mesh.is_logger else None
    try:
        stopped = loop(trainer, log, stop, watchdog)
    except FloatingPointError as error:
        if mesh.is_logger:
            run.unfinished.write_text(f"{FAILED}{error}\n", encoding="utf-8")
        raise
    finally:
        trainer.saver.close()
        if log is not None:
            log.close()
    if mesh.is_logger:
        end(run, trainer.step, trainer.total_steps, stopped)
        print(f"report: {write_report(run.path, sample=sample_document(prepared.order.indexes[0]))}", flush=True)
    distributed.barrier()


def signalled(stop: StopRequest) -> str | None:
    """Which signal came to any rank during start-up, the same on each; every rank calls it.

    The time limit does not count: a job that has so little time left makes one step all the same.
    """
    return reason(*largest(stop.signal))


def stopped_early(prepared: Prepared, mesh: Mesh, why: str) -> None:
    """Says and writes down that a run was told to stop before its first step: there is nothing to save."""
    step = prepared.resume.step if prepared.resume else 0
    if mesh.rank == 0:
        words = f"stopped while starting up, before step {step + 1:,} of {prepared.total_steps:,}: {why}"
        prepared.run.path.mkdir(parents=True, exist_ok=True)
        prepared.run.unfinished.write_text(words + "\n", encoding="utf-8")
        print(f"{words}; the same command continues", flush=True)
    distributed.barrier()


def begin(prepared: Prepared, lines: str) -> None:
    """Makes RUN ready on one rank: model files, config, no leftovers, nothing of a run that is not continued."""
    run, base, override = prepared.run, prepared.base_model, prepared.config.override
    overrides = config_overrides(override, base.own_vocab_size, base.description.vocab_size)
    data = model_data(prepared.order.indexes, prepared.held_out)
    # The base model's files are perhaps in RUN itself: they are read before RUN is made ready.
    write_model_files(base.files, run.model_files, overrides=overrides, data=data)
    print(lines, flush=True)
    run.remove_leftovers()
    if prepared.resume is None and (aside := run.set_aside()):
        print(f"what an earlier run saved was moved to {' and '.join(map(str, aside))}", flush=True)
    run.config.write_text(dump_run(prepared.config), encoding="utf-8")
    run.unfinished.write_text("running, or killed\n", encoding="utf-8")
    if math.isfinite(prepared.stop_at):
        at = time.strftime("%H:%M:%S", time.localtime(prepared.stop_at))
        print(f"saves and stops at {at}, before the job's end", flush=True)


def open_log(run: RunFolder, config: RunConfig, step: int, total_steps: int) -> MetricsLog:
    """Opens RUN's metrics, rewound to where the run stands."""
    rewind(run.skipped, step)
    return MetricsLog(
        run.path,
        total_steps=total_steps,
        start_step=step,
        wandb=config.log.wandb_project if config.log.wandb else None,
        config=dataclasses.asdict(config),
        progress_every=config.log.print_every,
    )


def loop(trainer: Trainer, log: MetricsLog | None, stop: StopRequest, watchdog: Watchdog) -> str | None:
    """Steps until the run is over or has to stop, saving and measuring on the way; returns why it stopped early."""
    config, description = trainer.config, trainer.prepared.description
    spikes = Spikes(config.guard.spike, (line["loss"] for line in read_metrics(log.path)) if log is not None else ())
    at_start = trainer.held_out_losses(watchdog) if config.valid_at_start and trainer.step == 0 else None
    if at_start is not None and log is not None:
        print(f"before the first step: {held_out_text(held_out_fields(at_start))}", flush=True)
    while trainer.step < trainer.total_steps:
        watchdog.enter(STEP, trainer.step + 1)
        try:
            result = trainer.train_step()
        except FloatingPointError as error:
            watchdog.enter(SAVE, trainer.step)
            save_before(trainer, error)
            raise
        last = result.step == trainer.total_steps
        every = config.valid_every
        measures = bool(trainer.valid_loaders) and (last or bool(every and result.step % every == 0))
        held_out = trainer.held_out_losses(watchdog) if measures else None
        if log is not None:
            line = step_line(
                result,
                description,
                trainer.mesh,
                seq_len=config.seq_len,
                peak_tflops=config.log.peak_tflops,
                aux_loss=config.moe.aux_loss,
                sources=trainer.sources,
            )
            line |= flags(line, result, spikes, trainer.prepared.run)
            if at_start is not None:
                line |= {f"{name}{AT_START}": value for name, value in held_out_fields(at_start).items()}
                at_start = None
            log.write(**line, **(held_out_fields(held_out) if held_out is not None else {}))
        number, writing = largest(stop.number(), trainer.saver.progress())
        if writing in (WRITTEN, SAVE_FAILED):
            watchdog.enter(SAVE, result.step)
            trainer.finish_save()
        stops = None if last else reason(number)
        if last or stops or (config.checkpoint.every and result.step % config.checkpoint.every == 0):
            watchdog.enter(SAVE, result.step)
            trainer.start_save()
        if stops:
            trainer.finish_save()
            return stops
    trainer.finish_save()
    return None


def save_before(trainer: Trainer, error: FloatingPointError) -> None:
    """Saves where a step that failed left the run: every rank is here, and the weights are those before the step."""
    try:
        if trainer.step > trainer.saved_step:
            trainer.start_save()
        trainer.finish_save()
    except FloatingPointError as another:  # the weights are not finite either
        raise FloatingPointError(f"{error}; and {another}") from None


def step_line(
    result: StepResult,
    description: ModelDescription,
    mesh: Mesh,
    *,
    seq_len: int,
    peak_tflops: float,
    aux_loss: float,
    sources: list[str],
) -> dict[str, Any]:
    """A step as a line of metrics.jsonl has it."""
    totals, routers, cuda = result.totals, result.routers, mesh.device.type == "cuda"
    flops = step_flops(description, totals.tokens, totals.squared_lengths, totals.windowed_squares)
    tflops = flops / result.seconds / mesh.world_size / 1e12
    peak = peak_tflops or device_peak(torch.cuda.get_device_name() if cuda else None)
    line: dict[str, Any] = {
        "step": result.step,
        "loss": totals.loss if totals.supervised and result.skipped is None else None,
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "tokens": totals.tokens,
        "supervised_tokens": totals.supervised,
        "padding_tokens": totals.padding,
        "seconds": result.seconds,
        "tflops": tflops,
        "mfu": tflops / peak if peak else None,
        "bin_fill": totals.tokens / (totals.bins * seq_len) if totals.bins else None,
    }
    if sources:
        pairs = zip(totals.source_losses, totals.source_tokens, strict=True)
        line["source_losses"] = dict(zip(sources, (mean_loss(*pair) for pair in pairs), strict=True))
        line["source_tokens"] = dict(zip(sources, totals.source_tokens, strict=True))
    if routers is not None:
        line["tokens_per_expert"] = list(routers.tokens_per_expert)
        line["expert_imbalance"] = list(routers.expert_imbalance)
        if aux_loss:
            line["aux_loss"] = routers.aux_loss / max(totals.supervised, 1)
    return line


def flags(line: dict[str, Any], result: StepResult, spikes: Spikes, run: RunFolder) -> dict[str, bool]:
    """Says and writes down what was wrong with a step; the fields of its line that say so."""
    if result.skipped is not None:
        write_down(run.skipped, result.skipped)
        print(f"step {result.step:,} was skipped: {result.skipped.reason}; see {run.skipped}", flush=True)
        return {"skipped": True}
    if (times := spikes.times_median(line["loss"])) is not None:
        print(f"step {result.step:,}: loss {line['loss']:.4f} is {times:.1f} times the recent median", flush=True)
        return {"spike": True}
    return {}


def held_out_fields(held_out: HeldOutLosses) -> dict[str, Any]:
    """Held-out losses as a line of metrics.jsonl has them."""
    fields: dict[str, Any] = {"valid_loss": held_out.loss, "valid_losses": held_out.losses}
    return fields | ({"valid_source_losses": held_out.source_losses} if held_out.source_losses else {})


def end(run: RunFolder, step: int, total_steps: int, reason: str | None) -> None:
    """Says and writes down how a run ended, and how many of its steps changed nothing."""
    if reason:
        words = f"saved and stopped after step {step:,} of {total_steps:,}: {reason}"
        run.unfinished.write_text(words + "\n", encoding="utf-8")
        print(f"{words}; the same command continues", flush=True)
    else:
        run.unfinished.unlink(missing_ok=True)
    if skipped := len(read_metrics(run.skipped)):
        print(f"{skipped:,} of {step:,} steps were skipped, their documents are in {run.skipped}", flush=True)
    silent = sum(not line["supervised_tokens"] for line in read_metrics(run.metrics))
    if silent:
        print(f"{silent:,} of {step:,} steps had no supervised token and changed nothing by loss")
