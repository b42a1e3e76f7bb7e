"""From a `RunConfig` to everything a training loop needs; each user's mistake is found before it costs anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data.documents import Documents
from data.order import GlobalOrder
from engine import host
from engine.base_model import BaseModel, find_base_model, resumed_model
from engine.changes import config_of, resume_lines
from engine.check_model import check_machine, check_model, megatron_config, present
from engine.check_values import check_rates, check_values
from engine.checkpointing.directory import ResumePoint
from engine.checkpointing.model_files import check_tokenizers
from engine.checkpointing.resume_point import find_resume_point
from engine.config import CheckpointConfig, RunConfig
from engine.mcore_fields import check_needs
from engine.run_data import audit, check_batch, check_data, check_held_out, open_data, open_valid
from engine.run_folder import RunFolder
from engine.run_status import took_effect
from engine.time_limit import TimeLimit, time_limit
from models.backend import choose_backend
from models.build import TransformerConfig
from models.description import ModelDescription

VALID_SEQUENCES = 64  # packed sequences of one held-out batch, whatever the layout


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that passed every check, with all that it reads opened once."""

    config: RunConfig
    run: RunFolder
    base_model: BaseModel
    transformer: TransformerConfig
    backend: str
    backend_reason: str
    order: GlobalOrder
    valid_orders: dict[str, GlobalOrder]  # of each held-out set
    total_steps: int
    resume: ResumePoint | None
    changes: tuple[str, ...]  # what a resumed run does otherwise than before, a line each
    pad_multiple: int
    limit: TimeLimit  # of this job

    @property
    def description(self) -> ModelDescription:
        """The model that is trained."""
        return self.base_model.description

    @property
    def held_out(self) -> list[Documents]:
        """The data of the held-out sets."""
        return [index for order in self.valid_orders.values() for index in order.indexes]


def prepare_run(config: RunConfig, *, world_size: int, cuda: bool) -> Prepared:
    """Checks values, layout, model, data and resume point; raises ValueError before any process group exists."""
    check_values(config)
    limit = time_limit(config.checkpoint.minutes_before_end)
    assert config.model is not None and config.data, "the entry script fills in the built-in demo"
    run = RunFolder(config.output)
    check_output(run, config.model)
    resume = find_start(run, config.checkpoint)
    blend, valid = open_data(config.data), open_valid(config.valid)
    check_held_out([index for index, _ in blend], {name: index for name, (index, _) in valid.items()})
    audit((index for index, _ in blend), max_dropped=config.max_dropped, allow_unsupervised=config.allow_unsupervised)
    indexes = [index for index, _ in (*blend, *valid.values())]
    data_vocab_size = max(index.meta.get("vocab_size", 0) for index in indexes)
    base_model = _base_model(config, resume, data_vocab_size)
    description = base_model.description
    pad_multiple = config.pad_multiple if resume is None else _kept_padding(resume, config.pad_documents_to, config.cp)
    check_model(config, description, world_size, pad_multiple=pad_multiple, cuda=cuda)
    check_machine(config, cuda=cuda)
    base_model.check()
    missing = host.transformer_engine_fault()
    backend, reason = choose_backend(config.backend, cuda=cuda, precision=config.precision, missing=missing)
    check_tokenizers(base_model.files, indexes, resized=config.override.resize_embeddings)
    check_data(indexes, description.vocab_size)
    check_needs(config.mcore, present(config, description, backend))
    transformer = megatron_config(config, description, backend)
    make_order = partial(
        GlobalOrder,
        seq_len=config.seq_len,
        pad_documents_to=pad_multiple,
        too_long=config.too_long,
        allow_unsupervised=config.allow_unsupervised,
        vocab_size=description.vocab_size,
        seed=config.seed,
    )
    order = make_order(blend, global_batch_size=config.global_batch_size, batch_unit=config.batch_unit)
    valid_orders = {name: _held_out_order(name, one, make_order) for name, one in valid.items()}
    length = total_steps(order, config.steps, config.epochs)
    check_rates(config.optim, length)
    changes: tuple[str, ...] = ()
    if resume is None:
        check_batch(order, config.global_batch_size, config.batch_unit)
    else:
        order.check_state(resume.manifest["data"])
        before = config_of(resume.directory, RunFolder(resume.run))
        changes = resume_lines(config, before, precision=resume.manifest.get("precision"))
    return Prepared(
        config=config,
        run=run,
        base_model=base_model,
        transformer=transformer,
        backend=backend,
        backend_reason=reason,
        order=order,
        valid_orders=valid_orders,
        total_steps=length,
        resume=resume,
        changes=changes,
        pad_multiple=pad_multiple,
        limit=limit,
    )


def _base_model(config: RunConfig, resume: ResumePoint | None, data_vocab_size: int) -> BaseModel:
    """The model that --model names or, of a run that is resumed, the checkpoint itself."""
    assert config.model is not None
    if resume is None:
        return find_base_model(config.model).resized(config.override, data_vocab_size)
    _check_router(resume, config.moe.freeze_router)
    allow_change = "model" in config.checkpoint.allow_change
    return resumed_model(resume, config.model, config.override, data_vocab_size, allow_change=allow_change)


def _held_out_order(name: str, data: tuple[Documents, float], make_order: Callable[..., GlobalOrder]) -> GlobalOrder:
    """The order of a held-out set; what is wrong with it is said under its name."""
    try:
        return make_order([data], global_batch_size=VALID_SEQUENCES, batch_unit="sequences", shuffle=False)
    except ValueError as error:
        raise ValueError(f"--valid {name}: {error}") from None


def _check_router(resume: ResumePoint, frozen: bool) -> None:
    """Refuses a router frozen or thawed in the middle of a run."""
    if resume.manifest.get("freeze_router", False) != frozen:
        raise ValueError(
            f"--moe.freeze-router {'was not' if frozen else 'was'} given when the run in {resume.run} began; resume "
            "with what it was started with, or give another --output"
        )


def check_output(run: RunFolder, model: str) -> None:
    """Refuses an --output in which no run may write."""
    if run.path.exists() and not run.path.is_dir():
        raise ValueError(f"--output {run.path} is a file: give a directory")
    if run.is_foreign() or (Path(model).exists() and run.path.resolve() == Path(model).resolve()):
        raise ValueError(
            f"--output {run.path} is a model, prepared data or a checkpoint itself: give a directory of the run's own"
        )


def find_start(run: RunFolder, config: CheckpointConfig) -> ResumePoint | None:
    """The checkpoint from which a run starts; None for a new run.

    A flag that goes back or starts anew does so once a job: where torchrun or SLURM start the same command again, the
    run continues.
    """
    if config.resume_from is not None and not config.resume:
        raise ValueError("--checkpoint.resume-from and --checkpoint.no-resume exclude each other: give one of them")
    flag = once(config)
    again = flag is not None and took_effect(run, flag)
    if not config.resume and not again:
        return None
    return find_resume_point(run.path, None if again else config.resume_from)


def once(config: CheckpointConfig) -> str | None:
    """The flag that must not do its work again when SLURM or torchrun start the same command again."""
    if not config.resume:
        return "--checkpoint.no-resume"
    return None if config.resume_from is None else f"--checkpoint.resume-from {config.resume_from}"


def _kept_padding(resume: ResumePoint, asked: int | None, cp: int) -> int:
    """The padding of documents of a resumed run, which no other can replace."""
    kept = resume.manifest["pad_documents_to"]
    if asked not in (None, kept):
        raise ValueError(
            f"--pad-documents-to {asked}: the run in {resume.run} pads to {kept}; leave the flag out, or start a new "
            "run with another --output"
        )
    if cp > 1 and kept % (2 * cp):
        raise ValueError(
            f"--cp {cp} cannot resume the run in {resume.run}, whose documents are padded to {kept}: resume with a "
            f"--cp of which twice divides {kept}, or start the run with --pad-documents-to {2 * cp}"
        )
    return kept


def total_steps(order: GlobalOrder, steps: int | None, epochs: float | None) -> int:
    """The length of a run: --steps, or the steps of --epochs (1 where neither is given), or the shorter of both."""
    if steps is not None and epochs is None:
        return steps
    epochs = epochs or 1.0
    whole = int(epochs)
    count = sum(order.steps_in_epoch(epoch) for epoch in range(whole))
    if epochs > whole:
        count += round((epochs - whole) * order.steps_in_epoch(whole))
    return max(1, count if steps is None else min(count, steps))
