"""What the cards of a report share: their frame, their colours, and a field of the metrics as a curve."""

from collections.abc import Sequence
from html import escape
from typing import Any

from engine.reporting.charts import Curve
from engine.reporting.metrics import AT_START

BLUE, ORANGE, VIOLET, TEAL, ROSE = "#2f62d9", "#e07318", "#7c4dcf", "#0f8f86", "#c93a5b"
# For as many curves as one chart shows of a field by names.
PALETTE = (BLUE, ORANGE, TEAL, VIOLET, ROSE, "#8a6d1d", "#3d9a3a", "#5b6678")

Metrics = list[dict[str, Any]]


def card(heading: str, note: str, content: str, wide: bool = False) -> str:
    """A white box; `heading`, `note` and `content` are HTML already."""
    return f'<section class="card{" wide" if wide else ""}"><h2>{heading}</h2><p>{note}</p>{content}</section>'


def key(curves: Sequence[Curve]) -> str:
    """Coloured squares with the curves' names."""
    return "".join(
        f'<span class="key"><i style="background:{curve.colour}"></i>{escape(curve.label)}</span>' for curve in curves
    )


def field_curve(metrics: Metrics, field: str, label: str, colour: str) -> Curve:
    """A field over the steps."""
    return Curve(label=label, colour=colour, points=[(line["step"], line.get(field)) for line in metrics])


def held_out_curve(
    metrics: Metrics, label: str, colour: str, *, field: str = "valid_loss", name: str | None = None
) -> Curve:
    """A held-out loss where it was measured, also before the first step; of one `name` in a field by names."""
    points: list[tuple[float, float | None]] = []
    for line in metrics:
        for found, step in ((line.get(field + AT_START), line["step"] - 1), (line.get(field), line["step"])):
            value = found if name is None else (found or {}).get(name)
            if value is not None:
                points.append((step, value))
    return Curve(label=label, colour=colour, points=points, dots=len(points) <= 60)


def last_value(metrics: Metrics, field: str) -> float | None:
    """The latest known value of a field."""
    return next((line[field] for line in reversed(metrics) if line.get(field) is not None), None)


def total(metrics: Metrics, field: str) -> float:
    """The sum of a field over all steps."""
    return sum(line.get(field) or 0 for line in metrics)
