"""`--preview`: some documents as they would be trained on, and why rows would be dropped. Nothing is written."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from data.preparation.dropped import printable
from data.preparation.encoder import Document
from data.preparation.job import Job, Prepared, prepare_rows
from data.preparation.samples import print_document

_BATCH, _MOST = 64, 10_000  # rows that are looked at together, and at most of a source


@dataclass
class Look:
    """The first rows of one source."""

    rows: int = 0
    filtered: int = 0
    documents: dict[str, list[tuple[str, Document]]] = field(default_factory=dict)  # kind -> (place, document)
    dropped: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)  # reason -> place and detail

    def add(self, file: str, line: int, done: Prepared) -> None:
        """Adds rows that begin at a line of a file."""
        self.rows += done.rows
        self.filtered += done.filtered
        for place, kind, document in zip(done.places, done.kinds, done.documents, strict=True):
            self.documents.setdefault(kind, []).append((f"{file}:{line + place}", document))
        for place, error, _ in done.drops:
            self.dropped[error.reason] += 1
            detail = f": {error.detail}" if error.detail else ""
            self.first.setdefault(error.reason, f"{file}:{line + place}{detail}")


def preview(job: Job, count: int, tokenizer: Any, console: Console) -> None:
    """Prepares the first rows of every source and prints `count` documents, spread over sources and kinds."""
    looks = [_look(job, source, -(-count // len(job.sources))) for source in range(len(job.sources))]
    named = zip(job.sources, looks, strict=True)
    groups = [
        [(f"{source.name}, {kind}, {place}", document) for place, document in documents]
        for source, look in named
        for kind, documents in look.documents.items()
    ]
    turns = (one for turn in itertools.zip_longest(*groups) for one in turn if one is not None)
    for title, document in itertools.islice(turns, count):
        print_document(console, tokenizer, document.tokens, document.spans, title)
        console.print()
    for source, look in zip(job.sources, looks, strict=True):
        found = sum(map(len, look.documents.values()))
        filtered = f"{look.filtered:,} left out by --where, " if look.filtered else ""
        counts = f"{filtered}{look.dropped.total():,} dropped, {found:,} documents"
        said = [f"{source.name}: {look.rows:,} rows looked at, {counts}"]
        said += [
            f"would drop {times:,}: {reason}, first {look.first[reason]}" for reason, times in look.dropped.items()
        ]
        for line in said:
            console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def _look(job: Job, source: int, wanted: int) -> Look:
    """The first rows of a source until they give as many documents as are wanted."""
    look = Look()
    for file, line, rows in _batches(job, source):
        look.add(file, line, prepare_rows(job, job.sources[source], rows))
        if sum(map(len, look.documents.values())) >= wanted or look.rows >= _MOST:
            break
    return look


def _batches(job: Job, source: int) -> Iterator[tuple[str, int, list]]:
    """Rows of a source in small lists, with the file and the line from which their places count."""
    for chunk in job.chunks:
        if job.files[chunk.file].source == source:
            rows = job.files[chunk.file].rows
            line = rows.lines(0, chunk.start) + 1
            read = rows.read(chunk.start, chunk.stop)
            while batch := list(itertools.islice(read, _BATCH)):
                yield rows.name, line, batch
