"""A random model that answers, and problems that it is asked."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from examples.demo.model import build_demo_model
from examples.demo.problems import make_problems


def answering_model(path: Path) -> Path:
    """A model whose weights are large enough for its greedy answers to differ between prompts."""
    from transformers import AutoModelForCausalLM

    build_demo_model(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.12)
    model.save_pretrained(path)
    return path


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_problems(path: Path, count: int = 9) -> Path:
    """Problems of unlike length, one with a system turn."""
    rows = make_problems(train=0, heldout=count)[1]
    rows[min(4, count - 1)]["messages"].insert(0, {"role": "system", "content": "Answer with a number. " * 3})
    return write_rows(path, rows)
