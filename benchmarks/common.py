"""What the benchmarks share: the 30 M model, the two data sets, fresh processes and Lathe ready to step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

    from engine.trainer import Trainer

REPOSITORY = Path(__file__).resolve().parents[1]
GSM8K = REPOSITORY.parent / "shared" / "data" / "gsm8k_train.jsonl"
# 29.9 M parameters; the one place that says what kind of model is trained.
MODEL = {
    "model_type": "qwen2",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
EQUAL_LENGTH = 256


def in_fresh_process(function: Callable, *arguments: Any, threads: int, log: Path) -> Any:
    """Calls `function` in a process of its own with so many threads; what it prints goes to `log`."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_quietly, function, arguments, threads, log).result()


def _quietly(function: Callable, arguments: tuple, threads: int, log: Path) -> Any:
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    torch.set_num_threads(threads)
    return function(*arguments)


def load() -> str:
    """How busy the machine is, as the kernel counts it: one busy core is 1."""
    return " ".join(f"{value:.1f}" for value in os.getloadavg())


def make_model(folder: Path, source: Path | None) -> Path:
    """Writes the model with random weights, always the same, and a tokenizer trained on `source`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from examples.demo.model import train_tokenizer
    from examples.demo.problems import make_problems

    if source is None:
        rows = [{"text": message["content"]} for row in make_problems(2_000, 0)[0] for message in row["messages"]]
    else:
        rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    texts = (text for row in rows for text in row.values() if isinstance(text, str))
    tokenizer = train_tokenizer(texts, MODEL["vocab_size"])
    config = AutoConfig.for_model(**MODEL, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_equal_data(folder: Path, documents: int = 4_000) -> Path:
    """Conversations of exactly 256 tokens, all supervised, drawn as words are: the n-th as often as 1/n.

    The three special tokens stay out: transformers gives the padding token's embedding no gradient.
    """
    from data.index import write_index

    random = np.random.default_rng(0)
    shares = 1 / np.arange(1, MODEL["vocab_size"] - 2)
    tokens = 3 + random.choice(len(shares), size=(documents, EQUAL_LENGTH), p=shares / shares.sum())
    spans = np.array([[0, EQUAL_LENGTH]])
    write_index(folder, ((row, spans) for row in tokens), vocab_size=MODEL["vocab_size"])
    return folder


def make_real_data(folder: Path, model: Path, source: Path | None, documents: int = 7_473) -> Path:
    """The source's conversations, answers supervised; without a source, lengths like those of GSM8K."""
    if source is not None:
        from rich.console import Console

        from data.preparation.prepare import PrepareOptions, prepare

        with open(os.devnull, "w") as nowhere:
            options = PrepareOptions(sources=(str(source),), model=str(model), output=folder, num_workers=1)
            prepare(options, Console(file=nowhere))
        return folder
    from data.index import write_index

    random = np.random.default_rng(0)
    prompts = np.clip(random.lognormal(4.1, 0.4, documents), 20, 300).astype(int)
    answers = np.clip(random.lognormal(4.65, 0.45, documents), 15, 400).astype(int)
    made = (
        (random.integers(3, MODEL["vocab_size"], prompt + answer), [[prompt, prompt + answer]])
        for prompt, answer in zip(prompts, answers, strict=True)
    )
    write_index(folder, made, vocab_size=MODEL["vocab_size"])
    return folder


def global_order(data: Path, *, seq_len: int, batch: int, steps: int) -> np.ndarray:
    """The documents of Lathe's first steps, [steps, batch]: every contender trains on these."""
    from data.index import DocumentIndex
    from data.loader import Loader
    from data.order import GlobalOrder

    made = GlobalOrder(
        [(DocumentIndex(data), 1.0)],
        seq_len=seq_len,
        global_batch_size=batch,
        batch_unit="conversations",
        pad_documents_to=2,
        too_long="error",
        seed=1234,
    )
    loader = Loader(made, micro_batch_size=1, dp_rank=0, dp_size=1)
    whole = loader.steps_in_epoch(0) - 1  # an epoch's last batch may be short
    batches = [loader.step(0, step) for step in range(min(steps, whole))]
    return np.array([sorted(d for m in microbatches for _, d in m.sample_ids) for microbatches in batches])


def examples(data: Path, order: np.ndarray) -> Dataset:
    """The conversations as transformers wants them, one after the other in Lathe's order."""
    from datasets import Dataset

    from data.index import DocumentIndex

    index = DocumentIndex(data)
    rows = []
    for document in order.reshape(-1).tolist():
        tokens = index.tokens(document).astype(np.int64)
        labels = np.full(len(tokens), -100)
        for start, end in index.spans(document):
            labels[start:end] = tokens[start:end]
        labels[0] = -100  # nothing predicts the first token
        rows.append({"input_ids": tokens.tolist(), "labels": labels.tolist()})
    return Dataset.from_list(rows)


def pad_batch(features: list[dict]) -> dict[str, Tensor]:
    """Pads to the longest of the batch."""
    import torch

    def padded(name: str, value: int) -> Tensor:
        rows = [torch.tensor(feature[name]) for feature in features]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    lengths = torch.tensor([len(feature["input_ids"]) for feature in features])
    inputs = padded("input_ids", 0)
    mask = (torch.arange(inputs.shape[1]) < lengths[:, None]).long()
    return {"input_ids": inputs, "attention_mask": mask, "labels": padded("labels", -100)}


def lathe_trainer(model: Path, data: Path, *, seq_len: int, batch: int, precision: str, lr: float) -> Trainer:
    """Lathe on this process alone, ready to step, in the order of `global_order`."""
    from engine import host
    from engine.config import OptimConfig, RunConfig
    from engine.mesh import build_mesh
    from engine.prepare import prepare_run
    from engine.trainer import Trainer

    host.enable()
    config = RunConfig(
        model=str(model),
        data=(str(data),),
        output=data.with_name("run"),
        seq_len=seq_len,
        global_batch_size=batch,
        steps=1_000_000,
        precision=precision,
        optim=OptimConfig(lr=lr, schedule="constant", beta2=0.999),  # transformers' betas
    )
    return Trainer(prepare_run(config, world_size=1, cuda=False), build_mesh(config.layout))
