"""Convert a Hugging Face directory into a checkpoint that any layout can load, piece by piece.

python checkpoint_tools/hf_to_mcore.py --hf HF --output CKPT
"""

from pathlib import Path

import torch

from checkpoint_tools.common import dtype_name, open_checkpoint, progress, run
from engine.checkpoint_format import HF, STATE, complete_or_absent, write_manifest
from engine.tensor_store import Spec, write_store
from models.hf_io import HFReader, copy_side_files, source_dtype
from models.registry import ModelDescription, check_directory, describe


def main(hf: Path, output: Path) -> None:
    """Convert a Hugging Face directory into a checkpoint.

    Args:
        hf: the Hugging Face directory (safetensors).
        output: the checkpoint directory to make; it must not exist, or be empty.
    """
    description = describe(hf)
    reader = HFReader(hf)
    left_out = check_directory(description, reader)
    dtype = source_dtype(hf)
    total = sum(torch.Size(rule.shape).numel() * dtype.itemsize for rule in description.rules)
    with complete_or_absent(output) as partial:
        with progress("converting", total) as advance:
            write_store(partial / STATE, _specs(description, reader, advance))
        copy_side_files(hf, partial / HF, with_index=True)
        write_manifest(partial, manifest(description, dtype, step=0))
        open_checkpoint(partial)
    if left_out:
        print(f"{len(left_out)} tensor(s) left out (copies or computed buffers): {', '.join(left_out)}")
    print(f"{output}: {len(description.rules)} tensors, {description.family}, {dtype_name(dtype)}")


def manifest(description: ModelDescription, dtype: torch.dtype, step: int) -> dict:
    """What lathe.json says of a checkpoint that holds weights only."""
    return {
        "step": step,
        "family": description.family,
        "source_dtype": dtype_name(dtype),
        "precision": dtype_name(dtype),
        "vocab_size": description.vocab_size,
        "padded_vocab_size": description.padded_vocab_size,
        "tied": description.tied,
    }


def _specs(description: ModelDescription, reader: HFReader, advance) -> list[Spec]:
    def spec(rule) -> Spec:
        def produce(rows: slice) -> torch.Tensor:
            tensor = rule.read(reader, (rows,))
            advance(tensor.nbytes)
            return tensor

        return rule.key, rule.shape, rule.dtype(reader), produce

    return [spec(rule) for rule in description.rules]


if __name__ == "__main__":
    run(main)
