"""A checkpoint written as a Hugging Face directory: by scripts, or by the ranks of a running job."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpointing.directory import FP8, HF, STATE, read_manifest
from engine.checkpointing.export_sums import write_small_sums, write_weight_sums
from engine.checkpointing.provenance import provenance_of, write_provenance
from engine.checkpointing.store_reader import Scratch, StoreReader, box_of, master_key
from engine.checkpointing.workers import Advance, Bar, no_bar, run_workers, share_of
from models.conversion.hf_reader import copy_side_files
from models.conversion.hf_writer import HFWriter
from models.conversion.mxfp4 import Mxfp4Writer, mxfp4_plan
from models.conversion.rules import ExportBlock, Index, Rule
from models.description import ModelDescription
from models.hf_config import apply_overrides, describe, read_config
from models.model_directory import check_directory, open_reader

BLOCK_BYTES = 16 * 2**20
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
QUANTIZATION = "quantization_config"  # says of the base model's files what is not true of plain ones

Read = Callable[[str, Index], Tensor]  # a slice of a global megatron tensor, in the export's dtype


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was found complete, and whose model tensors are just those of its family's rules."""

    path: Path
    meta: dict[str, Any]
    description: ModelDescription
    store: StoreReader

    @property
    def source_dtype(self) -> torch.dtype:
        """The dtype that the Hugging Face model had."""
        return getattr(torch, self.meta["source_dtype"])

    def reader(self, dtype: torch.dtype) -> Read:
        """Returns read(key, index) of model tensors, where each call overwrites what the last one returned.

        It takes the fp32 master weights where `dtype` is not the model's, which is rounded in another way. Raises
        ValueError for a weight that became too large for float16, if the model's source had that.
        """
        stored, converted = Scratch(), Scratch()

        def read(key: str, index: Index) -> Tensor:
            if dtype != self.store.dtype(key):
                key = master_key(self.store, key) or key
            tensor = self.store.read(key, index, stored)
            if tensor.dtype == dtype:
                return tensor
            result = converted.empty(tensor.shape, dtype).copy_(tensor)
            if dtype == torch.float16:
                check_range(key, tensor, result)
            return result

        return read


def check_range(key: str, values: Tensor, rounded: Tensor) -> None:
    """Refuses finite values that float16, whose numbers end at 65,504, cannot hold."""
    lost = int((rounded.isinf() & values.isfinite()).count_nonzero())
    if lost:
        raise ValueError(
            f"{key}: {lost:,} of its {values.numel():,} weights are too large for float16, the dtype of the model that "
            "training began with: use --dtype bf16 or fp32"
        )


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a step directory; ValueError where it is incomplete or its tensors do not fit the model."""
    meta = read_manifest(path)
    description = describe(path / HF)
    if meta["vocab_size"] != description.vocab_size:
        raise ValueError(
            f"{path} was saved with a vocabulary of {meta['vocab_size']} tokens and its {HF}/config.json has "
            f"{description.vocab_size}; restore the config.json that belongs to it"
        )
    store = StoreReader(path / STATE)
    expected = {rule.key: rule.shape for rule in description.rules}
    present = {key for key in set(store.keys()) if not key.startswith(("optimizer.", FP8))}
    for verb, keys in (("lacks", expected.keys() - present), ("has unknown", present - expected.keys())):
        if keys:
            names = ", ".join(sorted(keys)[:5])
            raise ValueError(f"{path} {verb} {len(keys)} tensor(s) of {description.family}: {names}")
    for key, shape in expected.items():
        if store.shape(key) != shape:
            raise ValueError(f"{path}: {key} has shape {list(store.shape(key))} instead of {list(shape)}")
    return Checkpoint(path=path, meta=meta, description=description, store=store)


def dtype_of(name: str, opened: Checkpoint) -> torch.dtype:
    """The dtype that `--dtype` names: `source` is the one that the Hugging Face model had."""
    return opened.source_dtype if name == "source" else DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, kw_only=True)
class Export:
    """A Hugging Face directory that several processes write, each its share of the tensors.

    First one process calls `begin`, then every process `write_share`, then every process `write_sums`, then one calls
    `finish` with what `write_share` returned; between these steps the caller lets all processes wait for each other.
    `side_files` is the directory with config, tokenizer and templates, `changes` are fields to set in its config.json.
    `mxfp4` names tensors to write in MXFP4, for which `read` gives values that it holds exactly (else ValueError).
    `made_of` are the checkpoints of a run of which it is the one, or the mean; provenance.json then says so.
    """

    output: Path
    description: ModelDescription
    dtype: torch.dtype
    side_files: Path
    changes: Mapping[str, Any] = field(default_factory=dict)
    mxfp4: tuple[str, ...] = ()
    made_of: Sequence[Path] = ()
    block_bytes: int = BLOCK_BYTES

    @cached_property
    def plan(self) -> dict[str, tuple[Sequence[int], torch.dtype]]:
        """What the files will hold: shape and dtype by name."""
        plain = {name: (shape, self.dtype) for rule in self.description.rules for name, shape in rule.files}
        return mxfp4_plan(plain, self.mxfp4)

    @property
    def total_bytes(self) -> int:
        """What the progress of `write_share` adds up to."""
        shapes = [shape for rule in self.description.rules for _, shape in rule.files]
        return sum(torch.Size(shape).numel() * self.dtype.itemsize for shape in shapes)

    def begin(self) -> None:
        """Copy the files beside the weights and make those of the weights, without any yet."""
        copy_side_files(self.side_files, self.output)
        if self.made_of and (provenance := provenance_of(self.made_of)):
            write_provenance(self.output, provenance)
        change_config(self.output, self.changes, remove=[] if self.mxfp4 else [QUANTIZATION])
        self._writer().create()

    def write_share(self, read: Read, share: tuple[int, int], advance: Advance = lambda count: None) -> dict[str, int]:
        """Write the part of one process, `share` = (rank, ranks); returns the bytes written by name."""
        blocks = [(rule, block) for rule in self.description.rules for block in self._blocks_of(rule)]
        sizes = [_numel(rule, block) for rule, block in blocks]
        with self._writer() as files:
            writer = Mxfp4Writer(files, self.mxfp4)
            for number in share_of(sizes, *share):
                rule, block = blocks[number]
                tensor = block.lay_out(read(rule.key, block.index))
                tensor = tensor if block.name in self.mxfp4 else tensor.to(self.dtype)
                writer.write(block.name, tensor, start=block.start)
                advance(sizes[number] * self.dtype.itemsize)
        return files.written

    def write_sums(self, share: tuple[int, int]) -> None:
        """Write the checksums of some of the files of weights; see `engine.checkpointing.export_sums`."""
        write_weight_sums(self.output, share)

    def finish(self, written: Iterable[Mapping[str, int]]) -> None:
        """Check that nothing is missing, and write the index; ValueError naming what was not written."""
        self._writer().finish(written)
        description = describe(self.output)
        check_directory(description, open_reader(self.output, description))
        write_small_sums(self.output)

    def _blocks_of(self, rule: Rule) -> Iterable[ExportBlock]:
        return rule.export_blocks(self.dtype.itemsize, self.block_bytes)

    def _writer(self) -> HFWriter:
        return HFWriter(self.output, self.plan, like=self.side_files, shared=True)


def export(job: Export, read: Read, num_workers: int = 1, bar: Bar = no_bar) -> None:
    """Write a whole Hugging Face directory from this process and those that it forks; see `Export.write_share`."""
    job.begin()
    written = run_workers(
        lambda rank, advance: job.write_share(read, (rank, num_workers), advance), range(num_workers), bar
    )
    run_workers(lambda rank, advance: job.write_sums((rank, num_workers)), range(num_workers))
    job.finish(written)


def change_config(directory: Path, changes: Mapping[str, Any], remove: Iterable[str] = ()) -> None:
    """Set and remove fields of config.json; where nothing changes the file stays as it is, byte for byte.

    A change to None leaves the field alone.
    """
    config = read_config(directory)
    changes = {name: value for name, value in changes.items() if value is not None}
    removed = [config.pop(name) for name in remove if name in config]
    if not changes and not removed:
        return
    dtype = changes.pop("dtype", None)
    if dtype:
        # transformers 4 called the field torch_dtype.
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    text = json.dumps(apply_overrides(config, changes), indent=2, ensure_ascii=False)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")


def _numel(rule: Rule, block: ExportBlock) -> int:
    return math.prod(len(side) for side in box_of(rule.shape, block.index))
