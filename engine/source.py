"""Where a run's weights come from: a Hugging Face directory, a hub name, a checkpoint of ours, or a resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.checkpoint import ResumePoint
from engine.checkpoint_format import HF, STATE, read_manifest
from engine.config import OverrideConfig, RunConfig
from engine.tensor_store import StoreReader, master_key
from models.hf_io import read_shard
from models.registry import ModelDescription, describe, read_config
from models.sources import open_reader, source_dtype


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

    files: the model's directory; data_vocab_size: tokens of the tokenizer that prepared the data.
    """
    vocab_size = read_config(files).get("vocab_size", 0)
    grows = override.resize_embeddings and data_vocab_size > vocab_size
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
    """Returns read(key, global offset, local shape) over a run's source; `wide` asks for master weights."""
    if not source.is_checkpoint:
        reader = open_reader(source.weights, description)
        return lambda key, offset, shape: read_shard(description, reader, key, offset, shape)
    store = StoreReader(source.weights)
    missing = [key for key in description.rule if key not in store]
    if missing:
        raise ValueError(f"{source.weights} lacks {len(missing)} tensor(s): {', '.join(missing[:5])}")

    def read(key: str, offset: tuple[int, ...], shape: tuple[int, ...]):
        stored = (master_key(store, key) or key) if wide else key
        return store.read(stored, tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True)))

    return read
