"""Whether the stages beside training can work: what the recipe says of each, and what each will find when it begins."""

from __future__ import annotations

import glob
import importlib
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.cli import read_section
from engine.config import CheckpointConfig, RunConfig
from engine.run_folder import RunFolder
from examples.cluster.job_record import TRAIN
from examples.cluster.options import STAGES, SubmitOptions

# What can only be a file: no data set of the hub is called so. `data.preparation.files` reads names in this way.
_LOCAL = re.compile(r"[/.~].*|.*[*?\[].*|.*/.*/.*|.*\.(jsonl?|ndjson|[ct]sv|parquet|arrow|feather)(\.(gz|zst))?")


def check_sections(options: SubmitOptions, config: RunConfig, recipe: str) -> None:
    """Reads what the recipe says of each stage as that stage will; ValueError for what is missing, wrong or in vain."""
    made = [Path(config.output), *([options.after] if options.after else [])]  # where files may still appear
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(recipe, encoding="utf-8")
        try:
            for stage in options.chosen:
                if stage != TRAIN:
                    made += _check_stage(stage, path, options, config, made)
        except ValueError as error:
            raise ValueError(f"--stages {options.stages}: {str(error).replace(str(path), 'the recipe')}") from None


def _check_stage(
    stage: str, recipe: Path, options: SubmitOptions, config: RunConfig, made: Sequence[Path]
) -> list[Path]:
    """Checks one stage; returns where it writes. made: where earlier stages do."""
    from checkpoint_tools.common import check_section
    from examples.lathe import COMMANDS

    command, section = STAGES[stage], STAGES[stage].replace("-", "_")
    values = read_section([recipe], section)
    module = importlib.import_module(COMMANDS[command][0])
    if command == "prepare":
        given = module.read_options([str(recipe)])
        check_files("prepare.sources", [source.data for source in given.each_source()], options, made)
        check_files("prepare.decontaminate", given.decontaminate, options, made)
    elif command == "evaluate":
        given = module.read_options([str(recipe)])
        _check_evaluation(given)
        check_files("evaluate.data", [given.data], options, made)
    else:
        check_section(module.main, [recipe], section)
    if stage == "average":
        check_average(values, options, config)
    return [Path(values["output"])] if values.get("output") else []


def _check_evaluation(given: Any) -> None:
    """Checks an evaluation, whose model the run is still to make."""
    from examples.evaluation.options import check_options

    check_options(replace(given, model="run/model"))


def check_files(key: str, names: Sequence[str], options: SubmitOptions, made: Sequence[Path]) -> None:
    """Refuses local files that are not there, unless they lie where the workflow itself still writes."""
    for name in names:
        base = name if Path(name).exists() else name.split(":")[0]  # DIRECTORY:CONFIG:SPLIT
        if not _LOCAL.fullmatch(base):
            continue
        whole = Path(os.path.abspath(os.path.expanduser(base)))
        if any(whole.is_relative_to(os.path.abspath(folder)) for folder in made):
            continue
        here = _outside(whole, options)
        if here is not None and not here.exists() and not glob.glob(str(here), recursive=True):
            raise ValueError(f"{key} {name}: there is no such file; name one that is there, or a data set of the hub")


def _outside(path: Path, options: SubmitOptions) -> Path | None:
    """Where a path that jobs use lies on this machine; None for one that only the container's image may have."""
    if options.container is None:
        return path
    for mount in options.mounts:
        folder, *inside = mount.split(":")
        if path.is_relative_to(seen := (inside or [folder])[0]):
            return Path(folder) / path.relative_to(seen)
    return path if path.is_relative_to(Path.cwd()) else None


def check_average(section: dict[str, Any], options: SubmitOptions, config: RunConfig) -> None:
    """Refuses steps of which there will be no checkpoint when training is over."""
    from checkpoint_tools.average_steps import find_steps

    text = ",".join(map(str, section["steps"])) if isinstance(section["steps"], list) else str(section["steps"])
    run = RunFolder(section["run"])
    own = run.path.resolve() == Path(config.output).resolve()
    if TRAIN in options.chosen:
        if own:
            check_steps(_numbers(text), run, config)
    elif own or options.after is None:  # nothing is trained: what is there decides
        try:
            find_steps(run.path, text)
        except ValueError as error:
            raise ValueError(f"average.steps {text}: {str(error).removeprefix(f'--steps {text}: ')}") from None


def _numbers(text: str) -> list[int]:
    try:
        wanted = [int(step) for step in text.split(",")]
    except ValueError:
        raise ValueError(f"average.steps {text}: give step numbers separated by commas, e.g. 100,200") from None
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"average.steps {text}: a step is named twice")
    return wanted


def check_steps(wanted: Sequence[int], run: RunFolder, config: RunConfig) -> None:
    """Refuses steps that a run will not reach, not save or not keep.

    Where epochs set its length, the last of `wanted` is taken for its end: as little as that is removed then.
    """
    from engine.retention import to_remove

    keeps = config.checkpoint
    there, begun = _found(run, keeps)
    end, every = config.steps or max(wanted), keeps.every
    if late := [step for step in wanted if step > end]:
        raise ValueError(f"average.steps {_list(late)}: the run ends at --steps {end}; name earlier steps")
    if lost := [step for step in wanted if step <= begun and step not in there]:
        raise ValueError(
            f"average.steps {_list(lost)}: the run has come to step {begun} and has no checkpoint there; "
            f"its checkpoints: {_list(there) or 'none'}"
        )
    saved = {*there, end, *(range(every, end + 1, every) if every else ())}
    if unsaved := [step for step in wanted if step not in saved]:
        writes = "its multiples and the last step" if every else "the last step alone"
        raise ValueError(
            f"average.steps {_list(unsaved)}: not saved, as --checkpoint.every {every} saves {writes}; name such "
            "steps, or set another number"
        )
    if keeps.keep_best:  # which ones these are shows in training
        return
    gone = to_remove(
        [step for step in saved if step in there or step > begun],
        latest=end,
        keep=keeps.keep,
        keep_every=keeps.keep_every,
    )
    if removed := [step for step in wanted if step in gone]:
        raise ValueError(
            f"average.steps {_list(removed)}: removed before training ends, as --checkpoint.keep {keeps.keep} keeps "
            "the newest alone; give --checkpoint.keep 0, which keeps all, or name later steps"
        )


def _found(run: RunFolder, keeps: CheckpointConfig) -> tuple[list[int], int]:
    """The checkpoints that training finds and leaves where they are, and the step from which it goes on."""
    from engine.retention import is_rescue

    paths = run.checkpoint_steps() if keeps.resume else {}
    paths = {step: path for step, path in paths.items() if keeps.resume_from is None or step <= keeps.resume_from}
    return [step for step, path in paths.items() if not is_rescue(path)], max(paths, default=0)


def _list(steps: Sequence[int]) -> str:
    return ",".join(map(str, steps))
