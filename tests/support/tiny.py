"""Tiny random models, conversations and indexes for exactness tests."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from tests.support.loading import MemoryIndex

VOCABULARY = 131  # no tensor-parallel size divides it
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5e5,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 32,
}
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
    "llama_tied": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
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
    "qwen3_tied": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True, "rope_parameters": PLAIN},
    "qwen3_windows": {  # windows in the upper half of the layers
        "model_type": "qwen3",
        "head_dim": 16,
        "tie_word_embeddings": False,
        "rope_parameters": PLAIN,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 2,
    },
    "olmo2": {"model_type": "olmo2", "tie_word_embeddings": False, "rope_parameters": PLAIN},
    "olmo3": {
        "model_type": "olmo3",
        "tie_word_embeddings": False,
        "sliding_window": 9,
        "rope_parameters": {"sliding_attention": PLAIN, "full_attention": YARN},
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "tie_word_embeddings": False,
        "rope_parameters": PLAIN,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    },
    "qwen3_moe_tied": {  # with weights as a softmax over all experts gives them
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "tie_word_embeddings": True,
        "rope_parameters": PLAIN,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": False,
    },
    "gpt_oss": {  # whose square down-projection keeps its shape when it is turned round
        "model_type": "gpt_oss",
        "head_dim": 16,
        "intermediate_size": 64,
        "sliding_window": 5,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "rope_parameters": YARN | {"factor": 32.0, "truncate": False},
    },
}
EXPERTS = ("qwen3_moe", "qwen3_moe_tied", "gpt_oss")


def save_model(name: str, folder: Path, *, dtype=torch.float32, layers: int = 4, **changes) -> Path:
    """Writes a Hugging Face directory with random weights; norms, biases and sinks included."""
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
        "pad_token_id": None,
        "eos_token_id": 1,
        **MODELS[name],
        **changes,
    }
    kind = fields.pop("model_type")
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields), attn_implementation="eager")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1 or key.endswith("_bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embed" not in key:
                parameter.mul_(3.0)  # far from zero, so that attention is far from uniform
            if key.endswith("sinks"):
                parameter.add_(torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    return folder


class Memory(dict):
    """A reader of tensors in memory, which counts reads and the bytes that were asked for, by name."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.reads: Counter[str] = Counter()
        self.read_bytes: Counter[str] = Counter()

    def names(self):
        return list(self)

    def shape(self, name):
        return tuple(self[name].shape)

    def dtype(self, name):
        return self[name].dtype

    def read(self, name, index=(), out=None):
        part = self[name][index]
        self.reads[name] += 1
        self.read_bytes[name] += part.nbytes
        return part.clone() if out is None else out.copy_(part)


def conversations(count: int, seed: int = 0, longest: int = 45, sources: int = 1) -> MemoryIndex:
    """Random documents of odd lengths, some with several supervised turns, one with none; of sources in turn."""
    random = np.random.default_rng(seed)
    documents = []
    for number in range(count):
        length = int(random.integers(4, longest // 2)) * 2 + 1
        tokens = random.integers(0, VOCABULARY, length).astype(np.int64)
        cuts = np.sort(random.choice(np.arange(1, length + 1), size=2 * (1 + number % 2), replace=False))
        spans = cuts.reshape(-1, 2).astype(np.int32)
        documents.append((tokens, spans if number != 3 else spans[:0]))
    return MemoryIndex(documents, sources=[n % sources for n in range(count)] if sources > 1 else None)


def write_documents(folder: Path, count: int, seed: int = 0) -> Path:
    """A data directory of `conversations`."""
    from data.index import write_index

    write_index(folder, conversations(count, seed).documents, vocab_size=VOCABULARY)
    return folder


def make_inputs(folder: Path, family: str = "qwen2_untied", documents: int = 10) -> Path:
    """`folder` with a model of two layers in `model` and conversations in `data`: what a run takes."""
    save_model(family, folder / "model", layers=2)
    write_documents(folder / "data", documents)
    return folder


def edit_meta(folder: Path, **changes) -> None:
    """Changes what meta.json says, and leaves out the checksums, as data had it that was prepared before them."""
    meta = {
        key: value for key, value in read_json(folder / "meta.json").items() if key not in ("checksum", "checksums")
    }
    (folder / "meta.json").write_text(json.dumps(meta | changes))


def reference(folder: Path, index: MemoryIndex, batches: list[list[int]], optim: SimpleNamespace) -> SimpleNamespace:
    """Trains the plain Hugging Face model one conversation at a time.

    Returns losses, norms, the first gradients, and of each step (loss sum, supervised tokens) of every source.
    """
    from transformers import AutoModelForCausalLM

    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **eager)
    plain = [p for name, p in model.named_parameters() if p.dim() == 1 or name.endswith("_bias")]
    decayed = [p for p in model.parameters() if not any(p is other for other in plain)]
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    losses, norms, by_source, gradients = [], [], [], {}
    for batch in batches:
        sums = np.zeros((len(index.source_names), 2))
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
            sums[index.sources[document]] += loss.item(), (labels >= 0).sum()
        total, count = sums.sum(0)
        for parameter in model.parameters():
            parameter.grad /= count
        if not gradients:
            gradients = {
                name: part for key, p in model.named_parameters() for name, part in in_files(model.config, key, p.grad)
            }
        losses.append(total / count)
        by_source.append(sums)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad)))
        adam.step()
        adam.zero_grad()
    return SimpleNamespace(losses=losses, norms=norms, by_source=by_source, gradients=gradients)


def in_files(config, name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """A parameter of a transformers model as its files hold it: some families' experts are one file tensor each."""
    head, experts, kind = name.rpartition("experts.")
    if not experts or config.model_type != "qwen3_moe":
        return [(name, tensor.clone())]
    names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[kind]
    return [
        (f"{head}experts.{number}.{one}.weight", part.clone())
        for number, matrix in enumerate(tensor)
        for one, part in zip(names, matrix.chunk(len(names)), strict=True)
    ]


def read_json(path: Path) -> dict:
    return json.loads(Path(path).read_text())
