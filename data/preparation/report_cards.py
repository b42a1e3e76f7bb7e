"""The cards of a data report that hold numbers: rows, tokens, sources, kinds, lengths, packing, repeats."""

from __future__ import annotations

import math
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np

from data.preparation.measures import PACKED_DOCUMENTS, Contents, Group, fills, length_edges, repeats
from data.preparation.report_parts import Cell, card, fold, histogram, meter, percent, short, stacked, table
from data.preparation.samples import document_html, title_of

MOST_SOURCES, MOST_FILES, MOST_CHARTS = 200, 20, 12
MOST_TICKS = 8
SHARE_BARS = 20
REPEAT_TOKENS = 80  # of a repeated document that are shown


def rows_card(contents: Contents) -> str:
    """Every row in one part, and every document."""
    parts = [
        ("documents here", contents.all.documents, "blue"),
        ("held out", contents.count("held_out"), "teal"),
        ("not taken", contents.count("not_taken"), "grey"),
        ("filtered", contents.count("filtered"), "amber"),
        ("dropped", contents.drops, "red"),
    ]
    counted = sum(count for _, count, _ in parts)
    parts.append(("elsewhere", max(0, contents.rows - counted), "rest"))
    more = {
        "copies of rows that are taken more than once": contents.count("repeated"),
        "further pieces of rows that were cut": contents.count("cut"),
    }
    said = " and ".join(f"{count:,} {what}" for what, count in more.items() if count)
    note = f"{contents.rows:,} rows" + (f"; among the documents are {said}" if said else "")
    return card("rows", "What became of the rows", note, stacked(parts, max(contents.rows, counted)))


def tokens_card(contents: Contents) -> str:
    """Every token of the documents here, and those that rows elsewhere or dropped rows had."""
    everything = contents.all
    parts: list[tuple[str, int, str]] = [
        ("supervised", everything.supervised_tokens, "blue"),
        ("masked: read without loss", everything.tokens - everything.supervised_tokens, "pale"),
    ]
    if "held_out_of" not in contents.index.meta:  # a directory of held-out documents has the other's counts
        parts += [
            ("held out", contents.count("held_out_tokens"), "teal"),
            ("not taken", contents.count("not_taken_tokens"), "grey"),
            ("dropped", contents.count("dropped_tokens"), "red"),
        ]
    note = f"{everything.tokens:,} tokens in the documents here"
    if repeated := contents.count("repeated_tokens"):
        note += f", {repeated:,} of them in copies"
    return card("tokens", "What became of the tokens", note, stacked(parts, sum(count for _, count, _ in parts)))


def sources_card(contents: Contents) -> str:
    """A line for each source: of its rows what meta.json says, of its documents what lies here."""
    said = contents.index.meta.get("sources", [])
    counts = [_row_counts(source) for source in said] or [[]] * len(contents.sources)
    heads = ["source", *(("rows", "filtered", "dropped") if said else ()), *_GROUP_HEADS]
    rows = [
        [group.name, *count, *_group_cells(group, contents.all)]
        for group, count in zip(contents.sources[:MOST_SOURCES], counts, strict=False)
    ]
    note = ""
    if len(contents.sources) > MOST_SOURCES:
        note = f"The first {MOST_SOURCES} of {len(contents.sources):,} are shown."
    details = fold("What meta.json says of them", [_few_files(source) for source in said]) if said else ""
    return card("sources", "Sources", note, table(heads, rows) + details, wide=True)


def kinds_card(contents: Contents) -> str:
    said = contents.index.meta.get("kind_counts", {})
    rows = [
        [group.name, *([said.get(group.name, {}).get("rows", 0)] if said else []), *_group_cells(group, contents.all)]
        for group in contents.kinds
    ]
    silent = [group.name for group in contents.kinds if not group.supervised_tokens]
    warning = f'<div class="warning">No token is supervised in {escape(", ".join(silent))}.</div>' if silent else ""
    heads = ["kind", *(["rows"] if said else []), *_GROUP_HEADS]
    return card("kinds", "Kinds of rows", "", table(heads, rows) + warning, wide=True)


_GROUP_HEADS = ("documents", "tokens", "of all tokens", "supervised", "mean length", "longest")


def _group_cells(group: Group, everything: Group) -> list[str | int | Cell]:
    share = group.supervised_tokens / max(1, group.tokens)
    return [
        group.documents,
        group.tokens,
        percent(group.tokens, everything.tokens),
        meter(share, percent(group.supervised_tokens, group.tokens)),
        f"{group.tokens / max(1, group.documents):,.1f}",
        group.longest,
    ]


def _row_counts(source: dict[str, Any]) -> list[str | int]:
    dropped = sum(source.get("dropped", {}).values())
    return [source.get("rows", ""), source.get("filtered", ""), dropped]


def _few_files(source: dict[str, Any]) -> dict[str, Any]:
    files = source.get("files", [])
    if len(files) <= MOST_FILES:
        return source
    return source | {"files": [*files[:MOST_FILES], f"{len(files) - MOST_FILES:,} more"]}


def lengths_card(contents: Contents) -> str:
    """A histogram for each source over one axis, so that they can be compared."""
    lengths, sources = contents.index.lengths, contents.index.sources
    edges = length_edges(lengths)
    bars = len(edges) - 1
    place = (np.searchsorted(edges, lengths, side="right") - 1).clip(0, bars - 1)
    counts = np.bincount(sources.astype(np.int64) * bars + place, minlength=len(contents.sources) * bars)
    titles = [f"{low:,} to {high - 1:,} tokens" for low, high in pairwise(edges)]
    powers = [edge for edge, length in enumerate(edges.tolist()) if length & (length - 1) == 0]
    ticks = [(edge, _length(int(edges[edge]))) for edge in powers[:: math.ceil(len(powers) / MOST_TICKS)]]
    drawn: list[str] = []
    for group, own in zip(contents.sources, counts.reshape(-1, bars).tolist(), strict=True):
        if group.documents and len(drawn) < MOST_CHARTS:
            chart = histogram(own, titles, ticks, label=f"Lengths in {group.name}", x_label="tokens in a document")
            drawn.append(f"<div><h3>{escape(group.name)}</h3>{chart}</div>")
    filled = sum(group.documents > 0 for group in contents.sources)
    note = "Documents by their length; the axis is logarithmic."
    if filled > len(drawn):
        note += f" The first {len(drawn)} of {filled} sources are shown."
    return card("lengths", "Lengths", note, f'<div class="charts">{"".join(drawn)}</div>', wide=True)


def _length(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 else str(tokens)


def packing_card(contents: Contents) -> str:
    """How full packed sequences will be at common lengths, and what does not fit."""
    documents = contents.all.documents
    rows: list[list[str | int | Cell]] = []
    for fill in fills(contents.index.lengths):
        filled = meter(fill.fill, f"{fill.fill:.2%}") if fill.fill is not None else "none fits"
        longer = f"{fill.longer:,} ({percent(fill.longer, documents)})" if fill.longer else "0"
        rows.append([f"{fill.capacity:,}", filled, fill.sequences, longer])
    note = "Documents packed whole, without those that are longer than the sequence."
    if documents > PACKED_DOCUMENTS:
        note += f" Of a sample of {PACKED_DOCUMENTS:,} documents; the longer ones are counted among all."
    drawn = table(["sequence length", "filled", "sequences", "longer documents"], rows)
    return card("packing", "How full packed sequences will be", note, drawn)


def share_card(contents: Contents) -> str:
    """Documents by how many of their tokens are supervised."""
    lengths, supervised = contents.index.lengths, contents.supervised
    place = (supervised.astype(np.int64) * SHARE_BARS // np.maximum(lengths, 1)).clip(0, SHARE_BARS - 1)
    counts = np.bincount(place, minlength=SHARE_BARS).tolist()
    width = 100 // SHARE_BARS
    titles = [f"{width * bar}% to {width * (bar + 1)}% supervised" for bar in range(SHARE_BARS)]
    ticks = [(bar, f"{width * bar}%") for bar in range(0, SHARE_BARS + 1, SHARE_BARS // 5)]
    chart = histogram(counts, titles, ticks, label="Supervised tokens", x_label="of a document's tokens supervised")
    everything = contents.all
    note = (
        f"{everything.supervised_tokens:,} of {everything.tokens:,} tokens are supervised"
        f" ({percent(everything.supervised_tokens, everything.tokens)})."
    )
    none = int(np.count_nonzero(supervised == 0))
    warning = (
        f'<div class="warning">{none:,} of {len(lengths):,} documents have no supervised token.</div>' if none else ""
    )
    return card("share", "Share of supervised tokens", note, chart + warning)


def repeats_card(contents: Contents, tokenizer: Any) -> str:
    """How many documents are there more than once, and which most often."""
    index = contents.index
    found = repeats(index, contents.supervised)
    note = (
        f"{found.repeated:,} of {found.compared:,} documents ({percent(found.repeated, found.compared)}) have the same"
        " tokens as an earlier one."
    )
    if found.compared < len(index):
        note += f" That is a sample of {short(len(index))} documents, chosen by length, so that copies meet."
    shown = [
        document_html(
            tokenizer,
            index.tokens(document),
            index.spans(document),
            f"{times:,} times, first as {title_of(index, document)}",
            REPEAT_TOKENS,
        )
        for document, times in found.most
    ]
    return card("repeats", "Repeats", note, f'<div class="samples">{"".join(shown)}</div>', wide=True)
