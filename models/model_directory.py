"""A model directory opened as its description asks: MXFP4 as bf16, and rows for tokens that were added."""

from collections import Counter
from pathlib import Path

import torch

from models.conversion.hf_reader import HFReader
from models.conversion.mxfp4 import BLOCKS, Mxfp4Reader, packed_names
from models.conversion.resize import GrownReader
from models.conversion.rules import TensorReader
from models.hf_config import ModelDescription, describe, family_named

VOCABULARY_KEYS = ("embedding.word_embeddings.weight", "output_layer.weight")


def open_reader(path: str | Path, description: ModelDescription) -> TensorReader:
    """A directory's tensors as the rules of `description` take them up.

    A tensor per row of the vocabulary grows where the description has more tokens than the directory's config.json.
    Raises ValueError for a damaged directory, and where files and config.json differ on MXFP4.
    """
    reader: TensorReader = HFReader(path)
    if description.mxfp4:
        reader = Mxfp4Reader(reader, description.mxfp4)
    elif packed := packed_names(reader):
        raise ValueError(
            f"{path} holds {packed[0]}{BLOCKS} in MXFP4, but its config.json has no quantization_config: restore the "
            "config.json that belongs to these files"
        )
    grown = _grown(path, description, reader)
    return GrownReader(reader, grown) if grown else reader


def source_dtype(path: str | Path) -> torch.dtype:
    """The dtype of a directory's weights, where MXFP4 counts as bf16; ValueError where there are several."""
    files = HFReader(path)
    reader = Mxfp4Reader(files, packed_names(files))
    counts = Counter(reader.dtype(name) for name in reader.names())
    if len(counts) != 1:
        shown = ", ".join(f"{n} x {dtype}" for dtype, n in counts.items()) or "none"
        raise ValueError(f"{path}: weights of one dtype are needed, found {shown}")
    return next(iter(counts))


def _grown(path: str | Path, description: ModelDescription, reader: TensorReader) -> dict[str, int]:
    """The tensors to grow and their new rows: those that have a row for each token that config.json counts.

    Any other with too few rows is damaged; it stays as it is, and the check of the directory refuses it.
    """
    names = [name for key in VOCABULARY_KEYS if key in description.rule for name, _ in description.rule[key].files]
    if description.tied:
        names += family_named(description.family).tied_copy or ()
    present = set(reader.names())
    short = {name for name in names if name in present and reader.shape(name)[0] < description.vocab_size}
    held = describe(path).vocab_size if short else None
    return {name: description.vocab_size for name in short if reader.shape(name)[0] == held}
