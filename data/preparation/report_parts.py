"""What the cards of a data report are made of: their frame, tables, bars and histograms, as HTML and SVG.

Colours are classes of `data_report.css`, which knows a light and a dark page.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

WIDTH, HEIGHT = 420, 170
LEFT, RIGHT, TOP, BOTTOM = 46, 20, 12, 34
FOLD_CHARACTERS = 50_000
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


class Cell(NamedTuple):
    """A cell of a table that is HTML already."""

    html: str


def card(anchor: str, heading: str, note: str, content: str, wide: bool = False) -> str:
    """A box with a heading; `note` is text, `content` is HTML."""
    kind = "card wide" if wide else "card"
    note = f"<p>{escape(note)}</p>" if note else ""
    return f'<section class="{kind}" id="{anchor}"><h2>{escape(heading)}</h2>{note}{content}</section>'


def table(heads: Sequence[str], rows: Iterable[Sequence[str | int | Cell]]) -> str:
    """A table whose first column is text and whose other columns are numbers, unless they are `Cell`."""
    head = "".join(f"<th>{escape(one)}</th>" for one in heads)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: str | int | Cell) -> str:
    if isinstance(value, Cell):
        return f"<td>{value.html}</td>"
    return f"<td>{escape(value) if isinstance(value, str) else f'{value:,}'}</td>"


def fold(summary: str, content: Any) -> str:
    """A text that is shown on demand, or anything else as JSON."""
    text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False)
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(clipped(text, FOLD_CHARACTERS))}</pre></details>"


def clipped(text: str, most: int) -> str:
    """A text's first characters, with the number of those that follow."""
    return text if len(text) <= most else f"{text[:most]} ... {len(text) - most:,} characters more"


def meter(share: float, text: str) -> Cell:
    """A share of 1 as a bar with its text."""
    return Cell(f'<span class="meter"><i style="width:{100 * share:.2f}%"></i></span>{escape(text)}')


def stacked(parts: Sequence[tuple[str, int, str]], whole: int) -> str:
    """Parts of a whole as one bar with its key; a part is (name, count, class of its colour)."""
    shown = [part for part in parts if part[1]]
    bar = "".join(
        f'<i class="{colour}" style="width:{100 * count / max(1, whole):.3f}%" title="{escape(name)}: {count:,}"></i>'
        for name, count, colour in shown
    )
    keys = "".join(
        f'<span><i class="{colour}"></i>{escape(name)} {count:,} ({percent(count, whole)})</span>'
        for name, count, colour in shown
    )
    return f'<div class="bar">{bar}</div><div class="keys">{keys}</div>'


def percent(part: float, whole: float) -> str:
    """A share as text: `12.3%`; what is not nought never reads as 0.0%, what is not all never as 100.0%."""
    if not part or not whole:
        return "0%"
    if part == whole:
        return "100%"
    share = part / whole
    return "<0.1%" if share < 0.001 else ">99.9%" if share > 0.999 else f"{share:.1%}"


def short(number: float) -> str:
    """A number in few characters: `9,500`, `12.3k`, `4.06M`."""
    if number < 10_000:
        return f"{number:,.0f}"
    limit, suffix = next(unit for unit in _UNITS if number >= 0.9995 * unit[0])
    return f"{number / limit:.3g}{suffix}"


def _step(highest: int) -> int:
    """A round step of which at most four fit below `highest`."""
    return next(
        factor * 10**power for power in range(19) for factor in (1, 2, 5) if highest // (factor * 10**power) <= 4
    )


def histogram(
    counts: Sequence[int], titles: Sequence[str], ticks: Sequence[tuple[int, str]], *, label: str, x_label: str
) -> str:
    """An SVG with a bar for each count; ticks are (edge between bars, counted from 0; its text)."""
    base, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    width = (right - LEFT) / len(counts)
    highest = max(counts) or 1
    parts = []
    step = _step(highest)
    for value in range(step, highest + 1, step):
        y = base - (base - TOP) * value / highest
        parts.append(f'<path d="M{LEFT},{y:.1f}H{right}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
    for place, (count, title) in enumerate(zip(counts, titles, strict=True)):
        if count:
            # at least a line, so that a single document among millions is seen
            height = max(1.0, (base - TOP) * count / highest)
            box = f'x="{LEFT + place * width + 0.75:.2f}" y="{base - height:.1f}" width="{width - 1.5:.2f}"'
            title = f"<title>{escape(title)}: {count:,} documents</title>"
            parts.append(f'<rect {box} height="{height:.1f}" class="column">{title}</rect>')
    parts.append(f'<path d="M{LEFT},{base}H{right}" class="axis"/>')
    for edge, text in ticks:
        x = LEFT + edge * width
        parts.append(f'<path d="M{x:.1f},{base}v4" class="axis"/>')
        parts.append(f'<text x="{x:.1f}" y="{base + 16}" text-anchor="middle">{escape(text)}</text>')
    parts.append(f'<text x="{right}" y="{HEIGHT - 3}" text-anchor="end">{escape(x_label)}</text>')
    frame = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
    return f"{frame}{''.join(parts)}</svg>"
