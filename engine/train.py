"""The training loop: plain calls, in the order in which things happen."""

from __future__ import annotations

import dataclasses
import sys
import time

from torch import distributed

from engine import cuda_setup, host
from engine.checkpointing.checkpoint import export_hf
from engine.checkpointing.saver import FAILED as SAVE_FAILED
from engine.checkpointing.saver import WRITTEN, CheckpointFailed
from engine.config import RunConfig
from engine.costs import cost_fields
from engine.garbage import collect, collected_by_hand
from engine.guards.agreement import check_agreement, check_layouts
from engine.guards.spikes import Spikes
from engine.guards.watchdog import SAVE, STEP, Watchdog
from engine.mesh import Mesh, build_mesh, join_world
from engine.metric_lines import flags, held_out_fields, step_line
from engine.prepare import Prepared, once
from engine.reporting.metrics import AT_START, LEFT_OUT, MetricsLog, read_metrics, rewind
from engine.reporting.progress import held_out_text
from engine.reporting.running_report import RunningReport
from engine.retention import is_due
from engine.run_folder import FAILED, RunFolder
from engine.run_start import begin, go_back, owned
from engine.run_status import DONE, RUNNING, STOPPED, clear_errors, save_seconds, took_effect, write_status
from engine.signals import StopRequest, heard_by_any, largest, reason
from engine.startup_lines import sample_document, start_lines
from engine.trainer import HeldOutLosses, Trainer


def train(prepared: Prepared) -> None:
    """Runs a prepared job to its end on this rank; call it on every rank."""
    stop, guard = StopRequest(prepared.limit, save_seconds(prepared.run)), prepared.config.guard
    on_host = host.enable()
    cuda_setup.switch(deterministic=prepared.config.deterministic)
    with stop.listening():
        rank, _, device = join_world()
        with Watchdog(prepared.run, rank, patience=guard.patience, minutes=guard.minutes) as watchdog:
            check_layouts(prepared.config.layout)
            mesh = build_mesh(prepared.config.layout)
            with owned(prepared, mesh):
                agreement = check_agreement(prepared, device)
                done = prepared.resume is not None and prepared.resume.step >= prepared.total_steps
                if done and not owes_losses(prepared, mesh):
                    stand(prepared, mesh)
                else:
                    start(prepared, mesh, stop, watchdog, on_host, agreement)
                distributed.barrier()


def start(
    prepared: Prepared, mesh: Mesh, stop: StopRequest, watchdog: Watchdog, on_host: bool, agreement: list[str]
) -> None:
    """Says that the ranks agree and trains, unless a signal has come before that."""
    if mesh.rank == 0:
        print("\n".join(agreement), flush=True)
    if stops := heard_by_any(stop):  # weights take the longest of all before the first step
        stopped_early(prepared, mesh, stops, begun=False)
    else:
        run_to_the_end(prepared, mesh, stop, watchdog, on_host)


def stand(prepared: Prepared, mesh: Mesh) -> None:
    """Leaves a run that is done as it should be, whatever a kill after its last save has kept it from."""
    run, resume, total_steps = prepared.run, prepared.resume, prepared.total_steps
    assert resume is not None
    if mesh.rank == 0:
        go_back(run, resume.step, prepared.config.checkpoint)
        run.remove_leftovers()
    distributed.barrier()
    export_missing(prepared, mesh)
    if mesh.rank == 0:
        clear_errors(run)
        run.unfinished.unlink(missing_ok=True)
        rewind(run.metrics, resume.step)
        print(
            f"run is done: {resume.step:,} of {total_steps:,} steps; more --steps or --epochs continue it", flush=True
        )
        if read_metrics(run.metrics):
            running_report(prepared).write(always=True)
        began_with = once(prepared.config.checkpoint)
        write_status(run, DONE, step=resume.step, total_steps=total_steps, began_with=began_with)


def export_missing(prepared: Prepared, mesh: Mesh) -> None:
    """Makes the export of the checkpoint that a run resumes from, where a kill has prevented it."""
    run, resume = prepared.run, prepared.resume
    if resume is None or not prepared.config.checkpoint.export_hf or resume.manifest.get("rescue"):
        return
    (missing,) = largest(int(not run.export(resume.step).exists()))
    if missing:
        export_hf(run, resume.step, mesh)


def run_to_the_end(prepared: Prepared, mesh: Mesh, stop: StopRequest, watchdog: Watchdog, on_host: bool) -> None:
    """Reads the weights, trains to the end of the run or to where it has to stop, and says how that ended."""
    run, config = prepared.run, prepared.config
    trainer = Trainer(prepared, mesh)
    if mesh.rank == 0:
        begin(prepared, start_lines(prepared, mesh, trainer.step, on_host))
    distributed.barrier()
    if stops := heard_by_any(stop):
        trainer.saver.close()
        return stopped_early(prepared, mesh, stops, begun=True)
    export_missing(prepared, mesh)
    owed = trainer.held_out_losses(watchdog, stop, starting=True) if owes_losses(prepared, mesh) else None
    if stops := heard_by_any(stop):
        trainer.saver.close()
        return stopped_early(prepared, mesh, stops, begun=True)
    log = open_log(run, config, trainer.step, prepared.total_steps, mesh.world_size) if mesh.is_logger else None
    report = running_report(prepared) if mesh.is_logger else None
    if log is not None and owed is not None and trainer.step:
        log.complete(held_out_fields(owed))
    try:
        with collected_by_hand():
            stopped = loop(trainer, log, stop, report, watchdog, at_start=None if trainer.step else owed)
    except FloatingPointError as error:
        if mesh.is_logger:
            run.unfinished.write_text(f"{FAILED}{error}\n", encoding="utf-8")
        raise
    except CheckpointFailed:  # every rank is here, and the report shows how far the run came
        if mesh.rank == 0:
            write_status(run, RUNNING, step=trainer.step)
        raise
    finally:
        trainer.saver.close()
        if log is not None:
            log.close()
        if report is not None and sys.exc_info()[0] is not None and trainer.step:
            report.write(always=True)
    if report is not None:
        end(run, trainer.step, trainer.total_steps, stopped)
        report.write(always=True)
        print(f"report: {run.report}", flush=True)
    distributed.barrier()
    if mesh.rank == 0:
        write_status(
            run,
            STOPPED if stopped else DONE,
            step=trainer.step,
            total_steps=trainer.total_steps,
            reason=stopped,
            save=trainer.save_seconds,
        )


def owes_losses(prepared: Prepared, mesh: Mesh) -> bool:
    """Whether held-out losses are to be measured before the next step; every rank calls it.

    Those of the start, or those of the last step, which were left out as the run was told to stop.
    """
    if prepared.resume is None:
        return prepared.config.valid_at_start
    step = prepared.resume.step
    lines = read_metrics(prepared.run.metrics) if mesh.rank == 0 and prepared.valid_orders else []
    return bool(*largest(int(any(line["step"] == step and LEFT_OUT in line for line in lines))))


def running_report(prepared: Prepared) -> RunningReport:
    """The report of a run, with the first document of its data."""
    return RunningReport(prepared.run, lambda: sample_document(prepared.order.indexes[0]))


def stopped_early(prepared: Prepared, mesh: Mesh, why: str, *, begun: bool) -> None:
    """Says and writes down that a run was told to stop before its first step: there is nothing to save.

    begun: whether `begin` has made RUN this run's. Otherwise an earlier run that a flag was to set aside, as a whole or
    beyond a step, stands as it did.
    """
    run, step = prepared.run, prepared.resume.step if prepared.resume else 0
    if mesh.rank == 0:
        words = f"stopped while starting up, before step {step + 1:,} of {prepared.total_steps:,}: {why}"
        flag = once(prepared.config.checkpoint)
        aside = not begun and flag is not None and not took_effect(run, flag) and run.config.exists()
        if not aside:
            run.unfinished.write_text(words + "\n", encoding="utf-8")
        print(f"{words}; the same command continues", flush=True)
        write_status(run, STOPPED, step=step, total_steps=prepared.total_steps, reason=why, aside=aside)


def open_log(run: RunFolder, config: RunConfig, step: int, total_steps: int, devices: int) -> MetricsLog:
    """Opens RUN's metrics, rewound to where the run stands."""
    rewind(run.skipped, step)
    return MetricsLog(
        run.path,
        total_steps=total_steps,
        start_step=step,
        devices=devices,
        wandb=config.log.wandb_project if config.log.wandb else None,
        config=dataclasses.asdict(config),
        progress_every=config.log.print_every,
    )


def loop(
    trainer: Trainer,
    log: MetricsLog | None,
    stop: StopRequest,
    report: RunningReport | None,
    watchdog: Watchdog,
    *,
    at_start: HeldOutLosses | None,
) -> str | None:
    """Steps until the run is over or has to stop, saving and measuring on the way; returns why it stopped early."""
    config = trainer.config
    spikes = Spikes(config.guard.spike, (line["loss"] for line in read_metrics(log.path)) if log is not None else ())
    if at_start is not None and log is not None:
        print(f"before the first step: {held_out_text(held_out_fields(at_start))}", flush=True)
    while trainer.step < trainer.total_steps:
        watchdog.enter(STEP, trainer.step + 1)
        try:
            result = trainer.train_step()
        except FloatingPointError as error:
            watchdog.enter(SAVE, trainer.step)
            save_before(trainer, error, log)
            raise
        last = result.step == trainer.total_steps
        every = config.valid_every or trainer.total_steps
        measures = bool(trainer.valid_loaders) and (last or result.step % every == 0)
        held_out = trainer.held_out_losses(watchdog, stop) if measures else None
        since = int(time.monotonic() - trainer.saved_at)  # of the rank on whose clock most time has passed
        stop.learn(trainer.save_seconds, result.seconds)
        number, writing, since, *costs = largest(stop.number(), trainer.saver.progress(), since, *trainer.costs())
        if log is not None:
            line = step_line(
                result,
                trainer.prepared.description,
                trainer.mesh,
                seq_len=config.seq_len,
                peak_tflops=config.log.peak_tflops,
                aux_loss=config.moe.aux_loss,
                sources=trainer.sources,
            )
            line |= flags(line, result, spikes, trainer.prepared.run) | cost_fields(result.seconds, *costs)
            if at_start is not None:
                line |= {f"{name}{AT_START}": value for name, value in held_out_fields(at_start).items()}
                at_start = None
            line |= held_out_fields(held_out) if held_out is not None else {LEFT_OUT: True} if measures else {}
            log.write(**line)
        if writing in (WRITTEN, SAVE_FAILED):
            watchdog.enter(SAVE, result.step)
            trainer.finish_save()
        stops = None if last and (held_out is not None or not measures) else reason(number)
        due = is_due(result.step, since, config.checkpoint, last=last, stopping=stops is not None)
        if due:
            watchdog.enter(SAVE, result.step)
            note_save(trainer, log, report)
            trainer.start_save(rescue=due == "rescue")
        collect(result.step, pause=measures or due is not None)
        if stops:
            trainer.finish_save()
            return stops
    trainer.finish_save()
    return None


def note_save(trainer: Trainer, log: MetricsLog | None, report: RunningReport | None) -> None:
    """Says at a save how far the run is, to those who look at RUN."""
    if log is not None:
        log.sync()
    if trainer.mesh.rank == 0:
        write_status(trainer.prepared.run, RUNNING, step=trainer.step, save=trainer.save_seconds)
    if report is not None:
        report.write()


def save_before(trainer: Trainer, error: FloatingPointError, log: MetricsLog | None) -> None:
    """Saves where a step that failed left the run: every rank is here, and the weights are those before the step."""
    if log is not None:
        log.sync()
    try:
        if trainer.step > trainer.saved_step:
            trainer.start_save()
        trainer.finish_save()
    except FloatingPointError as another:  # the weights are not finite either
        raise FloatingPointError(f"{error}; and {another}") from None


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
