"""What a run says of itself before its first step, and the document that its report shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from models.hf_config import describe

if TYPE_CHECKING:
    from engine.train import Trainer


def start_lines(trainer: Trainer, on_host: bool) -> str:
    """What a run says of itself before its first step."""
    prepared, mesh, config = trainer.prepared, trainer.mesh, trainer.config
    counts = trainer.loader.counts
    parameters = sum(int(np.prod(rule.shape)) for rule in prepared.description.rules)
    where = "host, gloo" if on_host else f"{torch.cuda.get_device_name()}, NCCL"
    lines = [
        f"model: {prepared.description.family}, {parameters / 1e6:,.1f} M parameters from {prepared.source.weights}",
        f"layout: {mesh.layout.product(mesh.world_size)}, sp {'on' if mesh.layout.sp else 'off'}, {where}",
        f"backend: {prepared.backend} ({prepared.backend_reason}), {config.precision}",
        f"data: {counts.documents:,} documents, dropped {counts.dropped:,}, truncated {counts.truncated:,}, "
        f"bins of {config.seq_len:,} tokens, documents padded to {prepared.pad_multiple}",
        f"run: {trainer.total_steps:,} steps of {config.global_batch_size} {config.batch_unit} in {config.output}",
    ]
    if (grown := added_rows(trainer)) > 0:
        lines.append(f"vocabulary: {grown:,} rows added for the data's tokens, each the mean of the model's")
    if trainer.valid_loader is not None:
        held_out = trainer.valid_loader.counts
        lines.append(
            f"held out: {held_out.documents:,} documents, dropped {held_out.dropped:,}, truncated "
            f"{held_out.truncated:,}"
        )
    if prepared.resume is not None:
        lines.append(f"resumed from {prepared.resume.directory} after step {trainer.step}")
    return "\n".join(lines)


def added_rows(trainer: Trainer) -> int:
    """Rows of the vocabulary that the base model had not."""
    prepared = trainer.prepared
    return prepared.description.vocab_size - describe(prepared.source.files).vocab_size


def sample_document(trainer: Trainer) -> list[tuple[str, bool]] | None:
    """One document as (token text, supervised), for the report; None where the data has no tokenizer."""
    index, _ = trainer.prepared.data[0]
    if not (index.path / "tokenizer").is_dir():
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(index.path / "tokenizer")
    tokens, supervised = index.tokens(0)[:600], np.zeros(len(index.tokens(0)), dtype=bool)
    for start, end in index.spans(0):
        supervised[start:end] = True
    return [(tokenizer.decode([int(t)]), bool(s)) for t, s in zip(tokens, supervised, strict=False)]
