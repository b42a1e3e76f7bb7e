"""What the cards of a report share: their frame, their colours, and a field of the metrics as a curve."""

from collections.abc import Sequence
from html import escape
from typing import Any

from engine.reporting.charts import Curve

BLUE, ORANGE, VIOLET, TEAL, ROSE = "#2f62d9", "#e07318", "#7c4dcf", "#0f8f86", "#c93a5b"

Metrics = list[dict[str, Any]]


def card(heading: str, note: str, content: str, wide: bool = False) -> str:
    """A white box; `heading`, `note` and `content` are HTML already."""
    return f'<section class="card{" wide" if wide else ""}"><h2>{heading}</h2><p>{note}</p>{content}</section>'


def key(curves: Sequence[Curve]) -> str:
    """Coloured squares with the curves' names."""
    return "".join(
        f'<span class="key"><i style="background:{curve.colour}"></i>{escape(curve.label)}</span>' for curve in curves
    )


def field_curve(metrics: Metrics, field: str, label: str, colour: str, dots: bool = False) -> Curve:
    """A field over the steps; with `dots` only the steps that have it."""
    points = [(line["step"], line.get(field)) for line in metrics]
    if dots:
        points = [(step, value) for step, value in points if value is not None]
    return Curve(label=label, colour=colour, points=points, dots=dots and len(points) <= 60)


def last_value(metrics: Metrics, field: str) -> float | None:
    """The latest known value of a field."""
    return next((line[field] for line in reversed(metrics) if line.get(field) is not None), None)


def total(metrics: Metrics, field: str) -> float:
    """The sum of a field over all steps."""
    return sum(line.get(field) or 0 for line in metrics)
