"""Conversion both ways beside `cp -r`, averaging beside reading; and memory."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
import tyro
from common import REPOSITORY, load

from checkpoint_tools import average_steps, hf_to_mcore, mcore_to_hf
from engine.checkpointing.hf_export import dtype_name
from engine.checkpointing.workers import worker_count
from engine.run_folder import RunFolder
from models.conversion.hf_writer import HFWriter
from models.hf_config import describe

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
SHARD_BYTES = 1e9
BLOCK = 2**20  # bytes that are read at once, and numbers that are drawn at once


@dataclass(frozen=True)
class Measured:
    """One thing's seconds in every round, by the clock and of processors."""

    name: str
    gigabytes: float
    seconds: list[float]
    processor: list[float]

    @property
    def speed(self) -> float:
        return self.gigabytes / median(self.seconds)


def main(layers: int = 24, rounds: int = 5, num_workers: int | None = None, folder: Path | None = None) -> None:
    """Print speeds (of the median round, in turn within each round) and the highest memory of each script.

    Args:
        layers: of the synthetic model with hidden size 2048; 24 make 4 GB in bf16.
        rounds: of every contender.
        num_workers: as the scripts take it.
        folder: where the files go; five times the model's size must be free.
    """
    with TemporaryDirectory(dir=folder, prefix="conversion-speed-") as name:
        place = Path(name)
        write_model(place / "hf", layers, seed=1)
        measure_conversion(place, place / "checkpoint", rounds, num_workers)
        shutil.rmtree(place / "hf")
        shutil.rmtree(place / "checkpoint")
        # Weights as a converted model has them, then as a run's checkpoints have them; about as many bytes of each.
        for dtype, steps, kept in ((torch.bfloat16, 2, layers), (torch.float32, 2, layers // 2), (torch.float32, 6, 1)):
            measure_average(place, dtype, steps, kept, rounds, num_workers)


def write_model(folder: Path, layers: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """A model with random weights in several files."""
    folder.mkdir()
    config = {**CONFIG, "num_hidden_layers": layers, "dtype": dtype_name(dtype)}
    (folder / "config.json").write_text(json.dumps(config))
    plan = {n: (shape, dtype) for rule in describe(folder).rules for n, shape in rule.files}
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(64 * BLOCK, generator=generator).to(dtype)
    with HFWriter(folder, plan, SHARD_BYTES) as writer:
        for name, (shape, _) in plan.items():
            width = shape[1] if len(shape) > 1 else 1
            step = len(noise) // width // 2
            for start in range(0, shape[0], step):
                rows = min(step, shape[0] - start)
                first = int(torch.randint(len(noise) // 2, (), generator=generator))
                writer.write(name, noise[first : first + rows * width].view(rows, *shape[1:]), start)


def measure_conversion(place: Path, checkpoint: Path, rounds: int, num_workers: int | None) -> None:
    hf, out = place / "hf", place / "out"
    hf_to_mcore.main(hf, checkpoint)
    ways = {
        "hf_to_mcore": (hf, lambda: hf_to_mcore.main(hf, out, num_workers)),
        "mcore_to_hf": (checkpoint, lambda: mcore_to_hf.main(checkpoint, out, num_workers=num_workers)),
    }
    for name, (source, convert) in ways.items():
        copy = ["cp", "-r", str(source), str(out)]
        contenders: dict[str, Callable[[], object]] = {
            name: convert,
            "cp -r": lambda copy=copy: subprocess.run(copy, check=True),
            "cp -r, then sync": lambda copy=copy: subprocess.run(copy, check=True) and sync_files(out),
        }
        report(in_turn(contenders, source, out, rounds))
    flag = [] if num_workers is None else ["--num-workers", str(num_workers)]
    show_memory("hf_to_mcore", ["--hf", hf, "--output", out, *flag], out)
    show_memory("mcore_to_hf", ["--checkpoint", checkpoint, "--output", out, *flag], out)


def measure_average(
    place: Path, dtype: torch.dtype, steps: int, layers: int, rounds: int, num_workers: int | None
) -> None:
    """Averages checkpoints whose weights are in `dtype`; the result is in bf16, as an export wants it."""
    run, out = place / "run", place / "out"
    for step in range(1, steps + 1):
        write_model(place / "hf", layers, seed=step, dtype=dtype)
        hf_to_mcore.main(place / "hf", RunFolder(run).checkpoint(step))
        shutil.rmtree(place / "hf")
    wanted = ",".join(map(str, range(1, steps + 1)))
    contenders: dict[str, Callable[[], object]] = {
        "average_steps": lambda: average_steps.main(run, wanted, out, dtype="bf16", num_workers=num_workers),
        "reading its inputs": lambda: read_all(run),
        "cp -r of its inputs": lambda: subprocess.run(["cp", "-r", str(run), str(out)], check=True),
    }
    report(in_turn(contenders, run, out, rounds))
    flag = [] if num_workers is None else ["--num-workers", str(num_workers)]
    show_memory("average_steps", ["--run", run, "--steps", wanted, "--output", out, "--dtype", "bf16", *flag], out)
    shutil.rmtree(run)


def in_turn(contenders: dict[str, Callable[[], object]], source: Path, out: Path, rounds: int) -> list[Measured]:
    """Every contender once a round, each right after an untimed copy that was removed again.

    So the source is in the page cache, and the pages to write to were just in use: those that a virtual machine
    must ask its host for come ten times more slowly, to whoever happens to be the first to need them.
    """
    size = sum(file.stat().st_size for file in source.rglob("*") if file.is_file()) / 1e9
    measured = [Measured(name, size, [], []) for name in contenders]
    for _ in range(rounds):
        for one, function in zip(measured, contenders.values(), strict=True):
            subprocess.run(["cp", "-r", str(source), str(out)], check=True)
            shutil.rmtree(out)
            start, processor = time.perf_counter(), sum(os.times()[:4])
            function()
            one.seconds.append(time.perf_counter() - start)
            one.processor.append(sum(os.times()[:4]) - processor)
            shutil.rmtree(out, ignore_errors=True)
    return measured


def read_all(folder: Path) -> None:
    buffer = bytearray(BLOCK)
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass


def sync_files(folder: Path) -> None:
    subprocess.run(["sync", *(str(file) for file in folder.rglob("*") if file.is_file())], check=True)


def report(measured: list[Measured]) -> None:
    ours = measured[0]
    for one in measured:
        times = " ".join(f"{second:.2f}" for second in one.seconds)
        busy = median(one.processor)
        ratio = "" if one is ours else f"{ours.speed / one.speed:.2f} of it, CPU {busy / median(ours.processor):.2f}"
        print(f"{one.name:<20} {one.speed:6.2f} GB/s  {ratio:<22} seconds: {times}; CPU {busy:.1f}", flush=True)


def show_memory(script: str, arguments: list, out: Path) -> None:
    """Run a script as a user does and sample the memory that its processes hold, without the page cache."""
    command = [sys.executable, str(REPOSITORY / "checkpoint_tools" / f"{script}.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    start, most, processes = time.perf_counter(), 0, 0
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            family = [process.pid, *children(process.pid)]
            most, processes = max(most, sum(map(anonymous_bytes, family))), max(processes, len(family))
            time.sleep(0.01)
        if process.returncode:
            raise RuntimeError(f"{script} failed with status {process.returncode}")
    seconds = time.perf_counter() - start
    print(f"{script}: at most {most / 1e6:.0f} MB in {processes} processes, {seconds:.1f} s with start-up\n")
    shutil.rmtree(out)


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def anonymous_bytes(pid: int) -> int:
    """A process's anonymous memory, where a page that several processes share counts for each in part."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon:"))


if __name__ == "__main__":
    print(f"load {load()}, {worker_count(None)} processors")
    tyro.cli(main)
