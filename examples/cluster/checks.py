"""What is refused before anything is queued: a run that would end in the queue's first minute, or after its last."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engine.check_values import check_values
from engine.cli import split_weight
from engine.config import RunConfig
from engine.run_folder import RunFolder
from engine.run_lock import describe, is_anothers, read_lock
from examples.cluster import job_record, slurm
from examples.cluster.job_record import TRAIN, WATCH
from examples.cluster.options import SubmitOptions, seconds
from examples.cluster.script import Place, container_mounts, is_mounted

PLAN = Path(__file__).resolve().parents[1] / "plan_run.py"


def read_training(flags: Sequence[str], options: SubmitOptions) -> tuple[RunConfig, list[float], list[str]]:
    """The run that recipe and flags describe, read and checked as training does it; the rates of a sweep; what to say.

    ValueError in one sentence, or the parser's own end of the process for a mistyped flag.
    """
    from examples.pretrain_sft import parse

    config = parse(list(flags), world_size=options.nodes * options.ranks, first=True)
    rates: list[float] = []
    lines: list[str] = []
    if options.lrs is not None:
        from examples import lr_sweep
        from examples.sweep_settings import own_length

        rates = lr_sweep.Options(lrs=options.lrs, output=config.output).rates
        config, lines = own_length(config, list(flags))
        for rate in rates:
            check_values(replace(config, optim=replace(config.optim, lr=rate)))
    if (options.jobs > 1) and (flag := _begins_anew(config)):
        raise ValueError(f"{flag} would do its work in each of --jobs {options.jobs}: queue one job, or leave it out")
    minutes, limit = config.checkpoint.minutes_before_end, options.time and seconds(options.time)
    if minutes and limit and minutes * 60 >= limit:
        raise ValueError(
            f"--checkpoint.minutes-before-end {minutes:g} is not shorter than a job of --time {options.time}"
        )
    return config, rates, lines


def _begins_anew(config: RunConfig) -> str:
    if not config.checkpoint.resume:
        return "--checkpoint.no-resume"
    step = config.checkpoint.resume_from
    return "" if step is None else f"--checkpoint.resume-from {step}"


def check_paths(options: SubmitOptions, config: RunConfig, place: Place) -> None:
    """Refuses paths at which a job would fail; ValueError in one sentence that names flag, path and mend."""
    run = RunFolder(place.run)
    if run.is_foreign():
        raise ValueError(f"--output {run.path} holds a model, data or a checkpoint: give a directory for the run")
    if not all(char.isprintable() and char != "\\" for char in str(run.path)):
        raise ValueError(f"--output {str(run.path)!r}: SLURM cannot name logs there; give a plainer path")
    there = next(path for path in (run.path, *run.path.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--output {run.path}: nothing can be written in {there}")
    if is_anothers(run):
        raise ValueError(f"--output {run.path} is in use by {describe(read_lock(run) or {})}: wait for it")
    held_out = [one.partition("=")[2] or one for one in config.valid]
    data = [split_weight(one)[0] for one in config.data]
    if TRAIN in options.chosen and options.jobs and "prepare" not in options.chosen:
        for flag, paths in (("--data", data), ("--valid", held_out)):
            for path in paths:
                if not Path(path).is_dir():
                    raise ValueError(f"{flag} {path}: there is no such directory; add prepare to --stages to make it")
    if WATCH in options.chosen and not config.checkpoint.export_hf:
        raise ValueError(
            "--stages watch grades what training exports, and it exports nothing: add checkpoint.export_hf"
        )
    if options.container is not None:
        model = [config.model] if config.model and Path(config.model).exists() else []
        mounts = container_mounts(options, place)
        for path in (str(run.path), *model, *data, *held_out):
            if not is_mounted(Path(path), mounts):
                raise ValueError(f"{path} is not seen in the container: add it to --mounts")


def plan_lines(config: RunConfig, recipe: str, ranks: int) -> list[str]:
    """What a rank will hold, where the model's config.json is at hand; else how to ask for it.

    ValueError where the model does not allow the layout. A process of its own: planning hides this machine's GPUs from
    itself, and jobs inherit the environment of what queues them.
    """
    if config.model is None:
        return []
    if not (Path(config.model) / "config.json").is_file() or importlib.util.find_spec("megatron") is None:
        return [f"not held against the model yet, which is not here: lathe plan RECIPE --ranks {ranks}"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(recipe, encoding="utf-8")
        command = [sys.executable, str(PLAN), str(path), "--ranks", str(ranks)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.strip().rpartition("error: ")[2] or f"{PLAN} failed")
    return done.stdout.splitlines()


def queued(run: RunFolder) -> list[slurm.JobState]:
    """The jobs of a run that may still do something."""
    ids = [job.id for job in job_record.read(run).jobs]
    return [state for state in slurm.states(ids) if slurm.is_queued(state)]


def jobs_of(run: RunFolder) -> list[str]:
    """The jobs of --after's run that may still do something; ValueError where none was ever queued for it."""
    if not job_record.read(run).jobs:
        raise ValueError(f"--after {run.path}: no jobs were queued for it by lathe submit; leave it out")
    return [state.name for state in queued(run)]


def refuse_queued(run: RunFolder) -> None:
    """Refuses a second chain for a run whose first one is still queued."""
    if there := queued(run):
        names = ", ".join(state.name for state in there)
        raise ValueError(
            f"--output {run.path}: its jobs {names} are still queued or running; wait for them, or cancel them with "
            f"lathe jobs {shlex.quote(str(run.path))} --cancel"
        )
