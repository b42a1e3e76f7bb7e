"""Show what a checkpoint, a torch_dist directory or a Hugging Face directory holds, or how two of them differ.

python checkpoint_tools/inspect_checkpoint.py PATH [OTHER] [--match PATTERN] [--num-workers N] [--verify]

Like diff, it ends with status 0 where nothing differs, 1 where something does, and 2 where it could not compare.
"""

from __future__ import annotations

import fnmatch
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from checkpoint_tools.common import bar, run_script
from engine.checkpointing.directory import MANIFEST, METADATA, STATE, read_manifest
from engine.checkpointing.workers import Advance, run_workers, share_of, worker_count

if TYPE_CHECKING:
    import torch

    from checkpoint_tools.compare import Difference
    from engine.checkpointing.store_reader import StoreReader
    from models.conversion.hf_reader import HFReader


def main(
    path: tyro.conf.Positional[Path],
    other: tyro.conf.Positional[Path | None] = None,
    match: str = "*",
    num_workers: int | None = None,
    verify: bool = False,
) -> int:
    """Print every tensor's name, shape and dtype, and the number of parameters; of two paths what differs.

    A checkpoint and a Hugging Face directory are compared as Hugging Face tensors, without padding or optimizer.

    Args:
        path: a checkpoint, a torch_dist directory, or a Hugging Face directory.
        other: another one, to compare with the first.
        match: only names that match this pattern, e.g. "*linear_qkv*".
        num_workers: processes that compare; one for each processor and at most 8 unless given.
        verify: read all of PATH, a data directory too, and name each file that is damaged; status 1 where one is.
    """
    if verify:
        from checkpoint_tools.verify import verify_path

        return verify_path(path)
    if other is not None:
        return show_differences(path, other, match, worker_count(num_workers))
    from engine.checkpointing.hf_export import dtype_name

    tensors = list_tensors(path)
    shown = {name: entry for name, entry in tensors.items() if fnmatch.fnmatchcase(name, match)}
    width = max((len(name) for name in shown), default=0)
    for name, (shape, dtype) in shown.items():
        print(f"{name:<{width}}  {dtype_name(dtype):<9} {list(shape)}")
    optimizer = {name for name in shown if name.startswith("optimizer.")}
    for title, names in (("model", shown.keys() - optimizer), ("optimizer", optimizer)):
        if names or title == "model":
            numel = sum(math.prod(shown[name][0]) for name in names)
            size = sum(math.prod(shown[name][0]) * shown[name][1].itemsize for name in names)
            what = "parameters, vocabulary padding included" if title == "model" else "numbers"
            print(f"{title}: {len(names)} tensors, {numel:,} {what}, {size:,} bytes")
    return 0


def list_tensors(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) by name. Raises ValueError for a directory of no known kind."""
    from engine.checkpointing.store_reader import StoreReader
    from models.conversion.hf_reader import HFReader

    reader: StoreReader | HFReader
    if (path / MANIFEST).exists():
        meta = read_manifest(path)
        print(", ".join(f"{name} {value}" for name, value in meta.items() if name != "files"))
        reader = StoreReader(path / STATE)
    elif (path / METADATA).exists():
        reader = StoreReader(path)
    else:
        reader = HFReader(path)
    names = reader.keys() if isinstance(reader, StoreReader) else reader.names()
    return {name: (reader.shape(name), reader.dtype(name)) for name in names}


def show_differences(path: Path, other: Path, match: str, workers: int) -> int:
    """Print a line for each tensor that differs, and a last one that sums up; returns the exit status."""
    from checkpoint_tools.compare import compare, open_sides

    sides = open_sides(path, other)
    one, two = ({name for name in side.names() if fnmatch.fnmatchcase(name, match)} for side in sides)
    for place, names in ((path, one - two), (other, two - one)):
        for name in sorted(names):
            print(f"only in {place}: {name}")
    common = sorted(one & two)
    sizes = [math.prod(sides[0].shape(name)) * sides[0].dtype(name).itemsize for name in common]

    def compare_share(rank: int, advance: Advance) -> list[Difference]:
        return [compare(sides, common[number], advance) for number in share_of(sizes, rank, workers)]

    compared = [
        found for part in run_workers(compare_share, range(workers), bar("comparing", sum(sizes))) for found in part
    ]
    different = [found for found in compared if found]
    for found in different:
        print(found)
    print(_summary(common, different, one ^ two))
    return 1 if different or one ^ two else 0


def _summary(common: list[str], different: list[Difference], lonely: set[str]) -> str:
    equal = f"{len(common) - len(different)} of {len(common)} common tensors are bit-equal"
    if not different and not lonely:
        return f"equal: {equal}"
    elements = sum(found.elements for found in different)
    largest = max((found.absolute for found in different), default=0.0)
    return f"different: {equal}, {len(lonely)} only on one side, {elements:,} elements differ, by at most {largest:.3g}"


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
