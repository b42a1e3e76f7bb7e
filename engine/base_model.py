"""The base model of a run, opened once: a Hugging Face directory, a hub name, a checkpoint of ours, or a resume."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.checked_files import CheckedFile
from engine.checkpointing.directory import HF, STATE, ResumePoint, read_manifest
from engine.checkpointing.export_sums import check_small_files
from engine.checkpointing.hf_export import dtype_name
from engine.checkpointing.store_reader import StoreReader, box_of, master_key
from engine.config import OverrideConfig
from models.conversion.resize import ResizedReader
from models.conversion.rules import Index, TensorReader
from models.description import ModelDescription
from models.hf_config import describe
from models.model_directory import (
    VOCABULARY_KEYS,
    check_directory,
    model_notes,
    open_reader,
    read_shard,
    weights_dtype,
)


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """Where the first weights and the model's files come from, and what model a run makes of them."""

    weights: Path
    files: Path  # config, tokenizer and the rest, in Hugging Face's form
    own_vocab_size: int  # of its own config.json
    description: ModelDescription  # with the run's overrides
    checkpoint_dtype: str | None = None  # for a checkpoint of ours: the dtype that its base model had

    @property
    def is_checkpoint(self) -> bool:
        """Whether the weights lie in a checkpoint of ours."""
        return self.checkpoint_dtype is not None

    @cached_property
    def reader(self) -> TensorReader:
        """The tensors of a Hugging Face directory; looked through once, at the first use."""
        assert not self.is_checkpoint
        return open_reader(self.weights, self.description, CheckedFile)

    @cached_property
    def dtype(self) -> str:
        """Of the weights as Hugging Face files had them: "bfloat16", "float32", ..."""
        if self.checkpoint_dtype is not None:
            return self.checkpoint_dtype
        return dtype_name(weights_dtype(self.weights, self.reader, self.description))

    @cached_property
    def left_out(self) -> tuple[str, ...]:
        """Tensors of the files that are no weights; ValueError where the others are not just the model's."""
        return () if self.is_checkpoint else check_directory(self.description, self.reader)

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the model's files is not taken up, a line each."""
        return model_notes(self.files, self.description, self.left_out)

    def check(self) -> None:
        """Refuses weights of several dtypes or not of the model; a checkpoint is checked as it is read."""
        _ = self.dtype, self.left_out

    def resized(self, override: OverrideConfig, data_vocab_size: int) -> BaseModel:
        """This model under a run's overrides."""
        changes = config_overrides(override, self.own_vocab_size, data_vocab_size)
        if all(value is None for value in changes.values()):
            return self
        return replace(self, description=describe(self.files, overrides=changes))


def find_base_model(model: str) -> BaseModel:
    """Resolves --model: a checkpoint of ours, a Hugging Face directory, or a hub name."""
    path = Path(model)
    if (path / STATE).is_dir():
        return _checkpoint(path, read_manifest(path))
    if not path.is_dir():
        path = _from_hub(model)
    check_small_files(path)
    description = describe(path)
    return BaseModel(
        weights=path,
        files=path,
        own_vocab_size=description.vocab_size,
        description=description,
    )


def _checkpoint(path: Path, manifest: Mapping[str, Any]) -> BaseModel:
    description = describe(path / HF)
    return BaseModel(
        weights=path / STATE,
        files=path / HF,
        own_vocab_size=description.vocab_size,
        description=description,
        checkpoint_dtype=manifest["source_dtype"],
    )


def _from_hub(model: str) -> Path:
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ValueError(f"--model {model}: there is no such directory")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, ignore_patterns=["*.bin", "*.pth", "*.gguf", "*.py", "original/*"]))
    except Exception as error:
        raise ValueError(
            f"--model {model} is no local directory and could not be downloaded from the hub ({type(error).__name__})"
        ) from None


def config_overrides(override: OverrideConfig, own_vocab_size: int, data_vocab_size: int) -> dict[str, Any]:
    """The fields of the model's config.json that a run changes; None leaves one alone.

    own_vocab_size: tokens of that config.json; data_vocab_size: of the largest tokenizer that prepared data.
    """
    more = override.resize_embeddings and data_vocab_size > own_vocab_size
    return {
        "rope_theta": override.rope_theta,
        "max_position_embeddings": override.max_position_embeddings,
        "vocab_size": data_vocab_size if more else None,
    }


def resumed_model(
    resume: ResumePoint, model: str, override: OverrideConfig, data_vocab_size: int, *, allow_change: bool = False
) -> BaseModel:
    """What a run's checkpoint itself holds, which a --model that is still there must agree with; else ValueError.

    With `allow_change` the overrides that leave every weight its shape may be others, and hold from now on.
    """
    held = _checkpoint(resume.directory, resume.manifest)
    if allow_change and (override.rope_theta, override.max_position_embeddings) != (None, None):
        same_shapes = replace(override, resize_embeddings=False)
        held = held.resized(same_shapes, held.own_vocab_size)
    given = Path(model) / HF if (Path(model) / STATE).is_dir() else Path(model)
    if (given / "config.json").is_file():
        own = describe(given).vocab_size
        asked = describe(given, overrides=config_overrides(override, own, data_vocab_size))
        names = ("family", "transformer", "vocab_size", "tied", "max_position_embeddings", "rope")
        changed = [name for name in names if getattr(asked, name) != getattr(held.description, name)]
        if changed:
            only = {"rope", "max_position_embeddings"}.issuperset(changed)
            mend = ", or allow the override with --checkpoint.allow-change model" if only and not allow_change else ""
            raise ValueError(
                f"--model {model} with its overrides differs from the model of the run in {resume.run} in "
                f"{', '.join(changed)}; give what the run was started with, or another --output{mend}"
            )
    return held


def weight_reader(base: BaseModel) -> Callable[..., Tensor]:
    """Returns read(key, global offset, local shape) over the base model; of a checkpoint the master weights, if any.

    Rows that the base model has not are the mean of those that it has; below them come zeros up to the padded
    vocabulary.
    """
    description = base.description
    if not base.is_checkpoint:
        return lambda key, offset, shape: read_shard(description, base.reader, key, offset, shape)
    store = StoreReader(base.weights)
    missing = [key for key in description.rule if key not in store]
    if missing:
        raise ValueError(f"{base.weights} lacks {len(missing)} tensor(s): {', '.join(missing[:5])}")

    stored = {key: master_key(store, key) or key for key in description.rule}
    tables = [stored[key] for key in VOCABULARY_KEYS if key in stored]
    held = UnpaddedReader(store, dict.fromkeys(tables, base.own_vocab_size))
    resized = ResizedReader(held, dict.fromkeys(tables, description.vocab_size))

    def read(key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        name, index = stored[key], tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
        if name not in tables:
            return store.read(name, index)
        result = torch.zeros(shape, dtype=store.dtype(name))
        rows = max(0, min(shape[0], description.vocab_size - offset[0]))
        resized.read(name, (slice(offset[0], offset[0] + rows), *index[1:]), result[:rows])
        return result

    return read


class UnpaddedReader:
    """A checkpoint's tensors for `ResizedReader`, some of them, `{name: rows}`, without the zeros below those rows."""

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
