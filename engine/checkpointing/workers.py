"""One function run in several forked processes: shares of the work, byte counts for a bar, and clean ends."""

import gc
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn, TypeVar

MOST_WORKERS = 8  # by default; more do not help where all of them wait for one disk

Advance = Callable[[int], None]  # takes the number of bytes that were done
Bar = Callable[[], AbstractContextManager[Advance]]  # opens a progress bar
Share = TypeVar("Share")
Result = TypeVar("Result")


def no_bar() -> AbstractContextManager[Advance]:
    """A progress bar that shows nothing."""
    return nullcontext(lambda count: None)


def worker_count(wanted: int | None) -> int:
    """`--num-workers`, by default one for each processor and at most `MOST_WORKERS`; ValueError below one."""
    if wanted is not None and wanted < 1:
        raise ValueError(f"--num-workers {wanted}: give at least 1")
    return wanted or min(len(os.sched_getaffinity(0)), MOST_WORKERS)


def share_of(sizes: Sequence[int], rank: int, ranks: int) -> range:
    """The items that fall to `rank`, neighbours of about equal sums; each item falls to exactly one rank."""
    total = max(1, sum(sizes))
    middle, owners = 0.0, []
    for size in sizes:
        owners.append(min(ranks - 1, int((middle + size / 2) * ranks / total)))
        middle += size
    mine = [number for number, owner in enumerate(owners) if owner == rank]
    return range(mine[0], mine[-1] + 1) if mine else range(0)


def run_workers(
    function: Callable[[Share, Advance], Result], shares: Sequence[Share], bar: Bar = no_bar
) -> list[Result]:
    """Return `function(share, advance)` for every share, each in a process of its own; one share needs none.

    Processes are forked, so `function` may be a closure and what it holds is not copied. The first error is
    raised as it was, and a ChildProcessError where a process ended without a word; the others are killed
    then, as they are when this process is interrupted.
    """
    if len(shares) == 1:
        with bar() as advance:
            return [function(shares[0], advance)]
    workers: list[BaseProcess] = []
    connections: list[Connection] = []
    gc.freeze()  # else the children's collectors would touch, and so copy, every page of this process
    try:
        for share in shares:
            _start(function, share, workers, connections)
        # After the fork: a bar draws from a thread, and a thread may hold locks that no child could free.
        with bar() as advance:
            return _collect(workers, connections, advance)
    finally:
        gc.unfreeze()
        for worker in workers:
            worker.kill()
            worker.join()
        for connection in connections:
            connection.close()


def _start(function: Callable, share: Any, workers: list[BaseProcess], connections: list[Connection]) -> None:
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    connections.append(receiver)
    worker = context.Process(target=_work, args=(function, share, sender, connections), daemon=True)
    worker.start()
    sender.close()  # the child's copy is the only one left, so its death shows as the end of the pipe
    workers.append(worker)


def _work(function: Callable, share: Any, sender: Connection, inherited: Sequence[Connection]) -> None:
    """A child's life: sends byte counts, and last (result, None) or (None, error)."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its children
    import torch

    for connection in inherited:
        connection.close()  # with no reader but the parent, its death breaks the pipe and ends this process
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    answer: tuple[Any, Exception | None]
    try:
        answer = (function(share, sender.send), None)
    except BrokenPipeError:
        return
    except Exception as error:
        answer = (None, _portable(error))
    sender.send(answer)


def _portable(error: Exception) -> Exception:
    """The error, fit to be sent; one that is no user's mistake carries the text of its traceback along."""
    if not isinstance(error, ValueError | OSError):
        error.add_note("in a worker process:\n" + traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error


def _collect(workers: Sequence[BaseProcess], connections: Sequence[Connection], advance: Advance) -> list:
    results: dict[Any, Any] = {}
    waiting = dict(zip(connections, workers, strict=True))
    while waiting:
        for connection in wait(list(waiting)):
            assert isinstance(connection, Connection)
            try:
                message = connection.recv()
            except EOFError:
                _report_death(waiting[connection])
            if isinstance(message, int):
                advance(message)
                continue
            results[connection], error = message
            if error is not None:
                raise error
            del waiting[connection]
    return [results[connection] for connection in connections]


def _report_death(worker: BaseProcess) -> NoReturn:
    worker.join()
    code = worker.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    raise ChildProcessError(f"a worker process {how} before its work was done; is there enough memory?")
