"""One document as a person reads it: its text with the supervised tokens marked, in a terminal and as HTML.

Tokens are decoded in runs of one kind, so that a character made of several tokens comes out whole. A run that ends
inside a character shows the replacement character there, and only there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer

from data.documents import Documents
from data.preparation.report_parts import percent

MOST_TOKENS = 800  # of a document that is shown; half of them from its head, half from its tail
OPEN, CLOSE = "[[", "]]"  # around supervised tokens where there is no colour

_BIDIRECTIONAL = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))  # these turn round the text beside them
# Characters that would steer a terminal or a page, and what is shown for them; the first are Unicode's pictures.
CONTROLS = (
    {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
    | {0x7F: "\u2421"}
    | {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}
    | {code: f"\\u{code:04x}" for code in _BIDIRECTIONAL}
)
_VISIBLE = CONTROLS | {0x0A: "↵\n", 0x09: "→\t"}


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens [start, stop) that are all supervised or all not, and all special or all not."""

    start: int
    stop: int
    text: str
    supervised: bool
    special: bool  # added tokens of the tokenizer, such as the end of a turn


@dataclass(frozen=True)
class Gap:
    """Tokens in the middle of a long document that are not shown."""

    tokens: int
    supervised: int

    def __str__(self) -> str:
        return f"... {self.tokens:,} tokens left out, {self.supervised:,} of them supervised ..."


def saved_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder with a `tokenizer.json`, read without transformers; None where it has none.

    Raises ValueError where the file is damaged.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file} is no tokenizer that can be read: {error}") from None


def title_of(index: Documents, document: int) -> str:
    """Which document it is, of how many, and where it comes from."""
    source = index.source_names[int(index.sources[document])]
    kind = index.kinds[int(index.kind_numbers[document])]
    return f"document {document:,} of {len(index):,}, source {source}, kind {kind}"


def print_document(
    console: Console, tokenizer: Any, tokens: np.ndarray, spans: np.ndarray, title: str, *, full: bool = False
) -> None:
    """Prints a document's text; supervised tokens on green, or in [[ ]] where the console has no colour.

    tokenizer: of transformers or tokenizers, or None, which shows ids. tokens [length], spans [n, 2] half-open ranges.
    A long document is cut in its middle, and says by how much, unless it is shown in full.
    """
    colourless = console.no_color or console.color_system is None
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(Text(numbers_line(tokens, spans), style="dim"), soft_wrap=True)
    text, marked = Text(), False
    for part in shown_parts(tokenizer, tokens, spans, None if full else MOST_TOKENS):
        supervised = isinstance(part, Run) and part.supervised
        if colourless and supervised != marked:
            text.append(OPEN if supervised else CLOSE)
        marked = supervised
        if isinstance(part, Run):
            text.append(part.text, " ".join(["bold"] * part.special + ["black on green"] * part.supervised))
        else:
            text.append(f"\n{part}\n", "dim")
    if colourless and marked:
        text.append(CLOSE)
    console.print(text, soft_wrap=True, end="" if text.plain.endswith("\n") else "\n")


def document_html(
    tokenizer: Any, tokens: np.ndarray, spans: np.ndarray, title: str, most_tokens: int | None = MOST_TOKENS
) -> str:
    """The same as HTML: supervised tokens in <mark>, special ones in <b>, everything escaped."""
    parts = []
    for part in shown_parts(tokenizer, tokens, spans, most_tokens):
        if isinstance(part, Gap):
            parts.append(f"\n<i>{part}</i>\n")
            continue
        text = escape(part.text)
        text = f"<b>{text}</b>" if part.special else text
        parts.append(f"<mark>{text}</mark>" if part.supervised else text)
    numbers = numbers_line(tokens, spans)
    head = f"<h4>{escape(title)}</h4><p>{numbers}</p>"
    return f'<article class="document">{head}<pre>{"".join(parts)}</pre></article>'


def numbers_line(tokens: np.ndarray, spans: np.ndarray) -> str:
    """How many tokens a document has, and how many of them are supervised."""
    supervised = int(_marks(len(tokens), spans).sum())
    where = f"{len(spans):,} span" + ("s" if len(spans) != 1 else "")
    return f"{len(tokens):,} tokens, {supervised:,} supervised ({percent(supervised, len(tokens))}) in {where}"


def shown_parts(tokenizer: Any, tokens: np.ndarray, spans: np.ndarray, most_tokens: int | None) -> Iterator[Run | Gap]:
    """A document in runs; of one with more than `most_tokens` the head, a gap and the tail."""
    supervised = _marks(len(tokens), spans)
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    added = [] if backend is None else list(backend.get_added_tokens_decoder())
    special = np.isin(tokens, added)
    kinds = supervised * 2 + special
    if most_tokens is None or len(tokens) <= most_tokens:
        head = tail = len(tokens)
    else:
        head = most_tokens // 2
        tail = len(tokens) - (most_tokens - head)
    for start, stop in ((0, head), (tail, len(tokens))):
        if start == tail > head:
            yield Gap(tail - head, int(supervised[head:tail].sum()))
        changes = np.flatnonzero(np.diff(kinds[start:stop])) + start + 1
        bounds = [start, *changes.tolist(), stop] if start < stop else []
        for first, last in pairwise(bounds):
            text = _decode(backend, tokens, first, last)
            yield Run(first, last, text.translate(_VISIBLE), bool(supervised[first]), bool(special[first]))


def _marks(length: int, spans: np.ndarray) -> np.ndarray:
    """bool [length], true where a token is supervised."""
    marks = np.zeros(length, dtype=bool)
    for first, stop in spans:
        marks[first:stop] = True
    return marks


def _decode(backend: Tokenizer | None, tokens: np.ndarray, start: int, stop: int) -> str:
    """The text of tokens [start, stop), as it stands in the text of the whole document."""
    ids = tokens[max(0, start - 1) : stop].tolist()
    if backend is None:
        return "".join(f"{token} " for token in ids[len(ids) - (stop - start) :])
    if start == 0:
        return backend.decode(ids, skip_special_tokens=False)
    # SentencePiece's decoders drop the space that a text begins with: behind the token before it stays.
    before = backend.decode(ids[:1], skip_special_tokens=False)
    both = backend.decode(ids, skip_special_tokens=False)
    if "\ufffd" not in before and both.startswith(before):
        return both[len(before) :]
    return backend.decode(ids[1:], skip_special_tokens=False)
