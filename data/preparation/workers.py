"""Chunks of rows -> part files, over processes.

Every chunk becomes one part, written and then renamed, so that a killed run continues with the parts that are
missing. How many processes wrote them, and in which order, cannot be seen in the result.
"""

import gc
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from data.preparation.job import Job, prepare_rows
from data.preparation.parts import write_part

_LINE_SECONDS = 30.0  # between two lines about the progress where there is no terminal
_job: Job | None = None  # set in the parent just before workers are forked


def make_parts(job: Job, num_workers: int, console: Console) -> None:
    """Makes the parts that are missing with `num_workers` processes (0: one for each core).

    Raises ValueError for the first bad row if the job is strict, RuntimeError where a worker was killed.
    """
    global _job
    missing = [number for number in range(len(job.chunks)) if not job.part(number).exists()]
    if not missing:
        return
    workers = min(num_workers or len(os.sched_getaffinity(0)), len(missing))
    _job = job
    try:
        # forked, so that tokenizer, template and tables are neither sent nor loaded once more
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(workers, context, _start_worker, (os.getpid(),)) as pool:
            futures = [pool.submit(_work, number) for number in missing]
            try:
                _watch(futures, len(job.chunks), console)
            finally:
                pool.shutdown(cancel_futures=True)  # chunks that were begun are finished
        for future in futures:  # in order, so that it is the first bad row that is named
            if not future.cancelled():
                future.result()
    except BrokenProcessPool as error:
        raise RuntimeError("a worker was killed (out of memory?): run again, it will continue") from error
    finally:
        _job = None


def _watch(futures: list[Future[int]], chunks: int, console: Console) -> None:
    """Shows how far the chunks have come until all are done or one has failed."""
    start = said = time.monotonic()
    before, rows = chunks - len(futures), 0
    columns = (
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rows]}"),
        TimeElapsedColumn(),
    )
    waiting = set(futures)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("preparing", total=chunks, completed=before, rows="")
        while waiting:
            done, waiting = wait(waiting, _LINE_SECONDS, FIRST_COMPLETED)
            if any(future.exception() for future in done):
                return
            rows += sum(future.result() for future in done)
            now = time.monotonic()
            speed = f"{rows:,} rows, {rows / (now - start):,.0f} rows/s"
            progress.update(bar, advance=len(done), rows=speed)
            if not console.is_terminal and now - said > _LINE_SECONDS and rows:
                finished = len(futures) - len(waiting)
                left = (now - start) / finished * len(waiting)
                console.print(
                    f"preparing: {before + finished:,} of {chunks:,} chunks, {speed}, about {left:,.0f} s left"
                )
                said = now


def _start_worker(parent: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    gc.freeze()  # what the parent made stays in pages that are shared with it
    gc.disable()  # rows hold no circles, but for errors with their tracebacks: `_work` collects them
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and lets chunks that were begun finish

    def watch() -> None:  # a worker whose parent was killed would wait for work for ever
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(number: int) -> int:
    rows = _make_part(number)
    gc.collect()
    return rows


def _make_part(number: int) -> int:
    """Writes the part of one chunk; returns how many rows it has."""
    assert _job is not None
    job, chunk = _job, _job.chunks[number]
    rows = job.files[chunk.file].rows
    done = prepare_rows(job, job.sources[job.source_of(number)], rows.read(chunk.start, chunk.stop))
    if job.strict and done.drops:
        place, reason, _ = done.drops[0]
        raise ValueError(f"{rows.name}:{rows.lines(0, chunk.start) + place + 1}: {reason}")
    write_part(job, number, done, rows.lines(chunk.start, chunk.stop))
    return done.rows
