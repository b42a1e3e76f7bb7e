"""Trains: torchrun --nproc-per-node N examples/pretrain_sft.py [recipe.yaml ...] --model HF --data DATA --output RUN

Without --model and --data the built-in demo runs: a small model with random weights on arithmetic problems.
"""

import dataclasses
import os
import sys

from engine.quiet import silence_libraries

silence_libraries()

import torch

from engine.cli import parse_run
from engine.config import RunConfig
from engine.mesh import world_from_environment


def built_in(arguments: list[str], *, first: bool) -> RunConfig:
    """The built-in demo under the given flags; the first process makes its input, the others wait."""
    from examples.demo.builtin import DEMO, make_input, wait_for_input

    config = parse_run(arguments, DEMO)
    model, data = make_input()[:2] if first else wait_for_input()
    return dataclasses.replace(config, model=str(model), data=(str(data),))


def main(arguments: list[str]) -> int:
    """Parses, checks, trains; returns the exit status. A user's mistake is one sentence from one process."""
    rank, world_size, _ = world_from_environment()
    try:
        config = parse_run(arguments)
        if config.model is None and not config.data:
            config = built_in(arguments, first=rank == 0)
        from engine.run import prepare_run
        from engine.train import train

        train(prepare_run(config, world_size=world_size, cuda=torch.cuda.is_available()))
    except (ValueError, FloatingPointError) as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:
        # Other ranks wait for this one inside a collective: leave at once, torchrun ends them.
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(status)
