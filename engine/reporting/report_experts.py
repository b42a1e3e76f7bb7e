"""The report's card about experts: how evenly the router loads them, and which of them starve."""

from engine.reporting.charts import WIDTH, Curve, bars, line_chart
from engine.reporting.report_parts import BLUE, ROSE, TEAL, VIOLET, Metrics, card, field_curve, key


def experts_card(metrics: Metrics) -> str:
    """Imbalance over the steps, the last step's load of each expert and, where it is on, the balancing loss.

    Reads `expert_imbalance`, `tokens_per_expert` and `aux_loss`; an empty string for a run without experts.
    """
    lines = [line for line in metrics if line.get("expert_imbalance") and line.get("tokens_per_expert")]
    if not lines:
        return ""
    known = [[value for value in line["expert_imbalance"] if value is not None] for line in lines]
    loads = list(zip((line["step"] for line in lines), known, strict=True))
    means = [(step, sum(load) / len(load) if load else None) for step, load in loads]
    worst = [(step, max(load, default=None)) for step, load in loads]
    curves = [
        Curve(label="mean of the layers", colour=BLUE, points=means),
        Curve(label="worst layer", colour=ROSE, points=worst),
    ]
    balance = " &middot; fullest expert over the mean, 1 is balanced"
    figures = [_figure(key(curves) + balance, line_chart(curves, label="Imbalance of the experts"))]
    balancing = [line for line in lines if "aux_loss" in line]
    if balancing:
        losses = [field_curve(balancing, "aux_loss", "load-balancing loss", VIOLET)]
        note = " &middot; per supervised token, mean of the layers"
        figures.append(_figure(key(losses) + note, line_chart(losses, label="Load-balancing loss")))
    drawn = bars(
        lines[-1]["tokens_per_expert"],
        label="Tokens per expert",
        colour=TEAL,
        name="expert",
        mean="an even load",
        width=2 * WIDTH if balancing else WIDTH,
    )
    note = f"tokens of each expert at step {lines[-1]['step']:,}, all layers together &middot; line: an even load"
    figures.append(_figure(note, drawn, wide=bool(balancing)))
    return card("Experts", _sentence(lines[-1]), f'<div class="cards">{"".join(figures)}</div>', wide=True)


def _figure(note: str, drawn: str, wide: bool = False) -> str:
    """A chart within the card; `note` is HTML already."""
    opening = '<div class="wide">' if wide else "<div>"
    return f"{opening}<p>{note}</p>{drawn}</div>"


def _sentence(line: dict) -> str:
    """What a step's routing comes to, in words."""
    counts, imbalance = line["tokens_per_expert"], line["expert_imbalance"]
    starved = counts.count(0)
    text = f"At step {line['step']:,}, {starved} of {len(counts)} experts ({starved / len(counts):.1%}) got no token"
    known = [(value, -layer) for layer, value in enumerate(imbalance) if value is not None]
    if known:
        value, layer = max(known)
        text += (
            f"; the worst layer is number {-layer}, counted from 0: its fullest expert got {value:.2f} times the mean"
        )
    return text
