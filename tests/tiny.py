"""Tiny random models, conversations and indexes for exactness tests."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

VOCABULARY = 131  # no tensor-parallel size divides it
MODELS = {
    "llama": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "qwen2_tied": {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "qwen2_untied": {
        "model_type": "qwen2",
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}


def save_model(name: str, folder: Path, *, dtype=torch.float32, layers: int = 4, **changes) -> Path:
    """Writes a Hugging Face directory with random weights, norms and biases included."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        **MODELS[name],
        **changes,
    }
    kind = fields.pop("model_type")
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields), attn_implementation="eager")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embed" not in key:
                parameter.mul_(3.0)  # far from zero, so that attention is far from uniform
    model.to(dtype).save_pretrained(folder)
    return folder


class MemoryIndex:
    """A `data.index.DocumentIndex` in memory."""

    def __init__(self, documents: list[tuple[np.ndarray, np.ndarray]], name: str = "memory"):
        self.documents = documents
        self.path = Path(name)
        self.meta: dict = {}
        self.fingerprint = name
        self.lengths = np.array([len(tokens) for tokens, _ in documents], dtype=np.int32)

    def __len__(self) -> int:
        return len(self.documents)

    def tokens(self, document: int) -> np.ndarray:
        return self.documents[document][0]

    def spans(self, document: int) -> np.ndarray:
        return self.documents[document][1]


def conversations(count: int, seed: int = 0, longest: int = 45) -> MemoryIndex:
    """Random documents of odd lengths, some with several supervised turns, one with none."""
    random = np.random.default_rng(seed)
    documents = []
    for number in range(count):
        length = int(random.integers(4, longest // 2)) * 2 + 1
        tokens = random.integers(0, VOCABULARY, length).astype(np.int64)
        cuts = np.sort(random.choice(np.arange(1, length + 1), size=2 * (1 + number % 2), replace=False))
        spans = cuts.reshape(-1, 2).astype(np.int32)
        documents.append((tokens, spans if number != 3 else spans[:0]))
    return MemoryIndex(documents)


def reference(folder: Path, index: MemoryIndex, batches: list[list[int]], optim: SimpleNamespace) -> SimpleNamespace:
    """Trains the plain Hugging Face model one conversation at a time: losses, norms, first gradients."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    losses, norms, gradients = [], [], {}
    for batch in batches:
        total, count = 0.0, 0
        for document in batch:
            tokens, spans = index.documents[document]
            labels = np.full(len(tokens), -100)
            for start, end in spans:
                labels[start:end] = tokens[start:end]
            labels[0] = -100
            logits = model(input_ids=torch.from_numpy(tokens)[None]).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits, torch.from_numpy(labels[1:]), ignore_index=-100, reduction="sum"
            )
            loss.backward()
            total, count = total + loss.item(), count + int((labels >= 0).sum())
        for parameter in model.parameters():
            parameter.grad /= count
        if not gradients:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        losses.append(total / count)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad)))
        adam.step()
        adam.zero_grad()
    return SimpleNamespace(losses=losses, norms=norms, gradients=gradients)


def read_json(path: Path) -> dict:
    return json.loads(Path(path).read_text())
