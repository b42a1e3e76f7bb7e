"""What a step says of itself: its line of metrics.jsonl."""

from __future__ import annotations

from typing import Any

import torch

from engine.guards.skips import write_down
from engine.guards.spikes import Spikes
from engine.mesh import Mesh
from engine.reporting.flops import device_peak, step_flops
from engine.run_folder import RunFolder
from engine.trainer import HeldOutLosses, StepResult, mean_loss
from models.description import ModelDescription


def step_line(
    result: StepResult,
    description: ModelDescription,
    mesh: Mesh,
    *,
    seq_len: int,
    peak_tflops: float,
    aux_loss: float,
    sources: list[str],
) -> dict[str, Any]:
    """A step as a line of metrics.jsonl has it."""
    totals, routers, cuda = result.totals, result.routers, mesh.device.type == "cuda"
    flops = step_flops(description, totals.tokens, totals.squared_lengths, totals.windowed_squares)
    tflops = flops / result.seconds / mesh.world_size / 1e12
    peak = peak_tflops or device_peak(torch.cuda.get_device_name() if cuda else None)
    line: dict[str, Any] = {
        "step": result.step,
        "loss": totals.loss if totals.supervised and result.skipped is None else None,
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "tokens": totals.tokens,
        "supervised_tokens": totals.supervised,
        "padding_tokens": totals.padding,
        "seconds": result.seconds,
        "tflops": tflops,
        "mfu": tflops / peak if peak else None,
        "bin_fill": totals.tokens / (totals.bins * seq_len) if totals.bins else None,
    }
    if sources:
        pairs = zip(totals.source_losses, totals.source_tokens, strict=True)
        line["source_losses"] = dict(zip(sources, (mean_loss(*pair) for pair in pairs), strict=True))
        line["source_tokens"] = dict(zip(sources, totals.source_tokens, strict=True))
    if routers is not None:
        line["tokens_per_expert"] = list(routers.tokens_per_expert)
        line["expert_imbalance"] = list(routers.expert_imbalance)
        if aux_loss:
            line["aux_loss"] = routers.aux_loss / max(totals.supervised, 1)
    return line


def held_out_fields(held_out: HeldOutLosses) -> dict[str, Any]:
    """Held-out losses as a line of metrics.jsonl has them."""
    fields: dict[str, Any] = {"valid_loss": held_out.loss, "valid_losses": held_out.losses}
    return fields | ({"valid_source_losses": held_out.source_losses} if held_out.source_losses else {})


def flags(line: dict[str, Any], result: StepResult, spikes: Spikes, run: RunFolder) -> dict[str, bool]:
    """Says and writes down what was wrong with a step; the fields of its line that say so."""
    if result.skipped is not None:
        write_down(run.skipped, result.skipped)
        print(f"step {result.step:,} was skipped: {result.skipped.reason}; see {run.skipped}", flush=True)
        return {"skipped": True}
    if (times := spikes.times_median(line["loss"])) is not None:
        print(f"step {result.step:,}: loss {line['loss']:.4f} is {times:.1f} times the recent median", flush=True)
        return {"spike": True}
    return {}
