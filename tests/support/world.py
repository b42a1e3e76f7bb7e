"""A pool of processes that tests share: starting one that imports torch and megatron-core costs seconds.

`Pool.run(function, ranks, *args)` calls `function(*args)` on `ranks` processes joined in a fresh gloo world
and returns their results in rank order. Functions must be importable (module level).
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import queue
import sys
import tempfile
import time
import traceback
from pathlib import Path

import psutil
import torch.multiprocessing as multiprocessing

STAND_IN = Path(__file__).with_name("stand_in")


def _serve(number: int, requests, results) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    from torch import distributed

    from engine import host
    from engine.quiet import silence_libraries

    silence_libraries()
    host.enable()
    while (request := requests.get()) is not None:
        function, ranks, store_path, args = request
        os.environ.update(RANK=str(number), WORLD_SIZE=str(ranks), LOCAL_RANK=str(number))
        try:
            store = distributed.FileStore(store_path, ranks)
            distributed.init_process_group("gloo", store=store, rank=number, world_size=ranks)
            results.put((number, True, pickle.dumps(function(*args))))  # here, where an error is caught
        except BaseException:
            results.put((number, False, traceback.format_exc()))
        finally:
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
            if distributed.is_initialized():
                distributed.destroy_process_group()
            if te := sys.modules.get("transformer_engine.pytorch.fp8"):
                te.FP8GlobalStateManager.reset()  # the next world's ranks have had other models before
            gc.collect()  # models hold their groups in cycles, and each group holds threads and sockets


class Pool:
    """Lazily started processes; a failing rank fails the call with its traceback.

    With `stand_in` they find a package in Transformer Engine's place that computes on the host.
    """

    def __init__(self, timeout: float = 300, *, stand_in: bool = False):
        self._first_on_path = [str(STAND_IN)] if stand_in else []
        self._context = multiprocessing.get_context("spawn")
        self._workers: list = []
        self._results = self._context.Queue()
        self._timeout = timeout
        self._failed = False

    def _grow(self, ranks: int) -> None:
        while len(self._workers) < ranks:
            requests = self._context.Queue()
            arguments = (len(self._workers), requests, self._results)
            process = self._context.Process(target=_serve, args=arguments, daemon=False)
            path = sys.path[:]
            sys.path[:0] = self._first_on_path  # a spawned process begins with its parent's
            try:
                process.start()
            finally:
                sys.path[:] = path
            self._workers.append((process, requests))

    def run(self, function, ranks: int, *args) -> list:
        """Returns each rank's result; RuntimeError with the first traceback where a rank fails."""
        self._grow(ranks)
        with tempfile.TemporaryDirectory() as folder:
            for _, requests in self._workers[:ranks]:
                requests.put((function, ranks, os.path.join(folder, "store"), args))
            answers = {}
            while len(answers) < ranks:
                number, fine, value = self._next_answer(min({*range(ranks)} - answers.keys()))
                if not fine:
                    self._failed = True
                    self.close()
                    raise RuntimeError(f"rank {number} of {ranks} failed:\n{value}")
                answers[number] = pickle.loads(value)
        return [answers[number] for number in range(ranks)]

    def _next_answer(self, awaited: int) -> tuple[int, bool, object]:
        """(rank, whether it is fine, its pickled result or what went wrong), of `awaited` where none comes."""
        end = time.monotonic() + self._timeout
        while time.monotonic() < end:
            with contextlib.suppress(queue.Empty):
                return self._results.get(timeout=1)
            for number, (process, _) in enumerate(self._workers):
                if not process.is_alive():
                    return number, False, f"its process is gone, with exit code {process.exitcode}"
        return awaited, False, f"it was silent for {self._timeout} s"

    def close(self) -> None:
        """Ends every process and what it started (megatron-core's checkpoint writer keeps one of its own)."""
        for _, requests in self._workers:
            requests.put(None)
        for process, _ in self._workers:
            process.join(0 if self._failed else 20)
            if process.is_alive():
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()
            process.join()
        self._workers, self._failed = [], False
        self._results = self._context.Queue()
