"""Trains: torchrun --nproc-per-node N examples/pretrain_sft.py [recipe.yaml ...] --model HF --data DATA --output RUN

Without --model and --data the built-in demo runs: a small model with random weights on arithmetic problems.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import multiprocessing
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.config import RunConfig


def parse(arguments: list[str], *, world_size: int, first: bool) -> RunConfig:
    """Parses and checks the arguments, over the built-in demo's settings where they name neither model nor data.

    Processes other than the first keep the parser's message to themselves.
    """
    from engine.check_values import check_values
    from engine.layout import check_ranks
    from examples.demo.builtin import parse_over_demo

    with contextlib.nullcontext() if first else contextlib.redirect_stderr(io.StringIO()):
        config = parse_over_demo(arguments)
    check_values(config)
    check_ranks(config.layout, world_size)
    return config


def with_input(config: RunConfig, *, first: bool) -> RunConfig:
    """The built-in demo with its model and data, which the first process makes while the others wait."""
    if config.model is not None:
        return config
    from examples.demo.builtin import make_input, wait_for_input

    model, data = make_input()[:2] if first else wait_for_input()
    return dataclasses.replace(config, model=str(model), data=(str(data),))


def main(arguments: list[str]) -> int:
    """Parses, checks, trains; returns the exit status. A user's mistake is one sentence from one process."""
    from engine.layout import world_from_environment
    from engine.quiet import silence_libraries

    silence_libraries()  # some read the environment when they are imported
    rank, world_size, _ = world_from_environment()
    try:
        config = parse(arguments, world_size=world_size, first=rank == 0)
    except (ValueError, OSError) as error:
        return refuse(error, rank)
    # What is mistyped has been said: torch and megatron-core take seconds to import.
    import torch

    from engine.checkpointing.checkpoint import CheckpointFailed
    from engine.prepare import prepare_run
    from engine.train import train

    try:
        config = with_input(config, first=rank == 0)
        prepared = prepare_run(config, world_size=world_size, cuda=torch.cuda.is_available())
    except (ValueError, OSError) as error:
        return refuse(error, rank)
    try:
        train(prepared)
    except (CheckpointFailed, FloatingPointError) as error:
        return refuse(error, rank)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        leave_at_once()
    return 0


def refuse(error: Exception, rank: int) -> int:
    """Prints, once, an error that every rank has; returns the exit status."""
    if rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    return 2


def leave_at_once() -> None:
    """Ends this process while others wait for it inside a collective; torchrun then ends them."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(2)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    distributed = sys.modules.get("torch.distributed")  # not there where the arguments were refused
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
    sys.exit(status)
