"""From options and a run's settings to the stages of its workflow, and to who waits for whom: plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.cluster.job_record import TRAIN
from examples.cluster.options import STAGES, SubmitOptions

COMPARE = "compare"  # the stage at the end of a sweep
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
            command = (STAGES[name], str(recipe))
            stage = _one_node(options, name, command, options.gpus_per_node if name == "evaluate" else None)
        found.append(stage)
    if rates:
        lrs = ",".join(map(repr, rates))
        found.append(_one_node(options, COMPARE, ("sweep", "--lrs", lrs, "--output", str(output))))
    return [stage for stage in found if stage.jobs]


def _one_node(options: SubmitOptions, name: str, command: tuple[str, ...], gpus: int | None = None) -> Stage:
    return Stage(
        name=name,
        command=command,
        gpus=options.stage_gpus if gpus is None else gpus,
        time=options.stage_time,
        partition=options.stage_partition or options.partition,
    )


def links(stages: Sequence[Stage]) -> list[Link]:
    """The jobs in the order in which they are queued.

    Training waits until preparing has succeeded, and each of its jobs for the end of the one before, whatever that was:
    it looks itself how the run stands. So does the first later stage, which waits for the end of all training jobs. The
    other later stages wait until the one before has succeeded.
    """
    found: list[Link] = []
    prepared: tuple[Key, ...] = ()
    before: tuple[Key, ...] = ()  # the later stage before
    trained: list[Key] = []
    for stage in stages:
        for number in range(1, stage.jobs + 1):
            if stage.name == TRAIN:
                after_end = tuple(trained[-1:])
                link = Link(stage=stage, number=number, after_success=prepared, after_end=after_end)
                trained.append(link.key)
            elif before:
                link = Link(stage=stage, number=number, after_success=before)
            else:
                link = Link(stage=stage, number=number, after_success=prepared, after_end=tuple(trained))
            found.append(link)
        if stage.name == "prepare":
            prepared = ((stage.name, 1),)
        elif stage.name != TRAIN:
            before = ((stage.name, 1),)
    return found


def waits_for(link: Link, ids: Mapping[Key, str], outside: Sequence[str]) -> tuple[list[str], list[str]]:
    """The ids of the jobs that must succeed before this one, and of those that must end.

    outside: jobs of another run, for which those wait that wait for no job of this one.
    """
    success, end = ([ids[key] for key in keys] for keys in (link.after_success, link.after_end))
    return success, end if success or end else list(outside)
