"""Training speed beside transformers' Trainer and TRL's SFTTrainer: same model, conversations, order and threads.

    python benchmarks/training_speed.py [--source FILE.jsonl] [--seconds S] [--rounds N] [--only NAME ...]

Each contender trains from the same weights in a process of its own, in turn; the numbers are medians over
steps. "loss" is that of the first step and of the conversations of step `--guard-step`, where contenders
that train the same thing agree (smaller batches and other orders differ a little). The ratio "in CPU s" is
that of supervised tokens a second of processor time, for machines that other programs share. SFTTrainer recomputes
activations unless told otherwise ("kept") and packs in an order of its own. `pip install -e '.[bench]'` brings TRL.
"""

from __future__ import annotations

import resource
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from common import (
    GSM8K,
    examples,
    global_order,
    in_fresh_process,
    lathe_trainer,
    load,
    make_equal_data,
    make_model,
    make_real_data,
    pad_batch,
)
from rich.console import Console
from rich.table import Table

LEARNING_RATE = 3e-4
# name -> (function below, its settings); peers are divided into the Lathe of their precision
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Lathe fp32": ("lathe", {"precision": "fp32"}),
    "Trainer fp32": ("trainer", {"bf16": False}),
    "Lathe bf16": ("lathe", {"precision": "bf16"}),
    "Trainer bf16": ("trainer", {"bf16": True}),
    "SFTTrainer padded": ("sft", {"packing": False}),
    "SFTTrainer packed": ("sft", {"packing": True}),
    "SFTTrainer padded, kept": ("sft", {"packing": False, "gradient_checkpointing": False}),
    "SFTTrainer packed, kept": ("sft", {"packing": True, "gradient_checkpointing": False}),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compares training speed."""

    source: Path | None = GSM8K if GSM8K.exists() else None
    """JSONL with question and answer for the real lengths; without it they are generated."""
    seconds: float = 12.0
    """Time of a contender's measured steps in a round."""
    rounds: int = 2
    """How often each contender's turn comes."""
    warmup_steps: int = 3
    """Steps before the measured ones."""
    guard_step: int = 8
    """Every contender trains at least to the conversations of this step of Lathe's."""
    threads: int = 2
    batch: int = 16
    """Conversations a step of Lathe and Trainer."""
    sft_batch: int = 8
    """Conversations a step of SFTTrainer, padded; packed, a row of 2,048 tokens is about as much."""
    seq_len: int = 4096
    """Lathe's bins for the real lengths, in tokens."""
    equal_seq_len: int = 4096
    """Lathe's bins for the equal lengths."""
    data: tuple[str, ...] = ("equal", "real")
    only: tuple[str, ...] = field(default_factory=lambda: tuple(CONTENDERS))
    """Contenders, by name."""


@dataclass
class Record:
    """A contender's steps, in their order."""

    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)  # seconds of all threads
    losses: list[float] = field(default_factory=list)
    conversations: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    peak_mb: float = 0.0

    def start(self) -> None:
        self._clocks = time.perf_counter(), time.process_time()

    def step(self) -> None:
        """Notes what passed since the last step, or the start."""
        before, self._clocks = self._clocks, (time.perf_counter(), time.process_time())
        self.seconds.append(self._clocks[0] - before[0])
        self.processor.append(self._clocks[1] - before[1])

    def finished(self, options: Options) -> bool:
        """Whether time is up and the guard's conversations are behind."""
        steps = len(self.seconds)
        guarded = sum(self.conversations[:steps]) >= options.guard_step * options.batch
        return guarded and sum(self.seconds[options.warmup_steps :]) > options.seconds

    def closed(self) -> Record:
        """Cuts off batches that were made and not trained on, and notes the memory."""
        for name in ("conversations", "tokens", "supervised", "losses"):
            setattr(self, name, getattr(self, name)[: len(self.seconds)])
        self.peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return self

    def guard_loss(self, options: Options) -> float:
        """The loss a supervised token over the conversations of the guard step."""
        seen = np.cumsum(self.conversations)
        first, last = (options.guard_step - 1) * options.batch, options.guard_step * options.batch
        steps = (seen > first) & (seen - self.conversations < last)
        return float(np.average(np.array(self.losses)[steps], weights=np.array(self.supervised)[steps]))


def lathe(options: Options, model: Path, data: Path, order: np.ndarray, *, precision: str) -> Record:
    """Lathe's steps."""
    seq_len = options.equal_seq_len if data.name == "equal" else options.seq_len
    trainer = lathe_trainer(model, data, seq_len=seq_len, batch=options.batch, precision=precision, lr=LEARNING_RATE)
    record = Record()
    record.start()
    while not record.finished(options):
        totals = trainer.train_step().totals
        record.step()
        record.losses.append(totals.loss)
        record.conversations.append(options.batch)
        record.tokens.append(totals.tokens)
        record.supervised.append(totals.supervised)
    return record.closed()


def recording(record: Record, options: Options):
    """transformers' callback that clocks from step's end to step's end, data loading included."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            record.start()

        def on_step_end(self, args, state, control, **_):
            record.step()
            control.should_training_stop = record.finished(options)

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in logs:
                record.losses.append(float(logs["loss"]))

    return Recorder()


def counting(record: Record, collate):
    """The collator, noting how much a batch holds; a label counts where a token predicts it."""

    def counted(features: list[dict]) -> dict:
        batch = collate(features)
        rows = [feature.get("seq_lengths", [len(feature["input_ids"])]) for feature in features]
        record.conversations.append(sum(map(len, rows)))
        record.tokens.append(sum(map(sum, rows)))
        record.supervised.append(int((batch["labels"][:, 1:] != -100).sum()))
        return batch

    return counted


def trainer(options: Options, model: Path, data: Path, order: np.ndarray, *, bf16: bool) -> Record:
    """transformers' Trainer: padded batches, its fused AdamW."""
    from transformers import AutoModelForCausalLM, TrainingArguments
    from transformers import Trainer as Peer

    record = Record()
    settings = TrainingArguments(**peer_settings(data, options.batch), bf16=bf16, remove_unused_columns=False)
    peer = Peer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        settings,
        train_dataset=examples(data, order),
        data_collator=counting(record, pad_batch),
        callbacks=[recording(record, options)],
    )
    peer.train()
    return record.closed()


def sft(options: Options, model: Path, data: Path, order: np.ndarray, *, packing: bool, **settings) -> Record:
    """TRL's SFTTrainer with its own defaults, bf16 and recomputation among them, unless `settings` say other."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    record = Record()
    given = peer_settings(data, 1 if packing else options.sft_batch) | settings
    if packing:  # its packer sorts by length, so rows have to be drawn at random
        given |= {"packing": True, "max_length": 2048, "train_sampling_strategy": "random"}
    peer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        SFTConfig(**given, bf16=True),
        train_dataset=examples(data, order),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[recording(record, options)],
    )
    peer.data_collator = counting(record, peer.data_collator)
    peer.train()
    return record.closed()


def peer_settings(data: Path, batch: int) -> dict[str, Any]:
    """What Trainer and SFTTrainer are told alike; the rest is their default."""
    return {
        "output_dir": str(data.with_name("peer")),
        "use_cpu": True,
        "per_device_train_batch_size": batch,
        "train_sampling_strategy": "sequential",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_steps": 1_000_000,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def print_table(console: Console, title: str, records: dict[str, list[Record]], options: Options) -> None:
    table = Table(title=title)
    numbers = ("ms a step", "supervised/s", "tokens/s", "Lathe / it", "in CPU s", "loss 1", "loss guard", "peak MB")
    for column in ("", *numbers):
        table.add_column(column, justify="right" if column else "left")
    rates = {}
    for name, rounds in records.items():
        steps = [
            (r.seconds[i], r.supervised[i] / r.seconds[i], r.tokens[i] / r.seconds[i], r.supervised[i] / r.processor[i])
            for r in rounds
            for i in range(options.warmup_steps, len(r.seconds))
        ]
        rates[name] = np.median(steps, axis=0)
    for name, rounds in records.items():
        seconds, supervised, tokens, per_cpu = rates[name]
        beside = "Lathe fp32" if name.endswith("fp32") else "Lathe bf16"
        peer = beside in rates and beside != name
        ratio = f"{rates[beside][1] / supervised:.2f}" if peer else ""
        cpu_ratio = f"{rates[beside][3] / per_cpu:.2f}" if peer else ""
        first, guard = rounds[0].losses[0], rounds[0].guard_loss(options)
        row = (f"{seconds * 1e3:,.0f}", f"{supervised:,.0f}", f"{tokens:,.0f}", ratio, cpu_ratio)
        table.add_row(name, *row, f"{first:.4f}", f"{guard:.4f}", f"{max(r.peak_mb for r in rounds):,.0f}")
    console.print(table)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = make_model(work / "model", options.source)
        for kind in options.data:
            data = work / kind
            make_equal_data(data) if kind == "equal" else make_real_data(data, model, options.source)
            order = global_order(data, seq_len=options.seq_len, batch=options.batch, steps=120)
            records: dict[str, list[Record]] = {name: [] for name in options.only}
            for _ in range(options.rounds):
                for name in options.only:
                    function, settings = CONTENDERS[name]
                    arguments = (run, function, options, model, data, order, settings)
                    console.log(f"{kind} lengths: {name}")
                    records[name].append(in_fresh_process(*arguments, threads=options.threads, log=work / "log"))
            title = f"{kind} lengths, {options.threads} threads, load {load()}"
            print_table(console, title, records, options)


def run(function: str, options: Options, model: Path, data: Path, order: np.ndarray, settings: dict) -> Record:
    """One contender's turn, in its own process."""
    return globals()[function](options, model, data, order, **settings)


if __name__ == "__main__":
    main()
