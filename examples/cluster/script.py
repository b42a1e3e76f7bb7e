"""The text of job scripts: everything that a user gave is quoted, for SLURM's lines and for bash."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.cluster.job_record import TRAIN, WATCH
from examples.cluster.options import SubmitOptions
from examples.cluster.slurm import dependency
from examples.cluster.stages import COMPARE, REST, Key, Link, Stage, waits_for


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run's jobs work; all paths are whole ones."""

    home: Path  # Lathe itself
    working: Path  # the directory that relative paths of the recipe start from
    run: Path  # RUN, or that of a sweep
    scripts: Path  # for scripts and logs
    python: str
    job_name: str


def script_path(place: Place, stage: Stage) -> Path:
    """Where the script of a stage is written."""
    return place.scripts / f"{stage.name}.sh"


def log_pattern(place: Place, stage: Stage, job: str = "%j") -> str:
    """The log of a job, with its id or with SLURM's sign for it; %a stands for the task of an array."""
    task, job = ("_%a", job.replace("%j", "%A")) if stage.rates else ("", job)
    return f"{place.scripts}/{stage.name}-{job}{task}.out"


def script_text(options: SubmitOptions, place: Place, stage: Stage, ranks_in_all: int, precision: str) -> str:
    """The script of a stage, for sbatch."""
    helper = "train_job.sh" if stage.name == TRAIN else "stage_job.sh"
    arguments = [shlex.quote(word) for word in stage.command]
    if stage.rates:
        arguments += ["--output", '"$LATHE_RUN"', "--optim.lr", '"${rates[SLURM_ARRAY_TASK_ID]}"']
    lines = [
        "#!/bin/bash",
        *_header(options, place, stage),
        "",
        "# shellcheck disable=SC2016,SC2034  # what was given is taken as it is, and read by what is sourced below",
        *_environment(options.env),
        "set -euo pipefail",
        _export("LATHE_HOME", place.home),
        _export("LATHE_PYTHON", place.python),
        *_run(place, stage),
        *_variables(options, place, stage, ranks_in_all, precision),
        "# shellcheck source=/dev/null",
        " ".join([f'source "$LATHE_HOME/examples/slurm/{helper}"', *arguments]),
    ]
    return "\n".join(lines) + "\n"


def _export(name: str, value: object) -> str:
    return f"export {name}={shlex.quote(str(value))}"


def _environment(env: Path | None) -> list[str]:
    """Reads --env's file on the cluster, so that no token of it stands in a script."""
    if env is None:
        return []
    path = shlex.quote(str(env.resolve()))
    gone = f"[ -r {path} ] || {{ echo 'error: what --env named cannot be read any more' >&2; exit 3; }}"
    return [gone, "set -a", "# shellcheck source=/dev/null", f"source {path}", "set +a"]


def _run(place: Place, stage: Stage) -> list[str]:
    """LATHE_RUN; of a sweep that of its task."""
    if not stage.rates:
        return [_export("LATHE_RUN", place.run)]
    return [
        f"rates=({' '.join(map(repr, stage.rates))})",
        f"folders=({' '.join(f'lr_{rate:g}' for rate in stage.rates)})",
        f'export LATHE_RUN={shlex.quote(str(place.run))}/"${{folders[SLURM_ARRAY_TASK_ID]}}"',
    ]


def _variables(options: SubmitOptions, place: Place, stage: Stage, ranks: int, precision: str) -> list[str]:
    """What else the sourced script reads, see the head of train_job.sh."""
    setup = [options.setup] if options.setup else []
    if stage.name == TRAIN and options.check_nodes:
        setup.append(_node_check(options, place, ranks, precision))
    lines = [_export("LATHE_SETUP", "\n".join(setup))] if setup else []
    if stage.name == TRAIN:
        lines += [_export("LATHE_RANKS", options.ranks), _export("LATHE_RETRIES", options.retries)]
        lines += [_export("LATHE_UNTIL_DONE", 1)] if options.until_done else []
    elif stage.name in ("prepare", WATCH, REST, COMPARE):
        lines.append(_export("LATHE_AT_ONCE", 1) + "  # without a look at the run, which is not done")
    container = _container(options, place)
    return [*lines, f"LATHE_SRUN=({' '.join(map(shlex.quote, container))})"] if container else lines


def _header(options: SubmitOptions, place: Place, stage: Stage) -> list[str]:
    """The lines that sbatch reads. A job takes whole nodes, and all of their memory."""
    given: list[tuple[str, object]] = [
        ("job-name", f"{place.job_name}-{stage.name}"),
        ("account", options.account),
        ("partition", stage.partition),
        ("time", stage.time),
        ("array", f"0-{len(stage.rates) - 1}" if stage.rates else None),
        ("nodes", stage.nodes),
        ("ntasks-per-node", 1),
        ("gpus-per-node", stage.gpus or None),
        ("cpus-per-task", options.cpus_per_task if stage.name == TRAIN else None),
        ("chdir", place.working),
        ("output", log_pattern(_escaped(place), stage)),
        ("open-mode", "append"),  # a job that goes back to the queue keeps what its log says
    ]
    lines = [f"#SBATCH --{name}={_quoted(str(value))}" for name, value in given if value is not None]
    lines += ["#SBATCH --exclusive", "#SBATCH --mem=0", "#SBATCH --requeue"]
    return [*lines, *(f"#SBATCH {_quoted(flag)}" for flag in options.sbatch)]


def _escaped(place: Place) -> Place:
    """The place with its folder of logs as SLURM's patterns of names take it."""
    return Place(**{**vars(place), "scripts": Path(str(place.scripts).replace("%", "%%"))})


def _quoted(value: str) -> str:
    """A word for an #SBATCH line: within its quotes a backslash takes the meaning from quotes and backslashes."""
    plain = all(char.isalnum() or char in "-_./:=,+@%" for char in value)
    return value if plain else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _node_check(options: SubmitOptions, place: Place, ranks: int, precision: str) -> str:
    """A command that looks at a node; it is short where nothing lacks, and fails where something does."""
    doctor = f"{shlex.quote(place.python)} {shlex.quote(str(place.home / 'examples' / 'doctor.py'))}"
    gpus = f" --gpus {options.gpus_per_node}" if options.gpus_per_node else ""
    return f"{doctor} --brief --output {shlex.quote(str(place.run))} --ranks {ranks} --precision {precision}{gpus}"


def _container(options: SubmitOptions, place: Place) -> list[str]:
    """srun's last words before the command: Pyxis' flags, or Apptainer itself, which then starts the command."""
    if options.container is None:
        return []
    mounts = container_mounts(options, place)
    if options.container_runtime == "pyxis":
        flags = [f"--container-image={options.container}", f"--container-mounts={','.join(mounts)}"]
        return [*flags, f"--container-workdir={place.working}"]
    binds = [word for mount in mounts for word in ("--bind", mount)]
    return ["apptainer", "exec", "--nv", "--pwd", str(place.working), *binds, options.container]


def container_mounts(options: SubmitOptions, place: Place) -> list[str]:
    """What a container sees: Lathe, the working directory and RUN at their own places, and what was given."""
    own = dict.fromkeys(map(str, (place.home, place.working)))
    given = [mount if ":" in mount else f"{mount}:{mount}" for mount in options.mounts]
    return [*(f"{path}:{path}" for path in own), *given]


def is_mounted(path: Path, mounts: Sequence[str]) -> bool:
    """Whether a path is seen in a container with these mounts."""
    whole = Path(os.path.abspath(path))
    return any(whole.is_relative_to(mount.split(":")[1]) for mount in mounts)


def sbatch_lines(place: Place, queue: Sequence[Link], outside: Sequence[str]) -> list[str]:
    """Lines of bash that would queue the jobs, with a variable for each id."""
    ids: dict[Key, str] = {link.key: f"${link.stage.name}{link.number}" for link in queue}
    lines = []
    for link in queue:
        flags = [f'"{flag}"' for flag in dependency(**waits_for(link, ids, outside))]
        words = ["sbatch", "--parsable", *flags, shlex.quote(str(script_path(place, link.stage)))]
        lines.append(f"{ids[link.key][1:]}=$({' '.join(words)})")
    return lines
