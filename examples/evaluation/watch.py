"""`--watch RUN`: a run's exports are graded as they appear, by a job of its own, and the best step is named."""

import fcntl
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import yaml

from engine.run_folder import RunFolder
from engine.run_status import DONE, FAILED, REFUSED, RUNNING, STOPPED, read_status
from engine.signals import StopRequest, reason
from examples.evaluation.apart import HELD, answer_apart, held_still
from examples.evaluation.options import EvaluationError, EvaluationOptions, folder_name
from examples.evaluation.questions import Question, dataset_name, load_questions
from examples.evaluation.run import ask, made_before
from examples.evaluation.summary import summary_text, write_summary
from examples.made_of import differences

POLL = 15.0  # seconds between looks at RUN
# Seconds without a sign of life after which a run that failed or was killed, and a model that is to come after its end,
# is not waited for any more.
PATIENCE = 600.0
_LOOK = 0.2  # seconds after which a signal is seen


def watch(options: EvaluationOptions) -> int:
    """Grades what `--watch` and `--also` name; returns the exit status.

    It is 0 where all is graded or a signal asked to stop, and 1 where a model could not be graded or the run did not
    come to its end or was begun anew. Raises `EvaluationError` for a user's mistake.
    """
    assert options.watch is not None
    run, name = RunFolder(options.watch), options.name or folder_name(dataset_name(options.data))
    stop = StopRequest()
    with stop.listening():
        questions = load_questions(options)
        _check_exports(run, options)
        run.evaluation.mkdir(exist_ok=True)
        with _alone(run, name) as lock:
            for held in run.evaluation.glob(f"*/{name}/{HELD}"):  # of a process that was killed
                shutil.rmtree(held, ignore_errors=True)
            watched = Watch(run, name, options, questions, stop, lock)
            why = watched.work()
            bad = bool(watched.failed) or watched.gave_up
            watched.note(STOPPED if stop.signal else FAILED if bad else DONE)
    print(f"{summary_text(watched.summary)}\n{why}", flush=True)
    return int(bad and not stop.signal)


class Watch:
    """What is known of a run's models: which are graded, which cannot be, and since when nothing has moved."""

    def __init__(
        self,
        run: RunFolder,
        name: str,
        options: EvaluationOptions,
        questions: list[Question],
        stop: StopRequest,
        lock: TextIO,
    ):
        self.run, self.name, self.options, self.questions, self.stop = run, name, options, questions, stop
        self.lock = lock
        self.known: dict[str, Path] = {}  # by what results call them: all models that were ever there
        self.seen: dict[str, tuple[int, int] | None] = {}  # by model: its folder as it was when it was graded
        self.failed: dict[str, str] = {}
        self.gave_up = False
        self.summary: dict[str, Any] = {"results": [], "watched": {}, "best": {}}
        self._signs: tuple[Any, ...] = ()
        self._since = self._looked = time.monotonic()

    def work(self) -> str:
        """Grades until there is nothing to come, or a signal asks to stop; returns why it ended."""
        self.note(RUNNING)
        while True:
            over = self.why_over()  # before the look at what is there: a run is done after its last export
            self.look()
            for model, folder in list(self.known.items()):
                if self.is_stopped():
                    break
                if model not in self.seen or _identity(folder) not in (None, self.seen[model]):
                    self.grade(model, folder)
            if self.stop.signal:
                return f"{reason(self.stop.number())}: stopped; the same command goes on"
            if self.is_anew():
                self.gave_up = True
                return f"{self.run.path} was begun anew, and its results were set aside; the same command goes on"
            if over:
                return over
            self._sleep()

    def look(self) -> None:
        """Takes down what is there: what is removed before its turn is told, and not forgotten."""
        self.known |= self.models()
        self._looked = time.monotonic()

    def is_stopped(self) -> bool:
        """Whether a signal or the run asks to stop; while a model is graded, this also looks at RUN."""
        if time.monotonic() - self._looked >= POLL:
            self.look()
        return bool(self.stop.signal) or self.is_anew()

    def is_anew(self) -> bool:
        """Whether a run that was begun anew has set this one's results aside: then nothing here is of it any more."""
        try:
            return not os.path.samestat(os.fstat(self.lock.fileno()), os.stat(self.lock.name))
        except OSError:
            return True

    def models(self) -> dict[str, Path]:
        """The models that are there whole, by what results call them: exports in order of their steps, then others."""
        exports = sorted(self.run.exports.glob("step_*"), key=lambda path: (len(path.name), path.name))
        steps = {path.name: path for path in exports if path.name.removeprefix("step_").isdecimal()}
        return steps | {path.name: path for path in self.options.also if (path / "config.json").is_file()}

    def grade(self, model: str, folder: Path) -> None:
        """Grades one model, unless results of the same making are there; notes what became of it."""
        output, identity = self.run.evaluation / model / self.name, _identity(folder)
        try:
            with held_still(folder, output / HELD) as place:
                options = replace(self.options, model=str(place), output=output, watch=None, once=False, also=())
                asked = ask(options, self.questions, called=str(folder))
                before = made_before(output)
                if before is not None and not differences(before, asked.made_of):
                    print(f"{model}: graded before, by the same model, data and prompts", flush=True)
                elif not answer_apart(asked, self.is_stopped):
                    return
        except Exception as error:  # whatever the libraries make of a model's files
            if self.is_anew():
                return
            if folder.exists():
                self.failed[model] = str(error).replace(str(output / HELD), str(folder))
            else:
                self.failed[model] = f"{folder} was removed before it was graded; keep more (--checkpoint.keep)"
            print(f"error: {model}: {self.failed[model]}", file=sys.stderr, flush=True)
        else:
            self.failed.pop(model, None)
        self.seen[model] = identity
        self.note(RUNNING)

    def note(self, state: str) -> None:
        """Writes the summary, and the run's report with it."""
        try:
            if not self.is_anew():
                watched = {self.name: {"state": state, "failed": self.failed}}
                self.summary = write_summary(self.run, watched)
        except FileNotFoundError:
            if not self.is_anew():
                raise

    def why_over(self) -> str | None:
        """Why nothing more is to come; None while something may."""
        missing = [path for path in self.options.also if not (path / "config.json").is_file()]
        if self.options.once:
            self._miss(missing, "it is not there")
            return "all that is there is graded"
        status = read_status(self.run)
        state, before = status.get("state"), (status.get("run") or {}).get("state")
        signs = (state, status.get("time"), _identity(self.run.lock), len(missing))
        if signs != self._signs:
            self._signs, self._since = signs, time.monotonic()
        silent = time.monotonic() - self._since >= PATIENCE
        if DONE in (state, before):
            if missing and not silent:
                return None
            self._miss(missing, "it did not come after the end of the run")
            return "the run is done, and all is graded"
        if silent and state in (RUNNING, FAILED, REFUSED):
            self.gave_up = True
            how = status.get("reason") or "killed, for its status says running"
            return f"{self.run.path} is not done and gives no sign of life: {how}; the same command goes on"
        return None

    def _miss(self, models: list[Path], why: str) -> None:
        self.failed |= {path.name: f"{path}: {why}" for path in models}

    def _sleep(self) -> None:
        until = time.monotonic() + POLL
        while time.monotonic() < until and not self.stop.signal:
            time.sleep(_LOOK)


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file or a folder from a later one of its name; None where it is gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _check_exports(run: RunFolder, options: EvaluationOptions) -> None:
    """Refuses a run that will never export anything."""
    if options.also or any(run.exports.glob("step_*")):
        return
    if options.once:
        raise EvaluationError(
            f"--watch {run.path}: {run.exports} holds no export yet; leave out --once to wait for one"
        )
    try:
        settings = yaml.safe_load(run.config.read_text(encoding="utf-8"))["checkpoint"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return  # a run that has not begun
    if not settings.get("export_hf"):
        raise EvaluationError(
            f"--watch {run.path} has nothing to grade: the run exports no checkpoint; train with "
            "--checkpoint.export-hf, or name models with --also"
        )


@contextmanager
def _alone(run: RunFolder, name: str) -> Iterator[TextIO]:
    """One process at a time grades under a name; the kernel drops this lock when the process is gone.

    Yields the locked file.
    """
    with (run.evaluation / f".{name}.lock").open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise EvaluationError(
                f"--watch {run.path}: another process grades {name} there; wait for it, or give another --name"
            ) from None
        except OSError:  # this file system has no locks
            pass
        yield file
