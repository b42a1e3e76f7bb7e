"""The report's cards about where tokens come from: the loss of each source, and of each held-out set."""

from html import escape

from engine.reporting.charts import Curve, line_chart
from engine.reporting.report_parts import PALETTE, Metrics, card, held_out_curve, key


def sources_card(metrics: Metrics) -> str:
    """Training loss and share of supervised tokens by source; an empty string for a run with one source.

    Reads `source_losses` and `source_tokens`. A source has no point in steps in which it has no supervised token.
    """
    tokens: dict[str, int] = {}
    for line in metrics:
        for name, count in (line.get("source_tokens") or {}).items():
            tokens[name] = tokens.get(name, 0) + count
    if not tokens:
        return ""
    largest = sorted(tokens, key=lambda name: -tokens[name])
    curves = [
        Curve(label=name, colour=colour, points=_points(metrics, name))
        for name, colour in zip(largest, PALETTE, strict=False)
    ]
    whole = max(1, sum(tokens.values()))
    last = {name: next((value for _, value in reversed(_points(metrics, name))), None) for name in largest}
    facts = [(name, last[name], f"{tokens[name] / whole:.1%} of supervised tokens") for name in largest]
    return _card("Loss by source", "per supervised token", curves, facts)


def held_out_card(metrics: Metrics) -> str:
    """The loss of each held-out set, and of its sources; an empty string where there is one set of one source.

    Reads `valid_losses` and `valid_source_losses`, also those from before the first step.
    """
    names = {
        field: list(dict.fromkeys(name for line in metrics for name in line.get(field) or {}))
        for field in ("valid_losses", "valid_source_losses")
    }
    shown = [(field, name) for field, found in names.items() for name in found]
    if len(shown) < 2:
        return ""
    curves = [
        held_out_curve(metrics, name, PALETTE[number % len(PALETTE)], field=field, name=name)
        for number, (field, name) in enumerate(shown)
    ]
    last = [(curve.label, curve.points[-1][1] if curve.points else None, "") for curve in curves]
    return _card("Held-out loss by set", "per supervised token", curves[: len(PALETTE)], last)


def _points(metrics: Metrics, name: str) -> list[tuple[float, float | None]]:
    """A source's losses by step."""
    pairs = ((line["step"], (line.get("source_losses") or {}).get(name)) for line in metrics)
    return [(step, loss) for step, loss in pairs if loss is not None]


def _card(heading: str, note: str, curves: list[Curve], facts: list[tuple[str, float | None, str]]) -> str:
    """A chart of the curves, and below it the last loss of every name with a remark."""
    rows = []
    for name, loss, remark in facts:
        text = "no supervised token" if loss is None else f"{loss:.4f}"
        rows.append(f"<div><dt>{escape(name)}</dt><dd>{text}{' &middot; ' if remark else ''}{remark}</dd></div>")
    left_out = f" &middot; the chart shows {len(curves)} of {len(facts)}" if len(curves) < len(facts) else ""
    drawn = line_chart(curves, label=heading)
    return card(heading, f"{key(curves)} &middot; {note}{left_out}", f"{drawn}<dl>{''.join(rows)}</dl>")
