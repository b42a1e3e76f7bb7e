"""What the scripts of this folder share: errors as one sentence, progress, and opening a checkpoint."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
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

from engine.checkpoint_format import HF, STATE, read_manifest
from engine.tensor_store import StoreReader, master_key
from models.registry import ModelDescription, describe
from models.rules import Index

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was found complete, and whose model tensors are just those of its family's rules."""

    path: Path
    meta: dict[str, Any]
    description: ModelDescription
    store: StoreReader

    def read(self, key: str, index: Index, dtype: torch.dtype) -> torch.Tensor:
        """A slice of a model tensor; from the fp32 master weights where `dtype` holds more than the model's."""
        if dtype.itemsize > self.store.dtype(key).itemsize:
            key = master_key(self.store, key) or key
        return self.store.read(key, index).to(dtype)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a step directory; ValueError where it is incomplete or its tensors do not fit the model."""
    meta = read_manifest(path)
    description = describe(path / HF)
    store = StoreReader(path / STATE)
    expected = {rule.key: rule.shape for rule in description.rules}
    present = {key for key in set(store.keys()) if not key.startswith("optimizer.")}
    for verb, keys in (("lacks", expected.keys() - present), ("has unknown", present - expected.keys())):
        if keys:
            names = ", ".join(sorted(keys)[:5])
            raise ValueError(f"{path} {verb} {len(keys)} tensor(s) of {description.family}: {names}")
    for key, shape in expected.items():
        if store.shape(key) != shape:
            raise ValueError(f"{path}: {key} has shape {list(store.shape(key))} instead of {list(shape)}")
    return Checkpoint(path=path, meta=meta, description=description, store=store)


def dtype_of(name: str, meta: dict[str, Any]) -> torch.dtype:
    """The dtype that `--dtype` names: `source` is the one that the Hugging Face model had."""
    return getattr(torch, meta["source_dtype"]) if name == "source" else DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def progress(title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; yields the function that moves it by a number of bytes."""
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total_bytes)
        yield lambda count: bar.advance(task, count)


def run(main: Callable[..., None]) -> None:
    """Run a script's function from its command line; a user's mistake is one sentence and exit status 2."""
    # As an exception, so that a terminated job removes its partial output.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        tyro.cli(main)
    except (ValueError, OSError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, OSError) and error.filename:
            text = f"{text}: {error.filename}"
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)
