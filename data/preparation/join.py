"""Part files -> the data directory: documents in the order of their rows, and the account of every row.

A document that is taken several times stands that many times in a row. Parts are read one after the other; of each
document only a few numbers are held.
"""

import bisect
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from data.documents import runs_of
from data.index import IndexWriter
from data.preparation.account import Account, Tally, kinds_together, total
from data.preparation.job import COUNTS, Job
from data.preparation.output import make_room
from data.preparation.parts import read_part
from data.preparation.selection import Selection, select
from data.preparation.sources import Source

_DUPLICATE = {"prompt": "duplicate prompt", "conversation": "duplicate conversation"}
_BLOCK = 1 << 22  # tokens that are repeated at once


class Parts:
    """All parts of a job, and what is known of them before their documents are read."""

    def __init__(self, job: Job):
        self.job = job
        self.numbers = range(len(job.chunks))
        self.sources = [job.source_of(number) for number in self.numbers]
        self.files = [job.files[chunk.file].rows.name for chunk in job.chunks]
        found = [read_part(job.part(number), "report", "lines", "hashes") for number in self.numbers]
        self.reports: list[dict[str, Any]] = [report for report, _, _ in found]
        self.bounds = [0, *itertools.accumulate(len(lines) for _, lines, _ in found)]  # of the parts' documents
        self.lines = np.concatenate([lines for _, lines, _ in found])  # int32 [documents], within their chunk
        self.hashes = np.concatenate([hashes for _, _, hashes in found]) if job.dedup in _DUPLICATE else None
        self.first_lines: list[int] = []  # of each chunk in its file, from 1
        for number, chunk in enumerate(job.chunks):
            follows = number > 0 and chunk.file == job.chunks[number - 1].file
            before = self.first_lines[-1] + self.reports[number - 1]["lines"] if follows else 1
            self.first_lines.append(before)

    def documents(self, number: int) -> slice:
        """The documents of a part among all."""
        return slice(self.bounds[number], self.bounds[number + 1])

    def sizes(self) -> list[int]:
        """How many documents each source has."""
        sizes = [0] * len(self.job.sources)
        for number, source in enumerate(self.sources):
            sizes[source] += self.bounds[number + 1] - self.bounds[number]
        return sizes

    def is_first(self, number: int) -> np.ndarray:
        """bool [documents of a part], false for pieces of a row of text after its first."""
        return np.diff(self.lines[self.documents(number)], prepend=-1) != 0

    def duplicates(self, number: int, duplicate_of: np.ndarray) -> list[dict[str, Any]]:
        """The rows of a part that repeat another one, as its own drops are written."""
        places = self.documents(number)
        found = []
        for document in places.start + np.flatnonzero(self.is_first(number) & (duplicate_of[places] >= 0)):
            of = int(duplicate_of[document])
            part = bisect.bisect_right(self.bounds, of) - 1
            detail = f"the same as {self.files[part]}:{self.first_lines[part] + self.lines[of]}"
            drop = {"place": int(self.lines[document]), "reason": _DUPLICATE[self.job.dedup], "detail": detail}
            found.append({**drop, "row": None})
        return found

    def listed(self, number: int, drops: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Dropped rows of a part in the order of their lines, as dropped.jsonl has them."""
        source = self.job.sources[self.sources[number]].name
        return [
            {
                "source": self.files[number],
                "line": self.first_lines[number] + drop.pop("place"),
                **drop,
                "example_of": source,
            }
            for drop in sorted(drops, key=lambda drop: drop["place"])
        ]


class Joiner:
    """Writes the documents of parts, one part after the other, and keeps the account."""

    def __init__(self, parts: Parts, sources: list[Source]):
        self.parts, self.sources = parts, sources
        self.accounts = [Account() for _ in sources]
        for number, report in enumerate(parts.reports):
            self.accounts[parts.sources[number]].add_part(parts.files[number], report)
        self.kinds = list(kinds_together(self.accounts))
        self.reasons: dict[str, dict[str, Any]] = {}
        self.counts = np.zeros(len(COUNTS), np.int64)

    def add_drops(self, number: int, drops: list[dict[str, Any]]) -> list[str]:
        """Counts dropped rows of a part; returns their lines in dropped.jsonl."""
        listed = self.parts.listed(number, drops)
        for drop in listed:
            first = f"{drop['source']}:{drop['line']}" + (f": {drop['detail']}" if drop["detail"] else "")
            self.reasons.setdefault(drop["reason"], {"count": 0, "first": first})["count"] += 1
            self.accounts[self.parts.sources[number]].dropped[drop["reason"]] += 1
        return [json.dumps(drop) + "\n" for drop in listed]

    def join(self, number: int, selection: Selection, writer: IndexWriter, valid: IndexWriter | None) -> list[str]:
        """Writes a part's documents as often as was chosen, and those that are held out.

        Returns the lines of dropped.jsonl for its dropped rows.
        """
        parts, source = self.parts, self.parts.sources[number]
        account = self.accounts[source]
        names = ("tokens", "lengths", "spans", "spans_of", "kinds", "counts", "drops")
        tokens, lengths, spans, spans_of, local, counts, drops = read_part(parts.job.part(number), *names)
        places = parts.documents(number)
        held_out, copies = selection.held_out[places], selection.copies[places]
        duplicate = selection.duplicate_of[places] >= 0
        documents = np.repeat(np.arange(len(lengths)), spans_of)
        supervised = np.bincount(documents, spans[:, 1] - spans[:, 0], len(lengths)).astype(np.int64)
        account.add_documents(lengths.astype(np.int64), supervised, duplicate, held_out, copies)
        account.cut += int((~parts.is_first(number) & ~duplicate).sum())
        self.counts += counts[held_out | (copies > 0)].sum(0)
        kinds = list(parts.reports[number]["kinds"])
        for kind, name in enumerate(kinds):
            account.kinds[name].add(copies * (local == kind), lengths.astype(np.int64), supervised)
        of_all = np.array([self.kinds.index(name) for name in kinds], np.uint8)
        arrays = (tokens, lengths, spans, spans_of, np.full(len(lengths), source, np.uint16), of_all[local])
        write_repeated(writer, arrays, copies)
        if valid is not None:
            write_repeated(valid, arrays, held_out.astype(np.int32))
        return self.add_drops(number, drops + parts.duplicates(number, selection.duplicate_of))

    def meta(self, held_out_of: str | None = None) -> dict[str, Any]:
        """The account for meta.json: of what is trained on, or of the documents that are held out of it."""
        sources = []
        for source, account in zip(self.sources, self.accounts, strict=True):
            account.check()
            about: dict[str, Any] = {"name": source.name, "data": source.data, **account.numbers()}
            about["dropped"] = dict(account.dropped)
            about["files"] = [{"name": name, "rows": rows} for name, rows in account.files.items()]
            about["unused_columns"] = sorted(account.unused_columns)
            if held_out_of is None:
                about["kinds"] = {kind: vars(tally) for kind, tally in account.kinds.items()}
            else:
                about |= vars(account.valid) | {"rows": account.rows}
            sources.append(about)
        # how many documents and tokens it holds is what the writer says
        numbers = {name: value for name, value in total(self.accounts).items() if name not in vars(Tally())}
        return {
            "rows": sum(account.rows for account in self.accounts),
            **numbers,
            **dict(zip(COUNTS, self.counts.tolist(), strict=True)),
            "dropped": self.reasons,
            "decontaminated": self._overlaps(),
            "sources": sources,
            "kinds": self.kinds,
            "may_be_cut": self.kinds == ["text"],
            **({"kind_counts": kinds_together(self.accounts)} if held_out_of is None else {}),
            **({} if held_out_of is None else {"held_out": 0, "held_out_of": held_out_of}),
        }

    def _overlaps(self) -> list[dict[str, Any]]:
        """How many rows overlap the questions of each file of test questions."""
        if (questions := self.parts.job.questions) is None:
            return []
        rows = np.sum([report["overlaps"] for report in self.parts.reports], axis=0).tolist()
        names = ("file", "questions", "too_short", "rows")
        numbers = zip(questions.files, questions.questions, questions.too_short, rows, strict=True)
        return [dict(zip(names, one, strict=True)) for one in numbers]


def write_repeated(writer: IndexWriter, arrays: tuple[np.ndarray, ...], copies: np.ndarray) -> None:
    """Writes documents as often as `copies` [documents] says, the copies of one after the other.

    arrays: tokens, lengths, spans, how many spans each has, sources, kinds.
    """
    tokens, lengths, spans, spans_of, *numbers = arrays
    if (copies <= 1).all():
        chosen = copies > 0
        tokens, spans = tokens[np.repeat(chosen, lengths)], spans[np.repeat(chosen, spans_of)]
        writer.add(tokens, lengths[chosen], spans, spans_of[chosen], *(one[chosen] for one in numbers))
        return
    blocks = np.cumsum(copies * lengths, dtype=np.int64) // _BLOCK
    for block in np.unique(blocks):
        order = np.repeat(np.arange(len(copies)), np.where(blocks == block, copies, 0))
        writer.add(
            _gather(tokens, lengths, order),
            lengths[order],
            _gather(spans, spans_of, order),
            spans_of[order],
            *(one[order] for one in numbers),
        )


def _gather(values: np.ndarray, sizes: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Of runs of `sizes` that lie end to end in `values`, those of `order`, end to end."""
    sizes = sizes.astype(np.int64)
    return runs_of(values, (np.cumsum(sizes) - sizes)[order], sizes[order])


def join_parts(
    job: Job,
    sources: list[Source],
    output: Path,
    tokenizer: Any,
    meta: dict[str, Any],
    *,
    hold_out: int | float = 0,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Joins all parts into `output`, in the place of what is there with `overwrite`, and returns its meta.

    Raises ValueError where no document is left, or fewer than are to be taken.
    """
    parts = Parts(job)
    joiner = Joiner(parts, sources)
    if not len(parts.lines):
        raise ValueError(_no_documents(joiner))
    selection = select(sources, parts.sizes(), hashes=parts.hashes, hold_out=hold_out, seed=seed)
    if not selection.copies.any():
        raise ValueError(f"--sources: the parts to take leave none of {len(parts.lines):,} documents: take more")
    writer = IndexWriter(output, vocab_size=len(tokenizer))
    valid = IndexWriter(writer.directory / "valid", vocab_size=len(tokenizer)) if selection.held_out.any() else None
    dropped = writer.directory / "dropped.jsonl"
    with open(dropped, "w", encoding="utf-8") as file:
        for number in parts.numbers:
            file.writelines(joiner.join(number, selection, writer, valid))
    if not joiner.reasons:
        dropped.unlink()
    if valid is not None:
        valid.close(joiner.meta(held_out_of=output.name) | meta, tokenizer)
    replaced = make_room(output, overwrite=overwrite)
    meta = writer.close(joiner.meta() | meta, tokenizer)
    if replaced is not None:
        shutil.rmtree(replaced)
    return meta


def _no_documents(joiner: Joiner) -> str:
    for number in joiner.parts.numbers:
        (drops,) = read_part(joiner.parts.job.part(number), "drops")
        joiner.add_drops(number, drops)
    causes = [f"{drop['count']:,} x {why} (first {drop['first']})" for why, drop in joiner.reasons.items()]
    numbers = total(joiner.accounts)
    if numbers["filtered"]:
        causes.append(f"{numbers['filtered']:,} x left out by --where")
    return f"--sources: none of {numbers['rows']:,} rows can be used: {'; '.join(causes) or 'no rows'}"
