"""Convert a checkpoint into a Hugging Face directory that transformers loads, piece by piece.

python checkpoint_tools/mcore_to_hf.py --checkpoint CKPT --output HF [--dtype source|bf16|fp32|mxfp4]
    [--max-sequence-length N] [--num-workers N] [--push-to-hub OWNER/NAME [--private]]
python checkpoint_tools/mcore_to_hf.py recipe.yaml     (what its `to_hf:` section says)
"""

import sys
from pathlib import Path
from typing import Any, Literal

from checkpoint_tools.common import bar, run_script
from checkpoint_tools.publish import destination, publish
from engine.checkpointing.directory import HF, complete_or_absent
from engine.checkpointing.workers import worker_count
from engine.run_folder import RunFolder


def main(
    checkpoint: Path,
    output: Path,
    dtype: Literal["source", "bf16", "fp32", "mxfp4"] = "source",
    max_sequence_length: int | None = None,
    num_workers: int | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
) -> None:
    """Convert a checkpoint into a Hugging Face directory.

    Args:
        checkpoint: a step directory, or a run's directory for its latest checkpoint.
        output: the directory to make; it must not exist, or be empty.
        dtype: of the weights; source is what the original model had, fp32 uses fp32 master weights if any, mxfp4
            writes MXFP4 again where the base model had it, where that loses nothing.
        max_sequence_length: written to config.json as max_position_embeddings.
        num_workers: processes that convert; one for each processor and at most 8 unless given.
        push_to_hub: OWNER/NAME on the hub, to which the directory is then published; see `lathe publish`.
        private: with push_to_hub, only the owner may read it.
    """
    if max_sequence_length is not None and max_sequence_length < 1:
        raise ValueError(f"--max-sequence-length {max_sequence_length}: give a positive number of tokens")
    workers = worker_count(num_workers)
    hub = destination(push_to_hub, private)
    checkpoint = RunFolder(checkpoint).pointed() or checkpoint
    import torch

    from engine.checkpointing.hf_export import Export, dtype_name, dtype_of, export, open_checkpoint

    opened = open_checkpoint(checkpoint)
    quantized = opened.description.mxfp4 if dtype == "mxfp4" else ()
    if dtype == "mxfp4" and not quantized:
        raise ValueError(f"--dtype mxfp4: the model of {checkpoint} did not come in MXFP4; leave the flag out")
    target = dtype_of("bf16" if quantized else dtype, opened)
    changes: dict[str, Any] = {"max_position_embeddings": max_sequence_length}
    if target != opened.source_dtype:
        changes["dtype"] = dtype_name(target)
    with complete_or_absent(output) as unfinished:
        job = Export(
            output=unfinished,
            description=opened.description,
            dtype=target,
            side_files=checkpoint / HF,
            changes=changes,
            mxfp4=quantized,
            made_of=[checkpoint],
        )
        # In fp32 nothing is rounded before that.
        read = opened.reader(torch.float32 if quantized else target)
        export(job, read, workers, bar("exporting", job.total_bytes))
    print(f"{output}: {opened.description.family}, {'MXFP4 and ' if quantized else ''}{dtype_name(target)}")
    if hub is not None:
        publish(output, hub.repo, hub=hub)


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:], section="to_hf"))
