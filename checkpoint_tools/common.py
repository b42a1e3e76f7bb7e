"""What the scripts of this folder share: errors as one sentence, a progress bar, and a checkpoint's manifest.

They import torch within their functions, after the command line: `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import inspect
import math
import signal
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from engine.checkpointing.workers import Advance, Bar
from engine.cli import convert, read_section, take_files, unknown
from models.description import ModelDescription

if TYPE_CHECKING:
    import torch


def bar(title: str, total_bytes: int) -> Bar:
    """A progress bar that is still to be opened."""
    return partial(_progress, title, total_bytes)


def manifest(description: ModelDescription, dtype: torch.dtype, step: int) -> dict[str, Any]:
    """What lathe.json says of a checkpoint that holds weights only."""
    from engine.checkpointing.hf_export import dtype_name

    return {
        "step": step,
        "family": description.family,
        "source_dtype": dtype_name(dtype),
        "precision": dtype_name(dtype),
        "vocab_size": description.vocab_size,
        "padded_vocab_size": description.padded_vocab_size,
        "tied": description.tied,
    }


def total_bytes(description: ModelDescription, dtype: torch.dtype) -> int:
    """The size of a model's megatron tensors."""
    return sum(math.prod(rule.shape) * dtype.itemsize for rule in description.rules)


def run_script(main: Callable[..., int | None], arguments: list[str], section: str = "") -> int:
    """Run a script's function from its command line; a user's mistake is one sentence and exit status 2.

    With a `section`, recipes may stand before the flags; what that section of theirs says holds where no flag does.
    """
    # As an exception, so that a terminated job removes its partial output.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        takes_recipe = section and not (arguments and Path(arguments[0]).is_dir())  # which stands for a flag itself
        files, flags = take_files(arguments) if takes_recipe else ([], arguments)
        if files:
            main = partial(main, **_values(main, read_section(files, section), section))
        return tyro.cli(main, args=flags) or 0
    except (ValueError, OSError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, OSError) and error.filename:
            text = f"{text}: {error.filename}"
        print(f"error: {text}", file=sys.stderr)
        return 2


def check_section(main: Callable[..., int | None], files: Sequence[Path], section: str) -> None:
    """Reads a recipe's section as `run_script` will; ValueError for what is wrong or missing there."""
    values = _values(main, read_section(files, section), section)
    for name, parameter in inspect.signature(main).parameters.items():
        if parameter.default is parameter.empty and name not in values:
            raise ValueError(f"the section `{section}:` lacks {name}")


def _values(main: Callable[..., int | None], given: dict[str, Any], section: str) -> dict[str, Any]:
    """A section's values as the parameters of the script's function; ValueError for a key that is none of them."""
    known, values = list(inspect.signature(main).parameters), {}
    hints = typing.get_type_hints(main)
    for name, value in given.items():
        if name not in known:
            raise ValueError(unknown(f"{section}.{name}", [f"{section}.{one}" for one in known], "recipe key"))
        several = typing.get_origin(hints[name]) is tuple
        text = ",".join(map(str, value)) if isinstance(value, list) and not several else value
        if text is None and type(None) not in typing.get_args(hints[name]):
            raise ValueError(f"recipe key {section}.{name} has no value; give one, or leave it out")
        values[name] = convert(text, hints[name], f"{section}.{name}")
    return values


@contextmanager
def _progress(title: str, total_bytes: int) -> Iterator[Advance]:
    """A bar on stderr; yields the function that moves it by a number of bytes."""
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total_bytes)
        yield lambda count: progress.advance(task, count)
