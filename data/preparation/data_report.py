"""`DATA/data_report.html`: what lies in a data directory, on one page in one file, to be read before training.

It is made of the directory alone, so it can be written again for any, and the same directory gives the same bytes.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from data.index import DocumentIndex
from data.preparation.dropped import find_dropped, place_of, row_text
from data.preparation.measures import Contents, choose_samples, read_contents
from data.preparation.report_cards import (
    kinds_card,
    lengths_card,
    packing_card,
    repeats_card,
    rows_card,
    share_card,
    sources_card,
    tokens_card,
)
from data.preparation.report_parts import card, clipped, fold, percent, short
from data.preparation.samples import document_html, title_of
from data.preparation.summary import NOTES

REPORT = "data_report.html"
SAMPLES_EACH, MOST_SAMPLES, SAMPLE_TOKENS = 2, 40, 400
MOST_REASONS = 50
NOTE_CHARACTERS = 2000
# What the page says elsewhere, or what tells a reader nothing.
SHOWN_ELSEWHERE = {
    *("rows", "documents", "filtered", "held_out", "not_taken", "repeated", "cut", "dropped", "longest"),
    *("tokens", "supervised_tokens", "encoded_tokens", "held_out_tokens", "not_taken_tokens", "repeated_tokens"),
    *("dropped_tokens", "sources", "kinds", "kind_counts", "options", "chat_template", "date", "plan"),
    *("end_token_ids", "end_tokens", "vocab_size", "dtype", "fingerprint", "tokenizer_fingerprint"),
}


def write_data_report(directory: Path, tokenizer: Any) -> Path:
    """Writes `data_report.html` into a data directory and returns its path.

    tokenizer: of transformers or tokenizers; None shows token ids. Raises ValueError where the directory is none.
    """
    contents = read_contents(DocumentIndex(directory))
    names = ", ".join(contents.index.source_names[:8]) + (", ..." if len(contents.index.source_names) > 8 else "")
    cards = [
        rows_card(contents),
        tokens_card(contents),
        sources_card(contents),
        kinds_card(contents),
        _notes_card(contents),
        lengths_card(contents),
        packing_card(contents),
        share_card(contents),
        _samples_card(contents, tokenizer),
        _dropped_card(contents),
        repeats_card(contents, tokenizer),
        _preparation_card(contents),
    ]
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(names)} - data report</title><style>\n{style}</style></head>\n<body><main>"
        f"<header><h1>Data report</h1><p>{escape(names)}</p>{_links()}</header>{_tiles(contents)}"
        f'<div class="cards">\n{chr(10).join(filter(None, cards))}\n</div></main></body></html>\n'
    )
    path = directory / REPORT
    path.write_text(page, encoding="utf-8", errors="backslashreplace")  # rows can hold half of a surrogate pair
    return path


def _links() -> str:
    anchors = ("sources", "lengths", "packing", "samples", "dropped", "repeats", "preparation")
    return "<nav>" + " ".join(f'<a href="#{anchor}">{anchor}</a>' for anchor in anchors) + "</nav>"


def _tiles(contents: Contents) -> str:
    everything = contents.all
    tiles = [
        ("rows", short(contents.rows)),
        ("documents", short(everything.documents)),
        ("tokens", short(everything.tokens)),
        ("supervised", percent(everything.supervised_tokens, everything.tokens)),
        ("longest", short(everything.longest)),
        ("held out", short(contents.count("held_out"))),
        ("filtered", short(contents.count("filtered"))),
        ("dropped", short(contents.drops)),
    ]
    drawn = (f'<div class="tile"><b>{escape(value)}</b><span>{name}</span></div>' for name, value in tiles)
    return f'<div class="tiles">{"".join(drawn)}</div>'


def _notes_card(contents: Contents) -> str:
    """All that meta.json counts or says beyond the rest of the page; a count of nought is left out."""
    meta = contents.index.meta
    items = [
        (name.replace("_", " "), NOTES.get(name, ""), value)
        for name, value in meta.items()
        if name not in SHOWN_ELSEWHERE and value
    ]
    items += [
        ("columns not used", f"in the rows of {source['name']}", source["unused_columns"])
        for source in meta.get("sources", [])
        if source.get("unused_columns")
    ]
    if not items:
        return ""
    rows = "".join(
        f"<div><dt><b>{escape(name)}</b> {escape(note)}</dt><dd>{escape(_said(value))}</dd></div>"
        for name, note, value in items
    )
    return card("notes", "Notes", "", f"<dl>{rows}</dl>", wide=True)


def _said(value: Any) -> str:
    """A value of meta.json in few words."""
    if isinstance(value, bool):
        return "yes"
    if isinstance(value, int | float):
        return f"{value:,}"
    if isinstance(value, list):
        return clipped("; ".join(map(_said, value)), NOTE_CHARACTERS)
    if isinstance(value, dict):
        return clipped("; ".join(f"{name}: {_said(one)}" for name, one in value.items()), NOTE_CHARACTERS)
    return str(value)


def _samples_card(contents: Contents, tokenizer: Any) -> str:
    index = contents.index
    chosen = choose_samples(index, SAMPLES_EACH, MOST_SAMPLES)
    samples = [
        document_html(tokenizer, index.tokens(one), index.spans(one), title_of(index, one), SAMPLE_TOKENS)
        for one in chosen
    ]
    note = (
        f"Up to {SAMPLES_EACH} of each kind of each source, at most {MOST_SAMPLES} in all; at most {SAMPLE_TOKENS}"
        " tokens of each. On green: supervised tokens, which the model learns to write. Bold: tokens of the template."
    )
    if tokenizer is None:
        note += " This directory has no tokenizer, so ids are shown."
    return card("samples", "Samples", note, f'<div class="samples">{"".join(samples)}</div>', wide=True)


def _dropped_card(contents: Contents) -> str:
    """Every reason with its count, its share of all rows and one row."""
    if not contents.dropped:
        return card("dropped", "Dropped rows", "No row was dropped.", "", wide=True)
    reasons = sorted(contents.dropped, key=lambda reason: (-contents.dropped[reason]["count"], reason))
    shown = reasons[:MOST_REASONS]
    examples = find_dropped(contents.index.path, shown)
    parts = []
    for reason in shown:
        drop = contents.dropped[reason]
        count = f"{drop['count']:,} rows, {percent(drop['count'], contents.rows)} of all"
        head = f"<h3>{escape(reason)}</h3><p>{count}</p>"
        if rows := examples[reason]:
            place, row = escape(place_of(rows[0])), escape(row_text(rows[0].get("row")))
            parts.append(f'<div class="drop">{head}<p>{place}</p><pre>{row}</pre></div>')
        else:
            parts.append(f'<div class="drop">{head}<p>first {escape(str(drop.get("first", "")))}</p></div>')
    note = f"{contents.drops:,} of {contents.rows:,} rows, with one example for each reason; dropped.jsonl has all."
    if len(reasons) > len(shown):
        note += f" The {len(shown)} most frequent of {len(reasons)} reasons are shown."
    return card("dropped", "Dropped rows", note, f'<div class="samples">{"".join(parts)}</div>', wide=True)


def _preparation_card(contents: Contents) -> str:
    meta = contents.index.meta
    ends = " ".join(meta.get("end_tokens") or []) or "no token of its own, so generation will not stop"
    facts = {
        "vocabulary": f"{meta.get('vocab_size', 0):,} tokens",
        "end of a turn": ends,
        "tokens are kept as": meta.get("dtype", "unknown"),
        "fingerprint": contents.index.fingerprint,
    }
    rows = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    folds = fold("The chat template", str(meta["chat_template"])) if meta.get("chat_template") else ""
    folds += fold("The options", meta["options"]) if meta.get("options") else ""
    return card("preparation", "How it was prepared", "", f"<dl>{rows}</dl>{folds}", wide=True)
