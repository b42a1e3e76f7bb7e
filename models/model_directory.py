"""A model directory opened as its description asks: MXFP4 as bf16, and rows for tokens that were added."""

import fnmatch
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from models.conversion.byte_boxes import ByteFile, PlainFile
from models.conversion.check import check_tensors
from models.conversion.hf_reader import SINGLE, HFReader, ignored_files
from models.conversion.mxfp4 import BLOCKS, Mxfp4Reader, mxfp4_names
from models.conversion.resize import ResizedReader
from models.conversion.rules import TensorReader
from models.description import ModelDescription
from models.families import family_named
from models.hf_config import describe

VOCABULARY_KEYS = ("embedding.word_embeddings.weight", "output_layer.weight")


def open_reader(
    path: str | Path, description: ModelDescription, open_file: Callable[[Path], ByteFile] = PlainFile
) -> TensorReader:
    """A directory's tensors as the rules of `description` take them up, from files that `open_file` opens.

    A tensor with a row for each token is resized where the description has more tokens than the directory's
    config.json. Raises ValueError for a damaged directory, and where files and config.json differ on MXFP4.
    """
    reader: TensorReader = HFReader(path, open_file)
    if description.mxfp4:
        reader = Mxfp4Reader(reader, description.mxfp4)
    elif names := mxfp4_names(reader):
        raise ValueError(
            f"{path} holds {names[0]}{BLOCKS} in MXFP4, but its config.json has no quantization_config: restore the "
            "config.json that belongs to these files"
        )
    rows = _new_rows(path, description, reader)
    return ResizedReader(reader, rows) if rows else reader


def check_directory(description: ModelDescription, reader: TensorReader) -> tuple[str, ...]:
    """Check a directory's tensors against the rules; see `models.conversion.check.check_tensors`."""
    family = family_named(description.family)
    tied_copy = family.tied_copy if description.tied else None
    return check_tensors(description.rules, reader, family.name, family.buffers, tied_copy)


def read_shard(
    description: ModelDescription,
    reader: TensorReader,
    key: str,
    global_offset: Sequence[int],
    local_shape: Sequence[int],
) -> Tensor:
    """The part of a global megatron tensor that one rank holds, straight from Hugging Face files.

    `global_offset` and `local_shape` have one number per dimension, rows first. Raises ValueError for a key
    that no rule of the family makes, and for a part that reaches over the tensor's end.
    """
    rule = description.rule.get(key)
    if rule is None:
        raise ValueError(f"no rule of {description.family} makes the tensor {key}")
    ends = [offset + length for offset, length in zip(global_offset, local_shape, strict=True)]
    if len(ends) != len(rule.shape) or any(e > n for e, n in zip(ends, rule.shape, strict=True)):
        raise ValueError(f"{key} {list(rule.shape)} has no part {list(local_shape)} at {list(global_offset)}")
    return rule.read(reader, tuple(slice(offset, end) for offset, end in zip(global_offset, ends, strict=True)))


def model_notes(path: str | Path, description: ModelDescription, left_out: Sequence[str] = ()) -> tuple[str, ...]:
    """What of a directory is not taken up, a line each; `left_out` is what `check_directory` returned."""
    lines = []
    if description.ignored_fields:
        names = ", ".join(description.ignored_fields)
        code = "; no code of the model is run" if "auto_map" in description.ignored_fields else ""
        lines.append(f"config.json: ignored {names}, which say nothing of the model{code}")
    if left_out:
        shown = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
        lines.append(f"{len(left_out)} tensor(s) left out (copies or computed buffers), as transformers does: {shown}")
    if ignored := ignored_files(path):
        shown = ", ".join(ignored[:5]) + (", ..." if len(ignored) > 5 else "")
        read = SINGLE if (Path(path) / SINGLE).is_file() else "the files that the index lists"
        lines.append(f"weights: read from {read}, as transformers does; ignored {shown}")
    return tuple(lines)


def weights_dtype(
    path: str | Path, reader: TensorReader | None = None, description: ModelDescription | None = None
) -> torch.dtype:
    """The dtype of a directory's weights, where MXFP4 counts as bf16; ValueError where there are several.

    reader: what `open_reader` gave, if the directory is open already; description: whose computed buffers, if any,
    do not count.
    """
    if reader is None:
        files = HFReader(path)
        reader = Mxfp4Reader(files, mxfp4_names(files))
    buffers = family_named(description.family).buffers if description else ()
    learned = [name for name in reader.names() if not any(fnmatch.fnmatchcase(name, pattern) for pattern in buffers)]
    counts = Counter(reader.dtype(name) for name in learned)
    if len(counts) != 1:
        shown = ", ".join(f"{n} x {dtype}" for dtype, n in counts.items()) or "none"
        raise ValueError(f"{path}: weights of one dtype are needed, found {shown}")
    return next(iter(counts))


def _new_rows(path: str | Path, description: ModelDescription, reader: TensorReader) -> dict[str, int]:
    """The tensors to resize and their new rows: those that have a row for each token that config.json counts.

    Any other with too few rows is damaged; it stays as it is, and the check of the directory refuses it.
    """
    names = [name for key in VOCABULARY_KEYS if key in description.rule for name, _ in description.rule[key].files]
    if description.tied:
        names += family_named(description.family).tied_copy or ()
    present = set(reader.names())
    short = {name for name in names if name in present and reader.shape(name)[0] < description.vocab_size}
    held = describe(path).vocab_size if short else None
    return {name: description.vocab_size for name in short if reader.shape(name)[0] == held}
