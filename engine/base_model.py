"""Where a run's weights come from: a Hugging Face directory, a hub name, a checkpoint of ours, or a resume."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpointing.checkpoint import ResumePoint
from engine.checkpointing.directory import HF, STATE, read_manifest
from engine.checkpointing.store_reader import StoreReader, box_of, master_key
from engine.config import OverrideConfig, RunConfig
from models.conversion.hf_reader import read_shard
from models.conversion.resize import GrownReader
from models.conversion.rules import Index
from models.hf_config import ModelDescription, describe
from models.model_directory import VOCABULARY_KEYS, open_reader, source_dtype


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the base weights and the model's files come from: a Hugging Face directory or a checkpoint of ours."""

    weights: Path
    files: Path  # config, tokenizer and the rest, in Hugging Face's form
    is_checkpoint: bool
    dtype: str  # of the source's weights, "bfloat16", "float32", ...


def find_source(model: str) -> Source:
    """Resolves --model: a directory of ours, a Hugging Face directory, or a hub name."""
    path = Path(model)
    if (path / STATE).is_dir():
        manifest = read_manifest(path)
        return Source(weights=path / STATE, files=path / HF, is_checkpoint=True, dtype=manifest["source_dtype"])
    if not path.is_dir():
        path = _from_hub(model)
    dtype = str(source_dtype(path)).removeprefix("torch.")
    return Source(weights=path, files=path, is_checkpoint=False, dtype=dtype)


def _from_hub(model: str) -> Path:
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ValueError(f"--model {model}: there is no such directory")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, ignore_patterns=["*.bin", "*.pth", "*.gguf", "original/*"]))
    except Exception as error:
        raise ValueError(
            f"--model {model} is neither a directory here nor to be had from the hub ({type(error).__name__})"
        ) from None


def config_overrides(override: OverrideConfig, files: Path, data_vocab_size: int) -> dict[str, Any]:
    """The fields of the model's config.json that a run changes; None leaves one alone.

    files: the model's directory; data_vocab_size: tokens of the largest tokenizer that prepared data.
    """
    grows = override.resize_embeddings and data_vocab_size > describe(files).vocab_size
    return {
        "rope_theta": override.rope_theta,
        "max_position_embeddings": override.max_position_embeddings,
        "vocab_size": data_vocab_size if grows else None,
    }


def find_model(config: RunConfig, resume: ResumePoint | None, data_vocab_size: int) -> tuple[Source, ModelDescription]:
    """The base model; on a resume what the checkpoint itself holds, which a --model still there must agree with."""
    assert config.model is not None
    if resume is None:
        source = find_source(config.model)
        return source, describe(
            source.files, overrides=config_overrides(config.override, source.files, data_vocab_size)
        )
    files = resume.directory / HF
    description = describe(files)
    given = Path(config.model) / HF if (Path(config.model) / STATE).is_dir() else Path(config.model)
    if (given / "config.json").is_file():
        asked = describe(given, overrides=config_overrides(config.override, given, data_vocab_size))
        names = ("family", "transformer", "vocab_size", "tied", "max_position_embeddings", "rope")
        changed = [name for name in names if getattr(asked, name) != getattr(description, name)]
        if changed:
            raise ValueError(
                f"--model {config.model} with its overrides differs from the model of the run in {config.output} in "
                f"{', '.join(changed)}; give what the run was started with, or another --output"
            )
    weights, dtype = resume.directory / STATE, resume.manifest["source_dtype"]
    return Source(weights=weights, files=files, is_checkpoint=True, dtype=dtype), description


def weight_reader(source: Source, description: ModelDescription, *, wide: bool) -> Callable[..., Tensor]:
    """Returns read(key, global offset, local shape) over a run's source; `wide` asks for master weights.

    Rows that the source has not are the mean of those that it has; below them come zeros up to the padded vocabulary.
    """
    if not source.is_checkpoint:
        reader = open_reader(source.weights, description)
        return lambda key, offset, shape: read_shard(description, reader, key, offset, shape)
    store = StoreReader(source.weights)
    missing = [key for key in description.rule if key not in store]
    if missing:
        raise ValueError(f"{source.weights} lacks {len(missing)} tensor(s): {', '.join(missing[:5])}")

    stored = {key: (master_key(store, key) or key) if wide else key for key in description.rule}
    tables = [stored[key] for key in VOCABULARY_KEYS if key in stored]
    held = UnpaddedReader(store, dict.fromkeys(tables, describe(source.files).vocab_size))
    grown = GrownReader(held, dict.fromkeys(tables, description.vocab_size))

    def read(key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        name, index = stored[key], tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
        if name not in tables:
            return store.read(name, index)
        result = torch.zeros(shape, dtype=store.dtype(name))
        rows = max(0, min(shape[0], description.vocab_size - offset[0]))
        grown.read(name, (slice(offset[0], offset[0] + rows), *index[1:]), result[:rows])
        return result

    return read


class UnpaddedReader:
    """A checkpoint's tensors for `GrownReader`, some of them, `{name: rows}`, without the zeros below those rows."""

    def __init__(self, store: StoreReader, rows: Mapping[str, int]):
        self._store = store
        self._rows = dict(rows)

    def names(self) -> list[str]:
        return self._store.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        rows, *rest = self._store.shape(name)
        return (self._rows.get(name, rows), *rest)

    def dtype(self, name: str) -> torch.dtype:
        return self._store.dtype(name)

    def read(self, name: str, index: Index = (), out: Tensor | None = None) -> Tensor:
        """A box of a tensor, put into `out` or into memory of its own."""
        box = tuple(slice(side.start, side.stop) for side in box_of(self.shape(name), index))
        found = self._store.read(name, box)
        return found if out is None else out.copy_(found)
