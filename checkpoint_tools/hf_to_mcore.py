"""Convert a Hugging Face directory into a checkpoint that any layout can load, piece by piece.

python checkpoint_tools/hf_to_mcore.py --hf HF --output CKPT [--num-workers N]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint_tools.common import bar, manifest, run_script, total_bytes
from engine.checkpointing.directory import HF, STATE, complete_or_absent, write_manifest
from engine.checkpointing.workers import worker_count

if TYPE_CHECKING:
    from torch import Tensor

    from engine.checkpointing.store_writer import Spec
    from models.conversion.rules import Rule, TensorReader


def main(hf: Path, output: Path, num_workers: int | None = None) -> None:
    """Convert a Hugging Face directory into a checkpoint.

    Args:
        hf: the Hugging Face directory (safetensors).
        output: the checkpoint directory to make; it must not exist, or be empty.
        num_workers: processes that convert; one for each processor and at most 8 unless given.
    """
    workers = worker_count(num_workers)
    from data.checked_files import CheckedFile
    from engine.checkpointing.export_sums import check_small_files
    from engine.checkpointing.hf_export import dtype_name, open_checkpoint
    from engine.checkpointing.store_writer import write_store
    from models.conversion.hf_reader import copy_side_files
    from models.hf_config import describe
    from models.model_directory import check_directory, model_notes, open_reader, weights_dtype

    check_small_files(hf)
    description = describe(hf)
    reader = open_reader(hf, description, CheckedFile)
    left_out = check_directory(description, reader)
    dtype = weights_dtype(hf, reader, description)
    with complete_or_absent(output) as partial:
        specs = [_spec(rule, reader) for rule in description.rules]
        progress = bar("converting", total_bytes(description, dtype))
        write_store(partial / STATE, specs, num_workers=workers, bar=progress)
        copy_side_files(hf, partial / HF, with_index=True)
        write_manifest(partial, manifest(description, dtype, step=0))
        open_checkpoint(partial)
    for note in model_notes(hf, description, left_out):
        print(note)
    print(f"{output}: {len(description.rules)} tensors, {description.family}, {dtype_name(dtype)}")


def _spec(rule: Rule, reader: TensorReader) -> Spec:
    """A tensor for `write_store`."""

    def produce(rows: slice) -> Tensor:
        return rule.read(reader, (rows,))

    return rule.key, rule.shape, rule.dtype(reader), produce


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
