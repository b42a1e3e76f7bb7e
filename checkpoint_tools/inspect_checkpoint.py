"""Show what a checkpoint, a torch_dist directory or a Hugging Face directory holds.

python checkpoint_tools/inspect_checkpoint.py PATH [--match PATTERN]
"""

import fnmatch
from pathlib import Path

import torch
import tyro

from checkpoint_tools.common import dtype_name, run
from engine.checkpoint_format import MANIFEST, STATE, read_manifest
from engine.tensor_store import StoreReader
from models.hf_io import HFReader


def main(path: tyro.conf.Positional[Path], match: str = "*") -> None:
    """Print every tensor's name, shape and dtype, and the number of parameters.

    Args:
        path: a checkpoint, a torch_dist directory, or a Hugging Face directory.
        match: show only names that match this pattern, e.g. "*linear_qkv*".
    """
    tensors = list_tensors(path)
    shown = {name: entry for name, entry in tensors.items() if fnmatch.fnmatchcase(name, match)}
    width = max((len(name) for name in shown), default=0)
    for name, (shape, dtype) in shown.items():
        print(f"{name:<{width}}  {dtype_name(dtype):<9} {list(shape)}")
    optimizer = {name for name in shown if name.startswith("optimizer.")}
    for title, names in (("model", shown.keys() - optimizer), ("optimizer", optimizer)):
        if names or title == "model":
            numel = sum(torch.Size(shown[name][0]).numel() for name in names)
            size = sum(torch.Size(shown[name][0]).numel() * shown[name][1].itemsize for name in names)
            what = "parameters, vocabulary padding included" if title == "model" else "numbers"
            print(f"{title}: {len(names)} tensors, {numel:,} {what}, {size:,} bytes")


def list_tensors(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) by name. Raises ValueError for a directory of no known kind."""
    reader: StoreReader | HFReader
    if (path / MANIFEST).exists():
        meta = read_manifest(path)
        print(", ".join(f"{name} {value}" for name, value in meta.items() if name != "files"))
        reader = StoreReader(path / STATE)
    elif (path / ".metadata").exists():
        reader = StoreReader(path)
    else:
        reader = HFReader(path)
    names = reader.keys() if isinstance(reader, StoreReader) else reader.names()
    return {name: (reader.shape(name), reader.dtype(name)) for name in names}


if __name__ == "__main__":
    run(main)
