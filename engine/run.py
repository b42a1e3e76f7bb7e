"""From a `RunConfig` to everything a training loop needs; each user's mistake is found before it costs anything."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data.index import DocumentIndex
from data.loader import Loader
from engine.artifacts import check_tokenizer
from engine.checkpoint import ResumePoint, find_latest
from engine.checkpoint_format import HF, STATE, read_manifest
from engine.config import RunConfig, check_values
from engine.mesh import Mesh, check_fp8, check_layout, check_sequence
from models.backend import choose_backend
from models.build import TransformerConfig, transformer_config
from models.hf_io import HFReader, read_shard, source_dtype
from models.registry import ModelDescription, check_directory, describe

VALID_BINS = 64  # bins of one held-out batch, whatever the layout


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the base weights and the model's files come from: a Hugging Face directory or a checkpoint of ours."""

    weights: Path
    files: Path  # config, tokenizer and the rest, in Hugging Face's form
    is_checkpoint: bool
    dtype: str  # of the source's weights, "bfloat16", "float32", ...


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that passed every check."""

    config: RunConfig
    source: Source
    description: ModelDescription
    backend: str
    backend_reason: str
    data: tuple[tuple[DocumentIndex, float], ...]
    valid: tuple[tuple[DocumentIndex, float], ...]
    resume: ResumePoint | None
    pad_multiple: int


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


def open_sources(arguments: tuple[str, ...], flag: str) -> tuple[tuple[DocumentIndex, float], ...]:
    """Opens DATA or DATA:WEIGHT arguments; ValueError in one sentence for a path or weight that is wrong."""
    opened = []
    for argument in arguments:
        path, colon, weight = argument.rpartition(":")
        if not colon or Path(argument).is_dir():
            path, weight = argument, "1"
        try:
            factor = float(weight)
        except ValueError:
            path, factor = argument, 1.0
        if factor <= 0:
            raise ValueError(f"{flag} {argument}: the weight must be above 0")
        opened.append((DocumentIndex(path), factor))
    return tuple(opened)


def prepare_run(config: RunConfig, *, world_size: int, cuda: bool) -> Prepared:
    """Checks values, layout, model, data and resume point; raises ValueError before any process group exists."""
    check_values(config)
    assert config.model is not None and config.data, "the entry script fills in the built-in demo"
    resume = find_latest(config.output) if config.checkpoint.resume else None
    source, description = _find_model(config, resume)
    check_layout(config.layout, world_size, description)
    if not source.is_checkpoint:
        check_directory(description, HFReader(source.weights))
    backend, reason = choose_backend(config.backend, cuda=cuda, precision=config.precision)
    pad_multiple = _pad_multiple(config, resume)
    check_sequence(config.layout, config.seq_len, pad_multiple)
    if config.precision == "fp8":
        check_fp8(config.layout, config.seq_len * config.micro_batch_size, description, config.fp8)
    if config.seq_len > description.max_position_embeddings:
        raise ValueError(
            f"--seq-len {config.seq_len} exceeds the model's max_position_embeddings "
            f"{description.max_position_embeddings}; lower it or give --override.max-position-embeddings"
        )
    data, valid = open_sources(config.data, "--data"), open_sources(config.valid, "--valid")
    for index, _ in data + valid:
        check_tokenizer(source.files, index.path, index.meta)
    check_data([index for index, _ in data + valid], description.vocab_size)
    model_config(config, description)
    if config.log.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("--log.wandb needs Weights & Biases, which is not installed: pip install 'lathe[track]'")
    prepared = Prepared(
        config=config,
        source=source,
        description=description,
        backend=backend,
        backend_reason=reason,
        data=data,
        valid=valid,
        resume=resume,
        pad_multiple=pad_multiple,
    )
    check_order(prepared)
    return prepared


def _find_model(config: RunConfig, resume: ResumePoint | None) -> tuple[Source, ModelDescription]:
    """The base model; on a resume what the checkpoint itself holds, which a --model still there must agree with."""
    assert config.model is not None
    overrides = dataclasses.asdict(config.override)
    if resume is None:
        source = find_source(config.model)
        return source, describe(source.files, overrides=overrides)
    files = resume.directory / HF
    description = describe(files)
    given = Path(config.model) / HF if (Path(config.model) / STATE).is_dir() else Path(config.model)
    if (given / "config.json").is_file():
        asked = describe(given, overrides=overrides)
        names = ("family", "transformer", "vocab_size", "tied", "max_position_embeddings", "rope")
        changed = [name for name in names if getattr(asked, name) != getattr(description, name)]
        if changed:
            raise ValueError(
                f"--model {config.model} with its overrides differs from the model of the run in {config.output} in "
                f"{', '.join(changed)}; give what the run was started with, or another --output"
            )
    weights, dtype = resume.directory / STATE, resume.manifest["source_dtype"]
    return Source(weights=weights, files=files, is_checkpoint=True, dtype=dtype), description


def check_data(indexes: list[DocumentIndex], vocab_size: int) -> None:
    """Refuses tokens that the model does not have, and data directories whose conversations end differently."""
    for index in indexes:
        if (tokens := index.meta.get("vocab_size", 0)) > vocab_size:
            raise ValueError(
                f"{index.path} was prepared with a vocabulary of {tokens:,} tokens and the model has {vocab_size:,}; "
                "prepare the data with the model's own tokenizer"
            )
        for name in ("chat_template", "end_token_ids"):
            if index.meta.get(name) != indexes[0].meta.get(name):
                raise ValueError(
                    f"{index.path} and {indexes[0].path} were prepared with different chat templates, of which the "
                    "export can carry one; prepare both with the same --chat-template"
                )


def model_config(config: RunConfig, description: ModelDescription) -> TransformerConfig:
    """megatron-core's config of a run; ValueError for what --mcore or the layout ask of it in vain."""
    try:
        return transformer_config(
            description,
            layout=config.layout,
            precision=config.precision,
            recompute=config.recompute,
            fp8=config.fp8,
            extra=config.mcore,
        )
    except (AssertionError, ValueError, TypeError) as error:
        given = " ".join(f"--mcore.{name}={value}" for name, value in config.mcore.items())
        raise ValueError(f"megatron-core refuses {given or 'this configuration'}: {error}") from None


def check_order(prepared: Prepared) -> None:
    """Refuses documents that are too long, a changed order of data, and a run that is over already."""
    config, resume = prepared.config, prepared.resume
    loader = make_loader(prepared, prepared.data)
    if prepared.valid:
        make_loader(prepared, prepared.valid, shuffle=False)
    if resume is None:
        return
    loader.load_state_dict(resume.manifest["data"])
    if config.steps is not None and resume.step >= config.steps:
        raise ValueError(
            f"--steps {config.steps}: the run in {config.output} is at step {resume.step} already; give more steps, or "
            "--checkpoint.no-resume to start it anew"
        )


def _pad_multiple(config: RunConfig, resume: ResumePoint | None) -> int:
    """The padding of documents: what a resumed run had, else what was asked for, else 2*cp."""
    if resume is None:
        return config.pad_multiple
    kept = resume.manifest["pad_documents_to"]
    if config.pad_documents_to not in (None, kept):
        raise ValueError(
            f"--pad-documents-to {config.pad_documents_to}: the run in {config.output} pads to {kept}; leave the "
            "flag out, or start a new run with another --output"
        )
    if config.cp > 1 and kept % (2 * config.cp):
        raise ValueError(
            f"--cp {config.cp} cannot resume the run in {config.output}, whose documents are padded to {kept}: "
            f"resume with a --cp of which twice divides {kept}, or start the run with --pad-documents-to "
            f"{2 * config.cp}"
        )
    return kept


def make_loader(
    prepared: Prepared,
    sources: tuple[tuple[DocumentIndex, float], ...],
    mesh: Mesh | None = None,
    *,
    shuffle: bool = True,
) -> Loader:
    """The loader of this rank, or of a lone one; held-out data (`shuffle=False`) is counted in bins, in order."""
    config = prepared.config
    return Loader(
        list(sources),
        seq_len=config.seq_len,
        micro_batch_size=config.micro_batch_size,
        global_batch_size=config.global_batch_size if shuffle else VALID_BINS,
        batch_unit=config.batch_unit if shuffle else "sequences",
        pad_documents_to=prepared.pad_multiple,
        too_long=config.too_long,
        seed=config.seed,
        dp_rank=mesh.dp_rank if mesh else 0,
        dp_size=mesh.dp_size if mesh else 1,
        microbatch_multiple=config.pp if config.vpp > 1 else 1,
        shuffle=shuffle,
    )


def weight_reader(prepared: Prepared) -> Any:
    """Returns read(key, global offset, local shape) over the run's source."""
    if not prepared.source.is_checkpoint:
        reader = HFReader(prepared.source.weights)
        return lambda key, offset, shape: read_shard(prepared.description, reader, key, offset, shape)
    from engine.tensor_store import StoreReader, master_key

    store = StoreReader(prepared.source.weights)
    missing = [key for key in prepared.description.rule if key not in store]
    if missing:
        raise ValueError(f"{prepared.source.weights} lacks {len(missing)} tensor(s): {', '.join(missing[:5])}")
    wide = prepared.config.precision == "fp32"

    def read(key: str, offset: tuple[int, ...], shape: tuple[int, ...]):
        stored = (master_key(store, key) or key) if wide else key
        return store.read(stored, tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True)))

    return read


def total_steps(config: RunConfig, loader: Loader) -> int:
    """The length of the run: --steps, or the steps of --epochs (1 where neither is given)."""
    if config.steps is not None:
        return config.steps
    epochs = config.epochs or 1.0
    whole = int(epochs)
    steps = sum(loader.steps_in_epoch(epoch) for epoch in range(whole))
    if epochs > whole:
        steps += round((epochs - whole) * loader.steps_in_epoch(whole))
    return max(1, steps)


def write_config(config: RunConfig) -> None:
    """Writes RUN/config.yaml, which starts the same run again."""
    plain = dataclasses.asdict(config)
    plain["output"] = str(config.output)
    plain["data"], plain["valid"] = list(config.data), list(config.valid)
    config.output.mkdir(parents=True, exist_ok=True)
    (config.output / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
