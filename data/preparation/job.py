"""Rows of one source -> documents, and the reason for each row that becomes none."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.cutting import spans_within
from data.preparation.conversation import Conversation, RowError
from data.preparation.decontaminate import REASON, Questions
from data.preparation.encoder import ChatEncoder, Document
from data.preparation.formats import RowReader
from data.preparation.rows import JsonLines, Row, Table, Unreadable
from data.preparation.where import Where

# What reports count of documents -> the field of Document that holds it.
COUNTS = {
    "open_turns": "open_turns",
    "rewritten_turns": "rewritten",
    "straddling_tokens": "straddling",
    "untrained_turns": "untrained_turns",
    "stripped_turns": "stripped_turns",
    "masked_tool_outputs": "masked_tool_outputs",
}
HASHES = {"prompt": "prompt_hash", "conversation": "text_hash"}  # --dedup -> what Document has to be compared


class Chunk(NamedTuple):
    """A range of one file, as its `chunks` cut it."""

    file: int
    start: int
    stop: int


class SourceFile(NamedTuple):
    """A file and the number of the source that it belongs to."""

    source: int
    rows: JsonLines | Table


class Reading(NamedTuple):
    """How the rows of one source become conversations, and which of them do."""

    name: str
    reader: RowReader
    where: Where


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker process knows; workers inherit it when they are forked."""

    encoder: ChatEncoder
    sources: list[Reading]
    files: list[SourceFile]
    chunks: list[Chunk]
    parts: Path
    dtype: np.dtype
    strict: bool = False
    max_length: int | None = None
    dedup: str = "none"
    questions: Questions | None = None

    def part(self, number: int) -> Path:
        return self.parts / f"{number:06d}.npz"

    def source_of(self, number: int) -> int:
        """The source of a part."""
        return self.files[self.chunks[number].file].source


class Drop(NamedTuple):
    """A row that becomes no document."""

    place: int
    error: RowError
    row: Any


@dataclass
class Prepared:
    """What became of some rows."""

    rows: int = 0
    filtered: int = 0
    documents: list[Document] = field(default_factory=list)
    places: list[int] = field(default_factory=list)  # of the documents' rows
    kinds: list[str] = field(default_factory=list)  # of the documents
    drops: list[Drop] = field(default_factory=list)  # in the order of their rows
    rows_of_kind: Counter[str] = field(default_factory=Counter)
    overlaps: Counter[int] = field(default_factory=Counter)  # file of test questions -> rows
    unused: set[tuple[str, ...]] = field(default_factory=set)
    tokens: int = 0  # of all that was encoded
    dropped_tokens: int = 0  # of what was dropped after it


def prepare_rows(job: Job, source: Reading, rows: Iterable[Row]) -> Prepared:
    """Rows of one source -> documents, and the reason for each row that becomes none."""
    done = Prepared()
    places: list[tuple[int, Any]] = []
    conversations: list[Conversation] = []
    has_conditions = bool(source.where.expressions)
    for place, row in rows:
        done.rows += 1
        try:
            if isinstance(row, Unreadable):
                raise row.error
            if has_conditions and not source.where(row):
                done.filtered += 1
                continue
            conversation = source.reader(row)
            done.rows_of_kind[conversation.kind] += 1
            done.unused.add(conversation.unused)
            if job.questions is not None and (overlap := job.questions.find(conversation)) is not None:
                done.overlaps[overlap.file] += 1
                raise RowError(REASON, overlap.detail)
            conversations.append(conversation)
            places.append((place, row))
        except RowError as error:
            done.drops.append(Drop(place, error, row.text if isinstance(row, Unreadable) else row))
    encoded = job.encoder.encode(conversations)
    for (place, row), conversation, document in zip(places, conversations, encoded, strict=True):
        if isinstance(document, RowError):
            done.drops.append(Drop(place, document, row))
            continue
        pieces = [document]
        done.tokens += len(document.tokens)
        if job.max_length is not None and len(document.tokens) > job.max_length:
            if conversation.kind != "text":
                done.dropped_tokens += len(document.tokens)
                why = RowError("longer than --max-length", f"{len(document.tokens):,} tokens")
                done.drops.append(Drop(place, why, row))
                continue
            pieces = cut(document, job.max_length)
            done.tokens += len(pieces) - 1  # the tokens that two pieces have in common
        done.documents += pieces
        done.places += [place] * len(pieces)
        done.kinds += [conversation.kind] * len(pieces)
    done.drops.sort(key=lambda drop: drop.place)
    return done


def cut(document: Document, length: int) -> list[Document]:
    """A document in pieces of at most `length` tokens.

    Every piece but the first begins with the last token of the one before, unsupervised there, so that every token
    is predicted as in the whole. What is counted of the whole is counted of the first piece. Two pieces are duplicates
    where they are the same piece of documents that are.
    """
    pieces = []
    for number, start in enumerate(range(0, len(document.tokens) - 1, length - 1)):
        end = min(start + length, len(document.tokens))
        spans = spans_within(document.spans, start, end)
        changes: dict[str, Any] = {} if start == 0 else dict.fromkeys(COUNTS.values(), 0)
        for name in HASHES.values():
            changes[name] = _numbered(getattr(document, name), number)
        pieces.append(replace(document, tokens=document.tokens[start:end], spans=spans, **changes))
    return pieces


def _numbered(digest: bytes, number: int) -> bytes:
    """The hash of a piece; none where documents have none."""
    return digest and (int.from_bytes(digest) ^ number).to_bytes(len(digest))
