"""Rows that repeat a test question: their prompt shares a run of words with a question of some files."""

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from data.preparation.conversation import Conversation
from data.preparation.messages import MESSAGES, ROLES
from data.preparation.prompt import QUESTIONS
from data.preparation.rows import JsonLines, Table, Unreadable

REASON = "overlaps a test question"
SHORTEST = 5  # words; a question with fewer is too common to be looked for
_COLUMNS = (*QUESTIONS, "prompt", "instruction")
_WORD = re.compile(r"\w+")
Words = tuple[str, ...]


class Place(NamedTuple):
    """Where a test question stands."""

    file: int
    line: int


class Overlap(NamedTuple):
    """The number of the file whose question a prompt repeats, and a sentence about it."""

    file: int
    detail: str


class Questions:
    """Test questions as runs of words: all runs of `ngram` words, and a shorter question whole."""

    def __init__(self, ngram: int):
        self.ngram = ngram
        self.files: list[str] = []
        self.questions: list[int] = []  # in each file
        self.too_short: list[int] = []  # those of them with fewer than SHORTEST words
        self._runs: dict[Words, Place] = {}
        self._short: dict[Words, list[tuple[Words, Place]]] = {}  # by their first words

    def add_file(self, name: str, readers: Iterable[JsonLines | Table]) -> None:
        """Adds the questions of a source of rows. Raises ValueError where one of its rows has none."""
        self.files.append(name)
        self.questions.append(0)
        self.too_short.append(0)
        for reader in readers:
            line = 1
            for start, stop in reader.chunks(None)[0]:
                for number, row in reader.read(start, stop):
                    question = None if isinstance(row, Unreadable) else _question(row)
                    if question is None:
                        names = ", ".join((*MESSAGES, *_COLUMNS))
                        why = row.error if isinstance(row, Unreadable) else f"its column must be one of {names}"
                        raise ValueError(f"--decontaminate {reader.name}:{line + number}: no question found ({why})")
                    self._add(_words(question), Place(len(self.files) - 1, line + number))
                line += reader.lines(start, stop)

    def _add(self, words: list[str], place: Place) -> None:
        self.questions[place.file] += 1
        if len(words) >= self.ngram:
            for run in _runs(words, self.ngram):
                self._runs.setdefault(run, place)
        elif len(words) >= SHORTEST:
            self._short.setdefault(tuple(words[:SHORTEST]), []).append((tuple(words), place))
        else:
            self.too_short[place.file] += 1

    def find(self, conversation: Conversation) -> Overlap | None:
        """The first overlap of a user's turn, or of a row of text, with a question."""
        texts = [conversation.text] if conversation.text is not None else []
        texts += [message["content"] for message in conversation.messages if message["role"] == "user"]
        for text in texts:
            words = _words(text)
            # the whole of a text is compared in one call: nearly all have nothing in common with any question
            if not self._runs.keys().isdisjoint(_runs(words, self.ngram)):
                run = next(run for run in _runs(words, self.ngram) if run in self._runs)
                return self._overlap(run, self._runs[run])
            if not self._short.keys().isdisjoint(_runs(words, SHORTEST)):
                for start, head in enumerate(_runs(words, SHORTEST)):
                    for question, place in self._short.get(head, ()):
                        if tuple(words[start : start + len(question)]) == question:
                            return self._overlap(question, place)
        return None

    def _overlap(self, words: Words, place: Place) -> Overlap:
        return Overlap(place.file, f'{self.files[place.file]}:{place.line}, "{" ".join(words)}"')


def _question(row: Any) -> str | None:
    """The question of a test row: its first user's turn, or its first column with a question's name."""
    if not isinstance(row, dict):
        return None
    turns = [turn for name in (*MESSAGES, "prompt") if isinstance(row.get(name), list) for turn in row[name]]
    texts = [turn.get("content", turn.get("value")) for turn in turns if isinstance(turn, dict) and _is_user(turn)]
    return next((text for text in (*texts, *map(row.get, _COLUMNS)) if isinstance(text, str)), None)


def _is_user(turn: dict[str, Any]) -> bool:
    return ROLES.get(str(turn.get("role", turn.get("from"))).strip().lower()) == "user"


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _runs(words: list[str], length: int) -> Iterator[Words]:
    return zip(*(words[start:] for start in range(length)), strict=False)
