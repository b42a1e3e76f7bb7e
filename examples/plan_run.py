"""Says what a run will hold in memory, before anyone asks for a cluster: needs a config.json, no weights, no GPU.

python examples/plan_run.py [recipe.yaml ...] --ranks 64 [--model DIR] [any flag of pretrain_sft.py]
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

from examples.flags import exit_status, take_flag

GIB = 2**30


def find_config(model: str | None) -> Path:
    """The directory of --model's config.json, which comes from the hub where there is no such directory."""
    if model is None:
        raise ValueError("--model is missing: give a directory with a config.json, or a hub name")
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "config.json")).parent
    except Exception as error:
        raise ValueError(
            f"--model {model} is no local directory and could not be downloaded from the hub ({type(error).__name__})"
        ) from None


def take_ranks(arguments: list[str]) -> tuple[int, list[str]]:
    """Takes `--ranks N` out of the arguments."""
    value, rest = take_flag(arguments, "--ranks")
    if value is None:
        raise ValueError("--ranks is missing: give how many processes the run will have")
    if not value.isdecimal() or not int(value):
        raise ValueError(f"--ranks {value}: give how many processes the run will have")
    return int(value), rest


def plan(arguments: list[str]) -> None:
    """Checks the run and prints a line a pipeline stage."""
    from engine.check_values import check_values
    from engine.cli import parse_run
    from engine.layout import check_ranks

    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        parse_run(["--help"])
    ranks, arguments = take_ranks(arguments)
    config = parse_run(arguments)
    check_values(dataclasses.replace(config, model=config.model or "MODEL", data=config.data or ("DATA",)))
    check_ranks(config.layout, ranks)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nothing is computed; torch reads it when it is imported
    from engine.quiet import silence_libraries

    silence_libraries()
    from engine.base_model import config_overrides
    from engine.rehearsal.memory import plan_memory
    from models.hf_config import describe

    description = describe(find_config(config.model), overrides=config_overrides(config.override, 0, 0))
    stages = plan_memory(config, description, ranks)
    print(f"{config.model}: {config.layout.product(ranks)}, GiB per rank")
    print("stage  layers  parameters  gradients  optimizer     sum")
    for one in stages:
        parts = (one.parameters, one.gradients, one.optimizer, one.total)
        cells = [f"{part / GIB:{width}.2f}" for part, width in zip(parts, (12, 11, 11, 8), strict=True)]
        print(f"{one.stage:5d}{one.layers:8d}" + "".join(cells))
    print("Activations come on top: --recompute selective keeps fewer of them, --recompute full a layer's input alone.")


def main(arguments: list[str]) -> int:
    """Plans a run; returns the exit status. A user's mistake is one sentence."""
    return exit_status(lambda: plan(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
