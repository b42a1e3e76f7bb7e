"""How long training stands still for a checkpoint: saved beside it and waited for, in one run of the 30 M model.

Beside the training it stands still twice: while its state is copied into the host's memory, and, once all is written,
while the first rank completes the directory.

python benchmarks/save_stall.py [--saves 20]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
import tyro

from benchmarks.common import lathe_trainer, make_equal_data, make_model


def main(saves: int = 20) -> int:
    """Takes turns: a save that is waited for, a save beside the training; prints medians, their ratio and memory."""
    from engine.checkpointing.saver import WRITING
    from engine.quiet import silence_libraries

    silence_libraries()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model, data = make_model(folder / "model", None), make_equal_data(folder / "data", 400)
        trainer = lathe_trainer(model, data, seq_len=512, batch=1, precision="fp32", lr=1e-4)
        trainer.prepared.run.model_files.mkdir(parents=True, exist_ok=True)
        (trainer.prepared.run.model_files / "config.json").write_bytes((model / "config.json").read_bytes())
        waited, beside, memory, steps = [], [], [], []
        for _ in range(saves):
            steps.append(_seconds(trainer.train_step))
            waited.append(_seconds(lambda: (trainer.start_save(), trainer.finish_save())))
            trainer.train_step()
            copying = _seconds(trainer.start_save)
            while trainer.saver.progress() == WRITING:
                trainer.train_step()
            beside.append(copying + _seconds(trainer.finish_save))
            memory.append(psutil.Process().memory_info().rss / 2**20)
    one, other = statistics.median(beside), statistics.median(waited)
    print(f"a step {statistics.median(steps):.3f} s; a save waited for {other:.3f} s, beside the training {one:.3f} s")
    print(
        f"the stall is {one / other:.1%} of the save; memory after saves 2 and {saves}: "
        f"{memory[1]:,.0f} and {memory[-1]:,.0f} MiB"
    )
    return 0


def _seconds(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
