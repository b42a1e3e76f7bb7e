"""What a run says of itself before its first step, and the document that its report shows."""

from __future__ import annotations

import math

import numpy as np
import torch

from data.audit import lost_rows, unsupervised
from data.documents import Documents
from engine.cuda_setup import setup_line
from engine.mesh import Mesh
from engine.prepare import Prepared


def start_lines(prepared: Prepared, mesh: Mesh, step: int, on_host: bool) -> str:
    """What a run that stands at `step` says of itself before the next one."""
    config, base = prepared.config, prepared.base_model
    description = base.description
    parameters = sum(math.prod(rule.shape) for rule in description.rules)
    where = "host, gloo" if on_host else f"{torch.cuda.get_device_name()}, NCCL"
    lines = [
        f"model: {description.family}, {parameters / 1e6:,.1f} M parameters from {base.weights}",
        *base.notes,
        f"layout: {mesh.layout.product(mesh.world_size)}, sp {'on' if mesh.layout.sp else 'off'}, {where}",
        f"backend: {prepared.backend} ({prepared.backend_reason}), {config.precision}"
        f"{', deterministic' * config.deterministic}",
        f"data: {prepared.order.counts}, packed sequences of {config.seq_len:,} tokens, documents padded to "
        f"{prepared.pad_multiple}",
        f"run: {prepared.total_steps:,} steps of {config.global_batch_size} {config.batch_unit} in {config.output}",
    ]
    if not on_host:
        lines.append(setup_line(mesh.layout, deterministic=config.deterministic, dumps=prepared.run.collectives))
    if (added := description.vocab_size - base.own_vocab_size) > 0:
        lines.append(f"vocabulary: {added:,} rows added for the data's tokens, each the mean of the model's")
    for index in prepared.order.indexes:
        if lost := lost_rows(index.meta):
            lines.append(f"dropped when {index.path} was prepared: {lost}")
        lines += [f"no token is supervised in {silent} of {index.path}" for silent in unsupervised(index.meta)]
    lines += [f"held out, {name}: {order.counts}" for name, order in prepared.valid_orders.items()]
    silent = [
        index for index in prepared.order.indexes + prepared.held_out if not index.meta.get("tokenizer_fingerprint")
    ]
    if silent:
        paths = ", ".join(dict.fromkeys(str(index.path) for index in silent))
        lines.append(f"tokenizer: the model's could not be compared with that of {paths}, which is not recorded")
    if prepared.resume is not None:
        lines.append(f"resumed from {prepared.resume.directory} after step {step}")
        lines += [f"changed: {change}" for change in prepared.changes]
    return "\n".join(lines)


def sample_document(index: Documents) -> list[tuple[str, bool]] | None:
    """Its first document as (token text, supervised), for the report; None where the data has no tokenizer."""
    if not (index.path / "tokenizer").is_dir():
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(index.path / "tokenizer", trust_remote_code=False)
    tokens, supervised = index.tokens(0)[:600], np.zeros(len(index.tokens(0)), dtype=bool)
    for start, end in index.spans(0):
        supervised[start:end] = True
    return [(tokenizer.decode([int(t)]), bool(s)) for t, s in zip(tokens, supervised, strict=False)]
