"""From options and a run's settings to the stages of its workflow, and to who waits for whom: plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.cluster.job_record import TRAIN, WATCH
from examples.cluster.options import STAGES, SubmitOptions

COMPARE = "compare"  # the stage at the end of a sweep
REST = "watch-rest"  # grades what the jobs that watch have left, whose time ends with that of training
Key = tuple[str, int]  # a stage and the number of its job, from 1


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One script, and how often it is queued."""

    name: str
    command: tuple[str, ...]  # of training its flags, of another stage a command of Lathe with its flags
    jobs: int = 1  # one after the other
    nodes: int = 1
    gpus: int = 0  # of each node
    time: str | None = None
    partition: str | None = None
    rates: tuple[float, ...] = ()  # a task of an array for each, of which each is a run of its own


@dataclass(frozen=True, kw_only=True)
class Link:
    """One job that is to be queued, and those that it waits for."""

    stage: Stage
    number: int
    after_success: tuple[Key, ...] = ()
    after_end: tuple[Key, ...] = ()
    after_start: tuple[Key, ...] = ()

    @property
    def key(self) -> Key:
        return self.stage.name, self.number


def plan_stages(options: SubmitOptions, recipe: Path, output: Path, rates: Sequence[float] = ()) -> list[Stage]:
    """The stages in their order. All read `recipe`, which holds the whole workflow; `output` is RUN, or the sweep's."""
    found = []
    for name in options.chosen:
        if name == TRAIN:
            stage = Stage(
                name=name,
                command=(str(recipe),),
                jobs=options.jobs,
                nodes=options.nodes,
                gpus=options.gpus_per_node,
                time=options.time,
                partition=options.partition,
                rates=tuple(rates),
            )
        else:
            command = (STAGES[name], str(recipe), *(("--watch", str(output)) if name == WATCH else ()))
            stage = _one_node(options, name, command)
        found.append(stage)
        if name == WATCH:
            found.append(_one_node(options, REST, (*stage.command, "--once")))
    if rates:
        lrs = ",".join(map(repr, rates))
        found.append(_one_node(options, COMPARE, ("sweep", "--lrs", lrs, "--output", str(output))))
    return [stage for stage in found if stage.jobs]


def _one_node(options: SubmitOptions, name: str, command: tuple[str, ...]) -> Stage:
    generates = name == REST or STAGES.get(name) == "evaluate"
    return Stage(
        name=name,
        command=command,
        jobs=options.jobs if name == WATCH else 1,
        gpus=options.gpus_per_node if generates else options.stage_gpus,
        time=options.time if name == WATCH else options.stage_time,
        partition=options.partition if generates else options.stage_partition or options.partition,
    )


def links(stages: Sequence[Stage]) -> list[Link]:
    """The jobs in the order in which they are queued.

    Training waits until preparing has succeeded, and each of its jobs for the end of the one before, whatever that was:
    it looks itself how the run stands. So does the first later stage, which waits for the end of all training jobs. The
    other later stages wait until the one before has succeeded. A job that watches begins with its training job; what
    is left of its work when both are over is done after all training.
    """
    found: list[Link] = []
    prepared: tuple[Key, ...] = ()
    before: tuple[Key, ...] = ()  # the later stage before
    trained: list[Key] = []
    watched: list[Key] = []
    for stage in stages:
        for number in range(1, stage.jobs + 1):
            if stage.name == TRAIN:
                after_end = tuple(trained[-1:])
                link = Link(stage=stage, number=number, after_success=prepared, after_end=after_end)
                trained.append(link.key)
            elif stage.name == WATCH:
                after_end = ((WATCH, number - 1),) if number > 1 else ()
                link = Link(stage=stage, number=number, after_end=after_end, after_start=((TRAIN, number),))
                watched.append(link.key)
            elif stage.name == REST:
                link = Link(stage=stage, number=number, after_end=(*trained, *watched[-1:]))
            elif before:
                link = Link(stage=stage, number=number, after_success=before)
            else:
                link = Link(stage=stage, number=number, after_success=prepared, after_end=tuple(trained))
            found.append(link)
        if stage.name == "prepare":
            prepared = ((stage.name, 1),)
        elif stage.name not in (TRAIN, WATCH, REST):
            before = ((stage.name, 1),)
    return found


def waits_for(link: Link, ids: Mapping[Key, str], outside: Sequence[str]) -> dict[str, list[str]]:
    """The ids of the jobs that this one waits for, as `slurm.dependency` takes them.

    outside: jobs of another run, for whose end those wait that wait for no job of this one.
    """
    kinds = {"after_success": link.after_success, "after_end": link.after_end, "after_start": link.after_start}
    found = {kind: [ids[key] for key in keys] for kind, keys in kinds.items() if keys}
    return found or {"after_end": list(outside)}
