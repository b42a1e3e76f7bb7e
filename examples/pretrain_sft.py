"""Trains: torchrun --nproc-per-node N examples/pretrain_sft.py [recipe.yaml ...] --model HF --data DATA --output RUN

Without --model and --data the built-in demo runs: a small model with random weights on arithmetic problems.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
import sys
import traceback
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from engine.config import RunConfig
    from engine.prepare import Prepared
    from engine.run_folder import RunFolder


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
    from engine.signals import hear_early

    hear_early()
    silence_libraries()  # some read the environment when they are imported
    rank, world_size, _ = world_from_environment()
    folder = None
    try:
        prepared = prepare(arguments, rank, world_size)
        if isinstance(prepared, int):
            return prepared
        folder = prepared.run
        return run(prepared, rank)
    except (Exception, KeyboardInterrupt) as error:
        fail(folder or folder_of(arguments), rank, error)


def prepare(arguments: list[str], rank: int, world_size: int) -> Prepared | int:
    """The run that the arguments describe, checked, or the exit status where there is none."""
    config = parse_or_refuse(arguments, rank, world_size)
    if isinstance(config, int):
        return config
    from engine import cuda_setup
    from engine.run_folder import RunFolder

    try:
        dumps = RunFolder(config.output).collectives
        cuda_setup.apply(config.layout, deterministic=config.deterministic, dumps=dumps)
    except ValueError as error:
        return refuse(arguments, str(error), rank)
    # What is mistyped has been said: torch and megatron-core take seconds to import.
    import torch

    from engine.prepare import prepare_run

    try:
        config = with_input(config, first=rank == 0)
        return prepare_run(config, world_size=world_size, cuda=torch.cuda.is_available())
    except (ValueError, OSError) as error:
        return refuse(arguments, str(error), rank)


def parse_or_refuse(arguments: list[str], rank: int, world_size: int) -> RunConfig | int:
    """The configuration, or the exit status where it is wrong, or where only help was asked for."""
    try:
        return parse(arguments, world_size=world_size, first=rank == 0)
    except SystemExit as error:  # the parser's own, which has printed what is mistyped
        return refuse(arguments, "a flag is mistyped", rank, printed=True) if error.code else 0
    except (ValueError, OSError) as error:
        return refuse(arguments, str(error), rank)


def run(prepared: Prepared, rank: int) -> int:
    """Trains; returns the exit status, or ends this process where others wait for it in vain."""
    from engine.checkpointing.saver import CheckpointFailed
    from engine.run_status import FAILED, REFUSED, Refused, tell
    from engine.train import train

    try:
        train(prepared)
        return 0
    except Refused as error:
        tell(prepared.run, rank, str(error), state=REFUSED, met=True)
        return 2
    except (CheckpointFailed, FloatingPointError) as error:
        tell(prepared.run, rank, str(error), state=FAILED, met=True, lasting=True)
        return 2
    except (ValueError, OSError) as error:
        nameless = isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None
        sentence = f"{error}{f': {prepared.run.path}' * nameless}"
        tell(prepared.run, rank, sentence, state=FAILED, alone=True, lasting=True)
        leave_at_once(2)


def fail(folder: RunFolder | None, rank: int, error: BaseException) -> NoReturn:
    """Says what is nobody's mistake, with its traceback, or that the run was interrupted; ends this process."""
    from engine.run_status import FAILED, tell

    if isinstance(error, KeyboardInterrupt):
        tell(folder, rank, "interrupted", state=FAILED)
        raise error
    words = f"{type(error).__name__}: {error}".splitlines()[0]
    details = "".join(traceback.format_exception(error))
    tell(folder, rank, words, state=FAILED, details=details, alone=True)
    leave_at_once(1)


def refuse(arguments: list[str], sentence: str, rank: int, *, printed: bool = False) -> int:
    """Says, once, what every rank finds wrong before the ranks meet; returns the exit status."""
    from engine.run_status import REFUSED, tell
    from engine.signals import is_ended

    tell(folder_of(arguments), rank, sentence, state=REFUSED, printed=printed, is_ended=is_ended)
    return 2


def folder_of(arguments: list[str]) -> RunFolder | None:
    """RUN, as far as arguments that are perhaps wrong name it."""
    from engine.cli import read_files, take_files
    from engine.run_folder import RunFolder

    files, flags = take_files(arguments)
    for number, flag in enumerate(flags):
        name, equals, value = flag.partition("=")
        if name == "--output" and (equals or number + 1 < len(flags)):
            return RunFolder(value if equals else flags[number + 1])
    try:
        output = read_files(files).get("output")
    except (ValueError, OSError):
        return None
    return RunFolder(output) if isinstance(output, str) else None


def leave_at_once(status: int) -> NoReturn:
    """Ends this process while others wait for it inside a collective; torchrun then ends them."""
    os._exit(status)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    from engine.signals import hear_no_more

    hear_no_more()
    distributed = sys.modules.get("torch.distributed")  # not there where the arguments were refused
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
    sys.exit(status)
