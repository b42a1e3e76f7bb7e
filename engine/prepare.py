"""From a `RunConfig` to everything a training loop needs; each user's mistake is found before it costs anything."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import yaml

from data.index import DocumentIndex
from data.loader import Loader
from engine.base_model import Source, find_model
from engine.checkpointing.checkpoint import ResumePoint, find_latest
from engine.checkpointing.model_files import check_tokenizer
from engine.config import MoeConfig, RunConfig, check_values
from engine.mesh import Mesh, check_expert_widths, check_fp8, check_layout, check_sequence
from engine.signals import deadline
from models.build import TransformerConfig, transformer_config
from models.hf_config import ModelDescription, check_directory
from models.layer_spec import choose_backend
from models.model_directory import open_reader

VALID_BINS = 64  # bins of one held-out batch, whatever the layout


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
    stop_at: float  # seconds since the epoch, see `engine.signals.deadline`


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
    stop_at = deadline(config.checkpoint.minutes_before_end)
    assert config.model is not None and config.data, "the entry script fills in the built-in demo"
    resume = find_latest(config.output) if config.checkpoint.resume else None
    data, valid = open_sources(config.data, "--data"), open_sources(config.valid, "--valid")
    indexes = [index for index, _ in data + valid]
    source, description = find_model(config, resume, max(index.meta.get("vocab_size", 0) for index in indexes))
    pad_multiple = _pad_multiple(config, resume)
    check_model(config, description, world_size, pad_multiple=pad_multiple, resume=resume)
    if not source.is_checkpoint:
        check_directory(description, open_reader(source.weights, description))
    backend, reason = choose_backend(config.backend, cuda=cuda, precision=config.precision, description=description)
    for index in indexes:
        check_tokenizer(source.files, index.path, index.meta, grown=config.override.resize_embeddings)
    check_data(indexes, description.vocab_size)
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
        stop_at=stop_at,
    )
    check_order(prepared)
    return prepared


def check_model(
    config: RunConfig,
    description: ModelDescription,
    world_size: int,
    *,
    pad_multiple: int,
    resume: ResumePoint | None = None,
) -> None:
    """Refuses what model, layout and sizes do not allow together; needs neither weights nor data."""
    check_layout(config.layout, world_size, description)
    check_experts(config, description, resume)
    check_expert_widths(config.layout, description, 4 if config.precision == "fp32" else 2)
    check_sequence(config.layout, config.seq_len, pad_multiple)
    if config.precision == "fp8":
        check_fp8(config.layout, config.seq_len * config.micro_batch_size, description, config.fp8)
    if config.seq_len > description.max_position_embeddings:
        raise ValueError(
            f"--seq-len {config.seq_len} exceeds the model's max_position_embeddings "
            f"{description.max_position_embeddings}; lower it or give --override.max-position-embeddings"
        )


def check_experts(config: RunConfig, description: ModelDescription, resume: ResumePoint | None) -> None:
    """Refuses --moe flags for a model without experts, and a router frozen or thawed in the middle of a run."""
    changed = [
        f"--moe.{field.name.replace('_', '-')}"
        for field in dataclasses.fields(MoeConfig)
        if getattr(config.moe, field.name) != field.default
    ]
    if changed and "num_moe_experts" not in description.transformer:
        raise ValueError(f"{', '.join(changed)}: this model has no experts; leave it out")
    if resume is not None and resume.manifest.get("freeze_router", False) != config.moe.freeze_router:
        before = "was" if not config.moe.freeze_router else "was not"
        raise ValueError(
            f"--moe.freeze-router {before} given when the run in {config.output} began; resume with what it was "
            "started with, or give another --output"
        )


def check_data(indexes: list[DocumentIndex], vocab_size: int) -> None:
    """Refuses tokens that the model does not have, and data directories whose conversations end differently."""
    for index in indexes:
        if (tokens := index.meta.get("vocab_size", 0)) > vocab_size:
            raise ValueError(
                f"{index.path} was prepared with a vocabulary of {tokens:,} tokens and the model has {vocab_size:,}; "
                "prepare the data with the model's own tokenizer, or give the model rows for the new tokens with "
                "--override.resize-embeddings"
            )
        for name in ("chat_template", "end_token_ids"):
            if index.meta.get(name) != indexes[0].meta.get(name):
                raise ValueError(
                    f"{index.path} and {indexes[0].path} were prepared with different chat templates, of which the "
                    "export can carry one; prepare both with the same --chat-template"
                )


def model_config(config: RunConfig, description: ModelDescription) -> TransformerConfig:
    """megatron-core's config of a run; ValueError for what --mcore or the layout ask of it in vain."""
    has_experts = "num_moe_experts" in description.transformer
    experts = {"moe_token_dispatcher_type": config.moe.dispatcher} if has_experts else {}
    try:
        return transformer_config(
            description,
            layout=config.layout,
            precision=config.precision,
            recompute=config.recompute,
            fp8=config.fp8,
            extra=experts | config.mcore,
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
