"""Training speed and memory on one GPU, every backend and precision, beside Trainer and SFTTrainer + Liger.

    python benchmarks/gpu.py [--models qwen2.5-1.5b llama-3.1-8b] [--seq-lens 4096 16384 32768] [--only NAME ...]

Models have the shapes of `gpu_shapes.SHAPES` and random weights; where all layers do not fit beside gradients
and optimizer, as many as fit are kept, the same for every contender. Each contender trains the same packed bins
in a process of its own. "MFU" is of a bf16 matrix product measured in that process; operations are counted by
`engine/reporting/flops.py`. "reckoned" is the peak that `gpu_shapes.memory_needed` said beforehand, in bf16.
Rows are added to --results as they come, and the table shows all that is there.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # on a bare machine Lathe is not installed

from gpu_profile import lathe_trainer, matrix_tflops, steps_of, write_data, write_model  # sets torch's environment

# isort: split
import numpy as np
import torch
import tyro
from gpu_shapes import SHAPES, layers_that_fit, memory_needed

# name -> (who trains, settings)
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "native bf16": ("lathe", {"backend": "native", "precision": "bf16"}),
    "te bf16": ("lathe", {"backend": "te", "precision": "bf16"}),
    "te fp8 tensorwise": ("lathe", {"backend": "te", "precision": "fp8", "fp8": "tensorwise"}),
    "te fp8 delayed": ("lathe", {"backend": "te", "precision": "fp8", "fp8": "delayed"}),
    "te fp8 blockwise": ("lathe", {"backend": "te", "precision": "fp8", "fp8": "blockwise"}),
    "te fp8 mxfp8": ("lathe", {"backend": "te", "precision": "fp8", "fp8": "mxfp8"}),
    "Trainer sdpa": ("trainer", {"attention": "sdpa"}),
    "Trainer flex": ("trainer", {"attention": "flex_attention"}),
    "Trainer flash": ("trainer", {"attention": "flash_attention_2"}),
    "SFTTrainer + Liger flex": ("sft", {"attention": "flex_attention"}),
    "SFTTrainer + Liger flash": ("sft", {"attention": "flash_attention_2"}),
}
FLASH = importlib.util.find_spec("flash_attn") is not None
INSTALLED = {
    "lathe": True,
    "trainer": importlib.util.find_spec("accelerate") is not None,
    "sft": all(importlib.util.find_spec(name) is not None for name in ("trl", "liger_kernel", "datasets")),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measures training on one GPU."""

    models: tuple[str, ...] = tuple(SHAPES)
    seq_lens: tuple[int, ...] = (4096, 16384, 32768)
    only: tuple[str, ...] = field(default_factory=lambda: tuple(CONTENDERS))
    """Contenders, by name."""
    steps: int = 20
    warmup_steps: int = 5
    """Steps at the start that are not measured."""
    tokens_per_step: int = 65536
    """Bins of a step are this many tokens together; at least one bin."""
    layers: int | None = None
    """Layers to keep; as many as fit unless given."""
    recompute: Literal["none", "full"] = "none"
    """Activations recomputed, by everyone alike."""
    results: Path = Path("runs/gpu.jsonl")
    """Where each row goes as soon as it is measured."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row of the table."""

    contender: str
    model: str
    folder: str
    data: str
    seq_len: int
    bins: int
    options: Options

    @property
    def steps(self) -> list[list[Any]]:
        """The microbatches of each step."""
        return steps_of(self.data, seq_len=self.seq_len, bins=self.bins, steps=self.options.steps)


def lathe(job: Job, **settings: Any) -> list[float]:
    """Seconds of Lathe's steps."""
    paths = Path(job.folder), Path(job.data)
    recompute = job.options.recompute
    trainer = lathe_trainer(*paths, seq_len=job.seq_len, bins=job.bins, recompute=recompute, **settings)
    seconds = []
    for _ in range(job.options.steps):
        torch.cuda.synchronize()
        started = time.perf_counter()
        trainer.train_step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


def peer(job: Job, base: type, settings: Any, attention: str, **options: Any) -> list[float]:
    """Seconds of the steps of a transformers Trainer over the same bins: fp32 weights under bf16 autocast."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, TrainerCallback

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            torch.cuda.synchronize()
            self.started = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.started)

    class Ordered(base):  # type: ignore[misc, valid-type]
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    rows: dict[str, list[Any]] = {"input_ids": [], "labels": [], "position_ids": []}
    for batch in (batch for step in job.steps for batch in step):
        labels = np.full(len(batch.tokens), -100)  # transformers shifts them itself
        labels[1:][batch.loss_mask[:-1]] = batch.labels[:-1][batch.loss_mask[:-1]]
        for name, values in zip(rows, (batch.tokens, labels, batch.positions), strict=True):
            rows[name].append(values)
    trainer = Ordered(
        AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.float32, attn_implementation=attention),
        settings,
        train_dataset=Dataset.from_dict(rows),
        data_collator=lambda items: {name: torch.tensor([item[name] for item in items]) for name in rows},
        callbacks=[Clock()],
        **options,
    )
    trainer.train()
    return seconds


def peer_settings(job: Job) -> dict[str, Any]:
    """What both peers are told alike: a step of the same bins, AdamW fused, nothing saved or reported."""
    return {
        "output_dir": str(Path(job.data).with_name("peer")),
        "bf16": True,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": job.bins,
        "gradient_checkpointing": job.options.recompute == "full",
        "max_steps": job.options.steps,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "remove_unused_columns": False,
        "logging_steps": 1_000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def trainer(job: Job, attention: str) -> list[float]:
    """transformers' Trainer."""
    from transformers import Trainer, TrainingArguments

    return peer(job, Trainer, TrainingArguments(**peer_settings(job)), attention)


def sft(job: Job, attention: str) -> list[float]:
    """TRL's SFTTrainer with Liger's kernels. It wants a tokenizer and is given one of a single word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(WordLevel({"<end>": 0}, unk_token="<end>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    given = peer_settings(job) | {"use_liger_kernel": True, "max_length": None}
    settings = SFTConfig(**given, dataset_kwargs={"skip_prepare_dataset": True})
    return peer(job, SFTTrainer, settings, attention, processing_class=tokenizer)


def measure(job: Job) -> dict[str, Any]:
    """One row, in a process of its own; a contender that fails says why."""
    who, settings = CONTENDERS[job.contender]
    row: dict[str, Any] = {"model": job.model, "seq_len": job.seq_len, "contender": job.contender}
    try:
        row["matrix_tflops"] = matrix_tflops()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        train = {"lathe": lathe, "trainer": trainer, "sft": sft}[who]
        row["step_seconds"] = statistics.median(train(job, **settings)[job.options.warmup_steps :])
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    except torch.OutOfMemoryError:
        row["failed"] = "out of memory"
    except Exception as error:
        traceback.print_exc()
        row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:90]}"
    return row


def add_rates(row: dict[str, Any], job: Job) -> dict[str, Any]:
    """Turns a row's seconds into rates, by what the measured steps hold on average."""
    from engine.reporting.flops import step_flops
    from models.hf_config import describe

    if "failed" in row:
        return row
    steps = job.steps[job.options.warmup_steps :]
    bins = [batch for step in steps for batch in step]
    squares = sum(int(np.square(batch.document_lengths, dtype=np.int64).sum()) for batch in bins) / len(steps)
    tokens = sum(batch.real_tokens for batch in bins) / len(steps)
    supervised = sum(batch.supervised_tokens for batch in bins) / len(steps)
    seconds = row["step_seconds"]
    tflops = step_flops(describe(job.folder), int(tokens), int(squares)) / seconds / 1e12
    rates = {"tokens_per_second": tokens / seconds, "supervised_per_second": supervised / seconds, "tflops": tflops}
    return row | rates | {"mfu": tflops / row["matrix_tflops"]}


def print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="one GPU, packed full finetuning")
    columns = ("tokens/s", "supervised/s", "TFLOP/s", "matrix TFLOP/s", "MFU", "peak GiB", "reckoned", "ms a step")
    for column in ("model", "layers", "seq", "", *columns):
        table.add_column(column, justify="right" if column in columns else "left")
    for row in rows:
        cells = [row["model"], str(row["layers"]), f"{row['seq_len']:,}", row["contender"]]
        if "failed" in row:
            table.add_row(*cells[:3], f"{row['contender']}: {row['failed']}")
            continue
        cells += [f"{row['tokens_per_second']:,.0f}", f"{row['supervised_per_second']:,.0f}", f"{row['tflops']:.0f}"]
        cells += [f"{row['matrix_tflops']:.0f}", f"{row['mfu']:.1%}"]
        cells += [f"{row['peak_gib']:.1f}", f"{row['reckoned_gib']:.1f}"]
        table.add_row(*cells, f"{row['step_seconds'] * 1e3:,.0f}")
    Console(width=200).print(table)


def available(name: str) -> bool:
    """Whether a contender's libraries are here; one that is named and missing is said to be left out."""
    who, settings = CONTENDERS[name]
    return INSTALLED[who] and (FLASH or settings.get("attention") != "flash_attention_2")


def rows_of(options: Options, model: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Measures every contender on one model at every length, each in a fresh process."""
    fresh = functools.partial(ProcessPoolExecutor, 1, mp_context=get_context("spawn"))
    memory = torch.cuda.get_device_properties(0).total_memory
    longest, recompute = max(options.seq_lens), options.recompute == "full"
    layers = options.layers or layers_that_fit(SHAPES[model], longest, memory, recompute=recompute)
    with fresh() as pool:  # whose memory goes back when it ends
        pool.submit(write_model, folder / "model", SHAPES[model], layers).result()
    for seq_len in options.seq_lens:
        bins = max(1, options.tokens_per_step // seq_len)
        tokens = (options.steps + 2) * bins * seq_len  # two steps more than are trained, since bins are not full
        data = write_data(folder / f"data-{seq_len}", SHAPES[model]["vocab_size"], seq_len, tokens)
        for contender in filter(available, options.only):
            paths = {"folder": str(folder / "model"), "data": str(data)}
            job = Job(contender=contender, model=model, seq_len=seq_len, bins=bins, options=options, **paths)
            with fresh() as pool:
                row = pool.submit(measure, job).result()
            reckoned = memory_needed(SHAPES[model], layers, seq_len, recompute=recompute) / 2**30
            about = {"layers": layers, "reckoned_gib": reckoned, "gpu": torch.cuda.get_device_name()}
            yield add_rates(row | about, job)


def main(options: Options) -> int:
    """Measures, then prints one table of all rows in --results; returns the exit status."""
    if not torch.cuda.is_available():
        print("error: no CUDA device is visible, and one is what this script measures", file=sys.stderr)
        return 2
    if unknown := [name for name in (*options.models, *options.only) if name not in (*SHAPES, *CONTENDERS)]:
        print(f"error: {unknown[0]} is none of {', '.join((*SHAPES, *CONTENDERS))}", file=sys.stderr)
        return 2
    if missing := [name for name in options.only if not available(name)]:
        print(f"left out, not installed: {', '.join(missing)}", flush=True)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder, open(options.results, "a", encoding="utf-8") as file:
            for row in rows_of(options, model, Path(folder)):
                print(json.dumps(row), file=file, flush=True)
    print_table([json.loads(line) for line in options.results.read_text(encoding="utf-8").splitlines()])
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
