r"""Whether an answer is right: math-verify in a process that can be killed.

math-verify limits its time with an alarm signal, which works only in a main thread and cannot interrupt one
long operation inside C (`9^{9^{9^9}}`). Each grader is therefore a process of its own, asked one thing at a
time; where it does not answer in time it is killed, the verdict is "wrong", and a new one takes its place.
"""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from examples.evaluation.extraction import last_boxed, tidy

# Seconds for one parse or comparison inside math-verify, and for one whole request including both.
ALARM_SECONDS = 5
REQUEST_SECONDS = 20.0
# A fresh process imports sympy first, on a busy machine for a while.
START_SECONDS = 180.0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One graded generation: the answer found (None: none), whether it is right, whether time ran out."""

    answer: str | None
    correct: bool
    timed_out: bool = False


def _parse(text: str) -> list[Any]:
    """math-verify's expressions for a text; boxes go first. The last element is the text it found."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return parse(text, extraction_config=targets, parsing_timeout=ALARM_SECONDS)


def _equal(gold: str, answer: str) -> bool:
    """Whether two bare answers are equal: as text, or as mathematics."""
    from math_verify import verify

    if tidy(gold) == tidy(answer):
        return True
    golds, answers = _parse(f"\\boxed{{{tidy(gold)}}}"), _parse(f"\\boxed{{{tidy(answer)}}}")
    return bool(golds and answers) and verify(golds, answers, timeout_seconds=ALARM_SECONDS)


def _grade(gold: str, text: str) -> tuple[str | None, bool]:
    r"""The answer in a generation, its last `\boxed{}` or what math-verify finds, and whether it is right."""
    from math_verify import verify

    boxed = last_boxed(text)
    if boxed is not None:
        return boxed, _equal(gold, boxed)
    found = _parse(text)
    if not found:
        return None, False
    answer = str(found[-1])
    if tidy(gold) == tidy(answer):
        return answer, True
    golds = _parse(f"\\boxed{{{tidy(gold)}}}")
    return answer, bool(golds) and verify(golds, found, timeout_seconds=ALARM_SECONDS)


def _serve(requests: Connection) -> None:
    """The grader process: answers ("grade", gold, text) and ("equal", gold, answer) until it is closed."""
    import logging

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # Imports sympy and builds the parser's tables before the first request, whose time is limited.
    _grade("0.5", r"so $\frac{1}{2}$")
    work = {"grade": _grade, "equal": _equal}
    requests.send("ready")
    while True:
        try:
            kind, gold, text = requests.recv()
        except EOFError:
            return
        requests.send(work[kind](gold, text))


class Grader:
    """One grader process, started when first asked and again after it had to be killed."""

    def __init__(self, request_seconds: float = REQUEST_SECONDS) -> None:
        self.request_seconds = request_seconds
        self.process: Any = None
        self.connection: Connection | None = None

    def grade(self, gold: str, text: str) -> Verdict:
        """The verdict on one generation."""
        reply = self._ask("grade", gold, text)
        if reply is None:
            return Verdict(answer=last_boxed(text), correct=False, timed_out=True)
        return Verdict(answer=reply[0], correct=reply[1])

    def equal(self, first: str, second: str) -> bool:
        """Whether two answers mean the same; math-verify's comparison has a direction, so both are tried."""
        return tidy(first) == tidy(second) or any(
            bool(self._ask("equal", *pair)) for pair in ((first, second), (second, first))
        )

    def _ask(self, kind: str, gold: str, text: str) -> Any:
        """The reply; None where the process took too long or died, and the next request starts a new one."""
        if self.connection is None:
            self._start()
        assert self.connection is not None
        try:
            self.connection.send((kind, gold, text))
            if self.connection.poll(self.request_seconds):
                return self.connection.recv()
        except (EOFError, OSError):
            pass
        self.close()
        return None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        if not self.connection.poll(START_SECONDS) or self.connection.recv() != "ready":
            raise RuntimeError(f"the grading process did not start within {START_SECONDS:.0f} s")

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            assert self.connection is not None
            self.connection.close()
        self.process = self.connection = None


@dataclass(frozen=True, kw_only=True)
class GradedQuestion:
    """All samples of one question: their verdicts, and whether the majority of their answers is right."""

    verdicts: list[Verdict]
    majority: str | None
    majority_correct: bool


def majority_vote(verdicts: Sequence[Verdict], grader: Grader) -> tuple[str | None, bool]:
    """The answer most samples agree on (by meaning, not spelling) and whether it is right.

    Samples without an answer do not vote. Of answers with equally many votes, that of the earliest sample
    wins. No vote at all gives (None, False).
    """
    groups: list[tuple[Verdict, int]] = []
    for verdict in verdicts:
        if verdict.answer is None:
            continue
        for place, (first, votes) in enumerate(groups):
            assert first.answer is not None
            if grader.equal(first.answer, verdict.answer):
                groups[place] = (first, votes + 1)
                break
        else:
            groups.append((verdict, 1))
    if not groups:
        return None, False
    winner, _ = max(groups, key=lambda group: group[1])
    return winner.answer, winner.correct


def grade_questions(
    golds: Sequence[str], generations: Sequence[Sequence[str]], num_workers: int = 1
) -> list[GradedQuestion]:
    """Grade every question's generations, `num_workers` questions at a time, each in a process of its own."""
    graders = [Grader() for _ in range(min(num_workers, len(golds)))]
    free: SimpleQueue[Grader] = SimpleQueue()
    for grader in graders:
        free.put(grader)

    def grade(gold: str, texts: Sequence[str]) -> GradedQuestion:
        grader = free.get()
        try:
            verdicts = [grader.grade(gold, text) for text in texts]
            majority, correct = majority_vote(verdicts, grader)
        finally:
            free.put(grader)
        return GradedQuestion(verdicts=verdicts, majority=majority, majority_correct=correct)

    try:
        with ThreadPoolExecutor(len(graders)) as threads:
            return list(threads.map(grade, golds, generations))
    finally:
        for grader in graders:
            grader.close()
