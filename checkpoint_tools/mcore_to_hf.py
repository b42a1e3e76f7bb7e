"""Convert a checkpoint into a Hugging Face directory that transformers loads, piece by piece.

python checkpoint_tools/mcore_to_hf.py --checkpoint CKPT --output HF [--dtype source|bf16|fp32]
    [--max-sequence-length N]
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from checkpoint_tools.common import dtype_name, dtype_of, open_checkpoint, progress, run
from engine.checkpoint_format import HF, complete_or_absent
from models.hf_io import HFReader, copy_side_files
from models.hf_writer import HFWriter
from models.registry import ModelDescription, apply_overrides, check_directory, read_config
from models.rules import Index

BLOCK_BYTES = 32 * 2**20


def main(
    checkpoint: Path,
    output: Path,
    dtype: Literal["source", "bf16", "fp32"] = "source",
    max_sequence_length: int | None = None,
) -> None:
    """Convert a checkpoint into a Hugging Face directory.

    Args:
        checkpoint: a step directory.
        output: the directory to make; it must not exist, or be empty.
        dtype: of the weights; source is what the original model had, fp32 uses fp32 master weights if any.
        max_sequence_length: written to config.json as max_position_embeddings.
    """
    if max_sequence_length is not None and max_sequence_length < 1:
        raise ValueError(f"--max-sequence-length {max_sequence_length}: give a positive number of tokens")
    opened = open_checkpoint(checkpoint)
    target = dtype_of(dtype, opened.meta)
    changes: dict[str, Any] = {"max_position_embeddings": max_sequence_length}
    if target != dtype_of("source", opened.meta):
        changes["dtype"] = dtype_name(target)
    with complete_or_absent(output) as unfinished:
        export(unfinished, opened.description, partial(opened.read, dtype=target), target, checkpoint / HF)
        change_config(unfinished, changes)
    print(f"{output}: {opened.description.family}, {dtype_name(target)}")


def export(
    output: Path,
    description: ModelDescription,
    read: Callable[[str, Index], torch.Tensor],
    dtype: torch.dtype,
    side_files: Path,
    block_bytes: int = BLOCK_BYTES,
) -> None:
    """Write a Hugging Face directory; `read(key, index)` gives slices of global megatron tensors in `dtype`."""
    copy_side_files(side_files, output)
    plan = {name: (shape, dtype) for rule in description.rules for name, shape in rule.hf_shapes().items()}
    total = sum(torch.Size(shape).numel() * dtype.itemsize for shape, _ in plan.values())
    with progress("exporting", total) as advance, HFWriter(output, plan, like=side_files) as writer:
        for rule in description.rules:
            for part in rule.parts(dtype.itemsize, block_bytes):
                tensor = part.lay_out(read(rule.key, part.index))
                writer.write(part.name, tensor, start=part.start)
                advance(tensor.nbytes)
    check_directory(description, HFReader(output))


def change_config(directory: Path, changes: Mapping[str, Any]) -> None:
    """Set fields of config.json; where none is set the file stays as it is, byte for byte."""
    changes = {name: value for name, value in changes.items() if value is not None}
    if not changes:
        return
    config = read_config(directory)
    dtype = changes.pop("dtype", None)
    if dtype:
        # transformers 4 called the field torch_dtype.
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    text = json.dumps(apply_overrides(config, changes), indent=2, ensure_ascii=False)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
