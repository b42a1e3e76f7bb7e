"""What `lathe submit` is told: flags, over the section `submit` of a recipe."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from engine.cli import merge, read_files, take_files, unknown

# The stages of a workflow in their order, and the command and section of a recipe that make each.
STAGES = {
    "prepare": "prepare",
    "train": "train",
    "watch": "evaluate",  # --watch RUN: what training exports is graded beside it
    "average": "average",
    "export": "to-hf",
    "evaluate": "evaluate",
    "publish": "publish",
}
_TIMES = (  # what SLURM takes as a time, and the seconds of each part
    (r"(\d+)", (60,)),
    (r"(\d+):(\d+)", (60, 1)),
    (r"(\d+):(\d+):(\d+)", (3600, 60, 1)),
    (r"(\d+)-(\d+)", (86400, 3600)),
    (r"(\d+)-(\d+):(\d+)", (86400, 3600, 60)),
    (r"(\d+)-(\d+):(\d+):(\d+)", (86400, 3600, 60, 1)),
)


@dataclass(frozen=True, kw_only=True)
class SubmitOptions:
    """Queues a workflow on a SLURM cluster: lathe submit RECIPE [recipe.yaml ...] [options] [-- flags of training].

    A section `submit:` of the recipe takes the same options.
    """

    stages: str = "train"
    """What is done, separated by commas: prepare, train, watch, average, export, evaluate, publish."""
    jobs: int = 1
    """Training jobs, one after the other; those left once the run is done end at once. 0: only the stages behind."""
    until_done: bool = False
    """One training job instead, which goes back to the queue at its time limit until the run is done."""
    lrs: str | None = None
    """Learning rates separated by commas: each is a run of its own in OUTPUT/lr_RATE, and all are compared."""
    after: Path | None = None
    """Another run, whose queued jobs must have ended first."""

    nodes: int = 1
    """Nodes of a training job."""
    gpus_per_node: int = 8
    """GPUs asked of SLURM on each node; 0 asks for none."""
    ranks_per_node: int | None = None
    """Processes on each node; unless given, one for each GPU."""
    cpus_per_task: int | None = None
    """Cores of a node; unless given, all."""
    time: str | None = None
    """Time limit of a training job as SLURM writes it, e.g. 4:00:00; unless given, the partition's."""
    stage_time: str | None = None
    """The same for a stage behind or before training."""
    account: str | None = None
    """Who pays."""
    partition: str | None = None
    """Of all jobs; unless given, the cluster's own."""
    stage_partition: str | None = None
    """Of stages that need no GPUs; unless given, the same."""
    stage_gpus: int = 0
    """GPUs of stages that need none, for partitions that lend no node without."""
    job_name: str | None = None
    """Begins the names of the jobs; unless given, the name of OUTPUT."""
    sbatch: tuple[str, ...] = ()
    """More flags for sbatch, in all jobs: --sbatch=--qos=high."""
    retries: int = 3
    """How often a job goes back to the queue by itself after it was killed."""

    container: str | None = None
    """Image in which nodes run everything: a path, or what the runtime takes."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """What starts containers: Pyxis with Enroot, or Apptainer."""
    mounts: tuple[str, ...] = ()
    """Directories for the container, DIR or DIR:DIR-INSIDE. Lathe and the working directory are mounted anyway."""
    python: str | None = None
    """Interpreter on the nodes; unless given, this one, or a container's python3."""
    env: Path | None = None
    """A file of bash that sets variables for all jobs, tokens too; it is read when a job starts."""
    setup: str | None = None
    """A command that every node runs first, e.g. `module load cuda`."""
    check_nodes: bool = True
    """Before training, let `lathe doctor` look at every node."""
    dry_run: bool = False
    """Show the scripts and the sbatch lines, and queue and write nothing."""

    @property
    def ranks(self) -> int:
        """Processes on each node."""
        return self.gpus_per_node if self.ranks_per_node is None else self.ranks_per_node

    @property
    def chosen(self) -> list[str]:
        """The stages that are asked for, in the order of a workflow; of --jobs 0 those behind training."""
        given = {part.strip() for part in self.stages.split(",")}
        if not self.jobs:
            given -= {"prepare", "train", "watch"}
        return [stage for stage in STAGES if stage in given]


def read_options(arguments: Sequence[str]) -> tuple[SubmitOptions, list[Path], list[str]]:
    """`RECIPE [...] [flags] [-- flags of training]` -> options, recipes and flags of training.

    ValueError, in one sentence, for what is wrong.
    """
    cut = list(arguments).index("--") if "--" in arguments else len(arguments)
    files, flags = take_files(arguments[:cut])
    more, training = take_files(arguments[cut + 1 :])
    files += more
    given = read_files(files).get("submit")
    if not isinstance(given, dict | None):
        raise ValueError(f"{files[-1]}: `submit:` takes keys of its own, not {given!r}")
    defaults = merge(SubmitOptions(), given or {}, "submit.")
    options, rest = tyro.cli(SubmitOptions, args=flags, default=defaults, prog="lathe submit", return_unknown_args=True)
    if rest:
        raise ValueError(_misplaced(rest[0]))
    if not files and "train" in options.chosen and not training:
        raise ValueError("no recipe is given: lathe submit RECIPE [flags] [-- flags of training]")
    check_options(options)
    return options, files, training


def _misplaced(word: str) -> str:
    """The sentence about a word that submit does not take."""
    if not word.startswith("-"):
        return f"{word} belongs to no flag; recipes stand before all flags: lathe submit RECIPE [flags]"
    name = word.partition("=")[0]
    own = [f"--{field.replace('_', '-')}" for field in SubmitOptions.__dataclass_fields__]
    return (
        f"{unknown(name, own, 'flag of submit')}; flags of training stand behind --: lathe submit RECIPE -- {name} ..."
    )


def seconds(time: str) -> int | None:
    """The seconds of a time as SLURM writes it; None for no time."""
    for pattern, parts in _TIMES:
        if match := re.fullmatch(pattern, time):
            return sum(int(number) * part for number, part in zip(match.groups(), parts, strict=True))
    return None


def check_options(options: SubmitOptions) -> None:
    """Refuses values that cannot be meant; ValueError in one sentence that names flag, value and mend."""
    for name in (part.strip() for part in options.stages.split(",")):
        if name not in STAGES:
            raise ValueError(f"--stages {options.stages}: {unknown(name, list(STAGES), 'stage')}")
    for name, least in (("nodes", 1), ("jobs", 0), ("gpus_per_node", 0), ("stage_gpus", 0), ("retries", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least {least}")
    if options.ranks < 1:
        raise ValueError(f"--gpus-per-node {options.gpus_per_node} gives a node no rank: add --ranks-per-node")
    if options.cpus_per_task is not None and options.cpus_per_task < 1:
        raise ValueError(f"--cpus-per-task {options.cpus_per_task} must be at least 1")
    for name in ("time", "stage_time"):
        given = getattr(options, name)
        if given is not None and not seconds(given):
            raise ValueError(f"--{name.replace('_', '-')} {given}: give minutes, or D-HH:MM:SS, e.g. 4:00:00")
    _check_stages(options)
    _check_texts(options)
    if options.env is not None and not options.env.is_file():
        raise ValueError(f"--env {options.env}: there is no such file")
    if options.mounts and options.container is None:
        raise ValueError(f"--mounts {options.mounts[0]} is for a container: add --container IMAGE")


def _check_stages(options: SubmitOptions) -> None:
    later = [stage for stage in options.chosen if stage not in ("prepare", "train")]
    if options.until_done and options.jobs != 1:
        raise ValueError(f"--until-done is one job that goes on; leave --jobs {options.jobs} out")
    if options.jobs == 0 and not later:
        raise ValueError("--jobs 0 leaves nothing to queue: name later stages in --stages, e.g. average,evaluate")
    if options.lrs is not None and (later or "train" not in options.chosen):
        raise ValueError(
            f"--lrs {options.lrs} trains several runs and compares them: give --stages train, or prepare,train, and "
            "queue later stages of the best one with --jobs 0"
        )


def _check_texts(options: SubmitOptions) -> None:
    """Texts that end up in lines of SLURM's own syntax."""
    for name in ("account", "partition", "stage_partition", "job_name", "container"):
        given = getattr(options, name)
        if given is not None and (not given or not given.isprintable()):
            raise ValueError(f"--{name.replace('_', '-')} {given!r} is no name")
    for mount in options.mounts:
        if "," in mount or not mount.startswith("/") or not all(part.startswith("/") for part in mount.split(":")[:2]):
            raise ValueError(f"--mounts {mount}: give DIR or DIR:DIR-INSIDE, whole paths without a comma")
    for flag in options.sbatch:
        if not flag.startswith("-") or not flag.isprintable():
            raise ValueError(f"--sbatch {flag}: give a flag of sbatch with its dashes, e.g. --sbatch=--qos=high")
    if options.setup is not None:
        checked = subprocess.run(["bash", "-n", "-c", options.setup], capture_output=True, text=True)
        if checked.returncode:
            raise ValueError(f"--setup {options.setup}: bash does not read it: {checked.stderr.strip()}")
