"""How a run comes to own RUN and makes it ready: the lock, a trial write, and what an earlier run left there."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from math import isfinite, prod
from pathlib import Path
from typing import Any

from engine.base_model import config_overrides
from engine.checkpointing.model_files import write_model_files
from engine.checkpointing.provenance import provenance_at_start, provenance_of, read_provenance, write_provenance
from engine.cli import dump_run
from engine.config import CheckpointConfig
from engine.mesh import Mesh, outcomes
from engine.prepare import Prepared, find_start, once
from engine.reporting.metrics import lines_after
from engine.run_data import model_data
from engine.run_folder import BEING_WRITTEN, RunFolder
from engine.run_lock import held, now
from engine.run_status import RUNNING, Refused, clear_errors, save_seconds, took_effect, write_status
from engine.time_limit import TimeLimit

TRIAL_BYTES = 16 * 2**10
CACHED = 90.0  # seconds for which NFS may believe that a file is not there: 60 by default, and some more


@contextlib.contextmanager
def owned(prepared: Prepared, mesh: Mesh) -> Iterator[None]:
    """Owns RUN from before anything is written or read until the run has ended; every rank calls it.

    Raises Refused on all ranks where another job owns RUN, where it cannot be written, or where it went on while this
    run was being prepared.
    """
    run, resume = prepared.run, prepared.resume
    lock = contextlib.ExitStack()

    def take() -> int | None:
        if said := lock.enter_context(held(run)):
            print(said, flush=True)
        lock.callback(_remove_trials, run)
        shutil.rmtree(run.heartbeats, ignore_errors=True)  # of a run that was killed; nobody beats before a step
        _check_space(run, prepared)
        _write_trial(run, 0)
        now_there = find_start(run, prepared.config.checkpoint)
        return now_there.step if now_there else None

    with lock:
        there, own = _agreed(take, mesh)[0], resume.step if resume else None
        if any(step != there for step in _agreed(lambda: own, mesh, all_ranks=True)):
            raise Refused(f"the run in {run.path} went on while this one was starting: start it again")
        _agreed(lambda: _write_trial(run, mesh.rank), mesh, all_ranks=True)
        if mesh.rank == 0:
            _remove_trials(run)
        yield


def _agreed(work: Callable[[], Any], mesh: Mesh, *, all_ranks: bool = False) -> list[Any]:
    """The results of the first rank's work, or of all; Refused on every rank where one failed."""
    answers = outcomes(work if all_ranks or mesh.rank == 0 else None)
    for rank, (_, why) in enumerate(answers):
        if why is not None:
            raise Refused(why if rank == 0 else f"rank {rank}: {why}")
    return [answer for answer, _ in answers]


def _check_space(run: RunFolder, prepared: Prepared) -> None:
    """Refuses a disk on which not even one checkpoint can be written."""
    with _named(run):
        run.checkpoints.mkdir(exist_ok=True)
    if prepared.resume is not None and prepared.resume.step >= prepared.total_steps:
        return
    parameters = sum(prod(rule.shape) for rule in prepared.description.rules)
    moments = 4 if prepared.config.optim.moments == "bf16" else 8
    needed = parameters * (4 + moments) if not prepared.config.moe.freeze_router else 0
    free = shutil.disk_usage(run.checkpoints).free
    if free < needed:
        raise ValueError(
            f"--output {run.path}: a checkpoint takes at least {needed / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are "
            f"free in {run.checkpoints}: make room, or give another --output"
        )


def _trial(run: RunFolder, rank: int) -> Path:
    return run.checkpoints / f"trial_{rank}{BEING_WRITTEN}"


def _write_trial(run: RunFolder, rank: int) -> None:
    """Writes a small file to where checkpoints go, as a rank will; the first rank's must be seen by all."""
    with _named(run):
        if rank and not _appears(_trial(run, 0)):
            raise FileNotFoundError(
                f"what rank 0 has written there is not seen on {os.uname().nodename}; the nodes must share RUN"
            )
        with _trial(run, rank).open("wb") as stream:
            stream.write(b"\0" * TRIAL_BYTES)
            stream.flush()
            os.fsync(stream.fileno())


def _appears(path: Path) -> bool:
    """Whether a file that another node has written is seen here, after some time where directories are cached."""
    until = time.monotonic() + CACHED
    while not path.exists():
        if time.monotonic() > until:
            return False
        for folder in (path.parent.parent, path.parent):  # listing them asks NFS anew
            with contextlib.suppress(OSError):
                os.listdir(folder)
        time.sleep(0.5)
    return True


@contextlib.contextmanager
def _named(run: RunFolder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"--output {run.path}: nothing can be written in {run.checkpoints}: {error}") from None


def _remove_trials(run: RunFolder) -> None:
    for path in run.checkpoints.glob(f"trial_*{BEING_WRITTEN}"):
        path.unlink(missing_ok=True)


def begin(prepared: Prepared, lines: str) -> None:
    """Makes RUN ready on one rank: model files, config, no leftovers, nothing of a run that is not continued."""
    run, base, config = prepared.run, prepared.base_model, prepared.config
    overrides = config_overrides(config.override, base.own_vocab_size, base.description.vocab_size)
    data = model_data(prepared.order.indexes, prepared.held_out)
    print(f"{now()} {run.path}\n{lines}", flush=True)
    if prepared.resume is not None:
        go_back(run, prepared.resume.step, config.checkpoint)
    run.remove_leftovers()
    # The base model's files are perhaps in RUN itself: they are read before these are set aside.
    files = run.model_files.with_name(run.model_files.name + BEING_WRITTEN)
    write_model_files(base.files, files, overrides=overrides, data=data)
    write_provenance(files, _provenance(prepared))
    if (
        prepared.resume is None
        and once(config.checkpoint)
        and not _took_effect(run, config.checkpoint)
        and (aside := run.set_aside())
    ):
        print(f"the earlier run was moved to {aside}", flush=True)
    shutil.rmtree(run.model_files, ignore_errors=True)
    os.rename(files, run.model_files)
    run.config.write_text(dump_run(config), encoding="utf-8")
    clear_errors(run)
    run.unfinished.write_text("running, or killed\n", encoding="utf-8")
    step = prepared.resume.step if prepared.resume else 0
    write_status(run, RUNNING, step=step, total_steps=prepared.total_steps, began_with=once(config.checkpoint))
    if line := stop_line(prepared.limit, save_seconds(run)):
        print(line, flush=True)


def stop_line(limit: TimeLimit, save: float | None) -> str:
    """When the run saves and stops for the end of its job; empty where that has none."""
    if not isfinite(stop_at := limit.stop_at(save)):
        return ""
    at = datetime.fromtimestamp(stop_at).astimezone().isoformat(timespec="seconds")
    if limit.notice is not None:
        return f"saves and stops at {at}, before the job's end"
    known = "until a save has shown how long it takes" if save is None else f"as a save took {save:,.0f} seconds"
    return f"saves and stops at {at}, before the job's end, {known} (--checkpoint.minutes-before-end)"


def _provenance(prepared: Prepared) -> dict[str, Any]:
    """What the run is made of; one that goes on keeps what it knew at its start."""
    base, config = prepared.base_model, prepared.config
    said = read_provenance(base.files)
    if prepared.resume is not None and said:
        return said
    if base.is_checkpoint and prepared.resume is None:
        said = provenance_of([base.files.parent]) or said
    return provenance_at_start(said, config.model, base.files, config.data, prepared.order.indexes)


def go_back(run: RunFolder, step: int, config: CheckpointConfig) -> None:
    """Makes a resumed run's folder that of a run at `step`: what lies beyond is set aside, and `latest` names it."""
    flag = once(config)
    if flag and _took_effect(run, config):
        print(f"{flag} did its work before this job was started again: the run goes on from step {step:,}", flush=True)
        flag = None
    run.point_latest(step)
    lines, beyond = lines_after(run.metrics, step), run.beyond(step)
    if beyond or (flag and lines):
        aside = run.set_beyond_aside(step, lines)
        what = ", ".join([*sorted({path.name for path in beyond}), f"{len(lines):,} lines of metrics"])
        print(f"back at step {step:,}: what lies beyond it was moved to {aside} ({what})", flush=True)


def _took_effect(run: RunFolder, config: CheckpointConfig) -> bool:
    flag = once(config)
    return flag is not None and took_effect(run, flag)
