"""RUN/jobs.json: which jobs were queued for a run, for what, after which others, and where their logs are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from engine.run_folder import RunFolder, replace_text

TRAIN, WATCH = "train", "watch"  # the stage whose jobs make up a chain, and the one that grades beside it


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job that was queued."""

    id: str
    stage: str  # "train", "average" and so on
    number: int = 1  # of its chain, from 1
    of: int = 1  # jobs in its chain
    after: tuple[str, ...] = ()  # ids of the jobs that it waits for
    script: str = ""
    log: str = ""  # its output; %a stands for the number of a task of an array
    submitted: str = ""  # the time with its zone


@dataclass(frozen=True, kw_only=True)
class Record:
    """All jobs that were queued for a run, the oldest first, and the command that queued the last ones."""

    command: tuple[str, ...] = ()
    jobs: tuple[Job, ...] = field(default=())


def read(run: RunFolder) -> Record:
    """What jobs.json says; nothing where there is none. ValueError where it cannot be read as what it should be."""
    try:
        found = json.loads(run.jobs.read_text(encoding="utf-8"))
        known = {one.name for one in fields(Job)}
        jobs = [{name: value for name, value in job.items() if name in known} for job in found["jobs"]]
        return Record(
            command=tuple(found["command"]),
            jobs=tuple(Job(**job | {"after": tuple(job.get("after", ()))}) for job in jobs),
        )
    except FileNotFoundError:
        return Record()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{run.jobs} is damaged ({error}): `squeue` tells which jobs there are; remove it") from None


def append(run: RunFolder, command: Sequence[str], job: Job) -> None:
    """Adds a job as soon as it has an id, in one move: it may start before the next one is queued."""
    record = read(run)
    jobs = [asdict(one) for one in (*record.jobs, job)]
    replace_text(run.jobs, json.dumps({"command": list(command), "jobs": jobs}, indent=1) + "\n")


def log_paths(job: Job) -> list[Path]:
    """The logs of a job that are there, one for each task of an array."""
    path = Path(job.log)
    return sorted(path.parent.glob(path.name.replace("%a", "*"))) if job.log else []
