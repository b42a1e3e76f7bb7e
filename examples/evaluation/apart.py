"""One model graded in processes of its own: what it breaks or leaves in memory ends with them."""

import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from examples.evaluation.options import EvaluationError
from examples.evaluation.run import Asked, answer

HELD = "model.tmp"  # beside results: the files of a model while it is graded
_LOOK = 0.2  # seconds between looks at a process
_PAUSE = 1.0  # seconds after its end: a scheduler signals it and us, and it may die of that before we hear it


@contextmanager
def held_still(export: Path, held: Path) -> Iterator[Path]:
    """An export by links to its files in `held`, so that it can be graded to its end when retention removes it.

    Where the file system has no links it is the export itself.
    """
    try:
        shutil.copytree(export, held, copy_function=os.link)
        place = held
    except OSError:
        place = export
    try:
        yield place
    finally:
        shutil.rmtree(held, ignore_errors=True)


def answer_apart(asked: Asked, is_stopped: Callable[[], bool]) -> bool:
    """Calls `answer` in a process of its own; False where it was ended because `is_stopped` said so.

    Raises `EvaluationError` where the model cannot be graded: its own sentence, or how the process ended.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(asked, theirs))
    process.start()
    theirs.close()
    try:
        while process.is_alive():
            if is_stopped():
                return False
            process.join(_LOOK)
        if process.exitcode:
            time.sleep(_PAUSE)
            if is_stopped():
                return False
            raise EvaluationError(_last_words(ours) or _end_of(process))
        return True
    finally:
        _end(process)
        ours.close()


def _answer(asked: Asked, words: Connection) -> None:
    """The process: a leader of all that it starts, so that they can be ended together."""
    os.setsid()
    try:
        answer(asked)
    except EvaluationError as error:
        words.send(str(error))
        sys.exit(1)
    except Exception as error:
        traceback.print_exc()
        words.send(f"{type(error).__name__}: {error}")
        sys.exit(1)


def _last_words(words: Connection) -> str:
    try:
        return str(words.recv()) if words.poll() else ""
    except EOFError:
        return ""


def _end_of(process: BaseProcess) -> str:
    code = process.exitcode or 0
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
    return f"its process ended {how} (its own message stands above; without one, memory ran out)"


def _end(process: BaseProcess) -> None:
    """Ends the process, if it runs, and all that it has started."""
    assert process.pid is not None
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
