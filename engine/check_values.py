"""Every check of a value that needs no model and no data, before any process group exists."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from engine.config import CheckpointConfig, GuardConfig, OptimConfig, RunConfig

# What --checkpoint.allow-change takes: settings that change the course of a run that is resumed.
ALLOWED_CHANGES = ("model", "optim.moments", "optim.gradients", "precision")
# Access tokens by their published prefixes, and credentials in addresses. Long hexadecimal names are no sign: the hub's
# own folders bear them.
_SECRET = re.compile(
    r"\b(hf|ghp|gho|ghs|ghu)_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}|\bglpat-[\w-]{20,}|\bsk-[\w-]{20,}|\bAKIA[0-9A-Z]{16}\b"
    r"|://[^/\s@]+@|[?&;](token|access_token|key|api_key|password|secret|sig|X-Amz-\w+)="
)


def check_values(config: RunConfig) -> None:
    """Refuses values that cannot be meant; ValueError in one sentence that names flag, value and mend."""
    check_secrets(dataclasses.asdict(config))
    positive = ("seq_len", "micro_batch_size", "global_batch_size", "steps", "epochs", "pad_documents_to")
    for name in positive:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be above 0")
    if config.pad_multiple % 2 and config.cp > 1:
        raise ValueError(f"--pad-documents-to {config.pad_multiple} must be a multiple of 2*cp = {2 * config.cp}")
    if config.pp_layout and not re.fullmatch(r"\d+(,\d+)*", config.pp_layout):
        raise ValueError(f"--pp-layout {config.pp_layout}: give layers per stage, separated by commas, e.g. 7,9,9,7")
    if not 0 <= config.moe.aux_loss < math.inf:
        raise ValueError(f"--moe.aux-loss {config.moe.aux_loss} must be a number of 0 or more")
    if not 0 <= config.max_dropped <= 1:
        raise ValueError(f"--max-dropped {config.max_dropped} is a share of the rows: give 0 to 1, e.g. 0.05")
    if config.valid_every and not config.valid:
        raise ValueError(f"--valid-every {config.valid_every} needs held-out data: give --valid")
    if config.valid_at_start and not config.valid:
        raise ValueError("--valid-at-start needs held-out data: give --valid")
    if config.valid_every < 0 or config.valid_batches < 0:
        raise ValueError("--valid-every and --valid-batches must not be negative")
    _check_recompute(config)
    _check_optim(config.optim)
    if config.optim.gradients == "bf16" and config.precision == "fp32":
        raise ValueError(
            "--optim.gradients bf16 has nothing narrow to sum under --precision fp32: leave it out, or give "
            "--precision bf16"
        )
    check_rates(config.optim, config.steps)
    _check_checkpoint(config.checkpoint)
    if config.checkpoint.keep_best and not config.valid:
        raise ValueError(f"--checkpoint.keep-best {config.checkpoint.keep_best} needs held-out data: give --valid")
    _check_guard(config.guard)
    if bool(config.model) != bool(config.data):
        missing = "--data" if config.model else "--model"
        raise ValueError(f"{missing} is missing: give both --model and --data, or neither for the built-in demo")
    _check_output(config)


def _check_recompute(config: RunConfig) -> None:
    """Refuses parts named beside a --recompute that does not ask for them."""
    if config.recompute_modules and config.recompute != "selective":
        raise ValueError(
            f"--recompute-modules {' '.join(config.recompute_modules)} has no effect under --recompute "
            f"{config.recompute}: give --recompute selective"
        )


def check_secrets(settings: Mapping[str, Any], prefix: str = "") -> None:
    """Refuses settings, by field, that hold what looks like a token or a password: files and logs repeat them."""
    for name, value in settings.items():
        flag = f"{prefix}{name.replace('_', '-')}"
        if isinstance(value, Mapping):
            check_secrets(value, f"{flag}.")
        elif any(_SECRET.search(str(one)) for one in (value if isinstance(value, tuple | list) else (value,))):
            raise ValueError(
                f"--{flag} holds what looks like an access token or a password (not repeated here), and a run's files "
                "and logs show its settings: give it in the environment instead, e.g. as HF_TOKEN or WANDB_API_KEY"
            )


def _check_optim(optim: OptimConfig) -> None:
    for name in ("lr", "min_lr", "warmup_steps", "warmup_init", "weight_decay", "clip_grad", "decay_steps"):
        if not 0 <= getattr(optim, name) < math.inf:
            raise ValueError(f"--optim.{name.replace('_', '-')} {getattr(optim, name)} must be a number of 0 or more")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(optim, name) < 1:
            raise ValueError(f"--optim.{name} {getattr(optim, name)} must lie in [0, 1)")
    if not 0 < optim.eps < math.inf:
        raise ValueError(
            f"--optim.eps {optim.eps} must be above 0, e.g. 1e-8: a weight whose gradient is 0 would become 0/0"
        )


def check_rates(optim: OptimConfig, total_steps: int | None) -> None:
    """Refuses a course of learning rates that cannot be meant; ValueError in one sentence.

    total_steps: the length of the run; None where it is not known yet, and what depends on it passes.
    """
    if optim.schedule == "wsd" and not optim.decay_steps:
        raise ValueError("--optim.schedule wsd needs --optim.decay-steps, the length of its final decay")
    if optim.schedule != "wsd" and optim.decay_steps:
        raise ValueError(
            f"--optim.decay-steps {optim.decay_steps} has no effect under --optim.schedule {optim.schedule}: leave it "
            "out or give 0, or choose --optim.schedule wsd"
        )
    if optim.schedule == "constant" and optim.min_lr:
        raise ValueError(
            f"--optim.min-lr {optim.min_lr:g} has no effect under --optim.schedule constant: leave it out or give 0, "
            "or choose a schedule that decays"
        )
    if optim.warmup_init and not optim.warmup_steps:
        raise ValueError(
            f"--optim.warmup-init {optim.warmup_init:g} has no effect without a warmup: leave it out or give 0, or "
            "give --optim.warmup-steps"
        )
    for name, value in (("min-lr", optim.min_lr), ("warmup-init", optim.warmup_init)):
        if value > optim.lr:
            raise ValueError(f"--optim.{name} {value:g} is above --optim.lr {optim.lr:g}, the peak; give a lower one")
    if total_steps is None:
        return
    length = f"the run, which has {total_steps:,} step{'s' if total_steps > 1 else ''}"
    if optim.warmup_steps >= total_steps:
        raise ValueError(f"--optim.warmup-steps {optim.warmup_steps:,} must be shorter than {length}; give fewer")
    if optim.decay_steps > total_steps:
        raise ValueError(f"--optim.decay-steps {optim.decay_steps:,} is longer than {length}; give fewer")
    if optim.warmup_steps + optim.decay_steps > total_steps:
        raise ValueError(
            f"--optim.warmup-steps {optim.warmup_steps:,} and --optim.decay-steps {optim.decay_steps:,} together are "
            f"longer than {length}; give fewer"
        )


def _check_checkpoint(checkpoint: CheckpointConfig) -> None:
    for name in ("every", "keep", "keep_every", "keep_best", "rescue_every", "rescue_minutes"):
        if not 0 <= getattr(checkpoint, name) < math.inf:
            raise ValueError(f"--checkpoint.{name.replace('_', '-')} {getattr(checkpoint, name)} must be 0 or more")
    if checkpoint.resume_from is not None and checkpoint.resume_from < 1:
        raise ValueError(f"--checkpoint.resume-from {checkpoint.resume_from}: steps count from 1")
    for name in ("keep_every", "keep_best"):
        if getattr(checkpoint, name) and not checkpoint.keep:
            raise ValueError(
                f"--checkpoint.{name.replace('_', '-')} {getattr(checkpoint, name)} says what stays beside the newest, "
                "and without --checkpoint.keep N all stay: give it, too"
            )
    if not 0 <= (checkpoint.minutes_before_end or 0) < math.inf:
        raise ValueError("--checkpoint.minutes-before-end must be a number of 0 or more")
    for name in checkpoint.allow_change:
        if name.replace("_", "-") not in ALLOWED_CHANGES:
            raise ValueError(
                f"--checkpoint.allow-change {name}: no such setting needs to be allowed; those that do are "
                f"{', '.join(ALLOWED_CHANGES)}"
            )


def _check_guard(guard: GuardConfig) -> None:
    for name in ("max_skips", "spike", "patience", "minutes"):
        if not 0 <= getattr(guard, name) < math.inf:
            raise ValueError(f"--guard.{name.replace('_', '-')} {getattr(guard, name)} must be 0 or more")
    if 0 < guard.spike <= 1:
        raise ValueError(f"--guard.spike {guard.spike} must be above 1, or 0 to flag no spikes")


def _check_output(config: RunConfig) -> None:
    """Refuses to write a run into the directory of its own model or data."""
    places = [("--model", config.model or "")]
    places += [("--data", place) for one in config.data for place in (one, one.rpartition(":")[0])]  # DATA:WEIGHT
    places += [("--valid", place) for one in config.valid for place in (one, one.partition("=")[2])]  # NAME=DATA
    for flag, place in places:
        if place and os.path.abspath(place) == os.path.abspath(config.output):
            raise ValueError(f"--output {config.output} is the directory of {flag}; give a directory of its own")
