"""`report.html`: what a run did, on one page in one file that opens anywhere, now and in ten years.

Everything is in the file: styles, charts drawn as SVG, one sample with its loss mask. It is written from
`metrics.jsonl` and `config.yaml`, so it can be written again for any run folder, finished or not.
"""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from engine.reporting.charts import histogram, line_chart, number
from engine.reporting.metrics import read_metrics
from engine.reporting.progress import clock
from engine.reporting.report_evaluation import evaluation_card
from engine.reporting.report_experts import experts_card
from engine.reporting.report_parts import (
    BLUE,
    ORANGE,
    ROSE,
    TEAL,
    VIOLET,
    Metrics,
    card,
    field_curve,
    held_out_curve,
    key,
    last_value,
    total,
)
from engine.reporting.report_sources import held_out_card, sources_card
from engine.run_folder import RunFolder, replace_text

SAMPLE = "<!-- sample -->"  # stands around its card; what is foreign on the page is escaped, and never reads so
TRAINED, MASKED = "#c9efd6", "#e9ecf1"
# Tokens of a sample that are shown; a longer one is cut, and the page says so.
MOST_TOKENS = 4096
# Options that the page shows at once, in this order, each by the end of its dotted name.
FACTS = (
    ("model", "Model"),
    ("data", "Data"),
    ("tp", "Tensor parallel"),
    ("sp", "Sequence parallel"),
    ("cp", "Context parallel"),
    ("pp", "Pipeline parallel"),
    ("vpp", "Virtual pipeline"),
    ("ep", "Expert parallel"),
    ("etp", "Expert tensor parallel"),
    ("dp", "Data parallel"),
    ("world_size", "Ranks"),
    ("backend", "Backend"),
    ("precision", "Precision"),
    ("recompute", "Recompute"),
    ("seq_len", "Sequence length"),
    ("global_batch_size", "Global batch"),
    ("batch_unit", "Batch counted in"),
    ("micro_batch_size", "Packed sequences a microbatch"),
    ("lr", "Learning rate"),
    ("min_lr", "Lowest learning rate"),
    ("schedule", "Schedule"),
    ("warmup_steps", "Warm-up steps"),
    ("weight_decay", "Weight decay"),
    ("clip_grad", "Gradient clipping"),
    ("seed", "Seed"),
)


def write_report(
    run_dir: str | Path,
    *,
    sample: Sequence[tuple[str, bool]] | None = None,
    fill: Sequence[float] | None = None,
    title: str | None = None,
    keep_sample: bool = False,
) -> Path:
    """Write `RUN/report.html` and return its path.

    `sample` is one document as (token's text, whether it bears loss), and `keep_sample` keeps the one that the page
    shows already; `fill` says how full each packed sequence was, as fractions of 1, and is computed per step from the
    metrics where it is not given; `title` defaults to the folder's name. Raises `ValueError` where the run has no
    `metrics.jsonl` or nothing stands in it.
    """
    run = RunFolder(run_dir)
    metrics = read_metrics(run.metrics)
    if not metrics:
        raise ValueError(f"{run.metrics} holds no steps: there is nothing to report yet")
    config_text = run.config.read_text(encoding="utf-8") if run.config.exists() else ""
    shares, unit = (list(fill), "packed sequence") if fill else (_fill_per_step(metrics), "step")
    name = title or run.path.resolve().name
    body = [
        _header(name, metrics, run.why_unfinished()),
        _tiles(metrics),
        '<div class="cards">',
        *_charts(metrics),
        sources_card(metrics),
        held_out_card(metrics),
        evaluation_card(run.evaluation),
        _fill_card(shares, unit),
        _counts_card(metrics),
        experts_card(metrics),
        _facts_card(config_text) if config_text else "",
        SAMPLE.join(["", _sample_card(sample) if sample else _shown_sample(run.report) if keep_sample else "", ""]),
        "</div>",
    ]
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)} - training report</title><style>\n{style}</style></head>\n"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )
    replace_text(run.report, page)
    return run.report


def _median(values: list[float]) -> float:
    """The middle value: one slow step (a save, a first compilation) does not move it."""
    return sorted(values)[len(values) // 2]


def _fill_per_step(metrics: Metrics) -> list[float]:
    """The share of each step's packed sequences that documents fill; without it, of the model's tokens."""
    if "bin_fill" in metrics[0]:
        return [line["bin_fill"] for line in metrics if line.get("bin_fill") is not None]
    pairs = [(line["tokens"] or 0, line["padding_tokens"] or 0) for line in metrics]
    return [tokens / (tokens + padding) for tokens, padding in pairs if tokens + padding]


def _filled(metrics: Metrics) -> float:
    """The share of all packed sequences that documents fill; without it, of the model's tokens."""
    tokens, padding = total(metrics, "tokens"), total(metrics, "padding_tokens")
    room = [line["tokens"] / line["bin_fill"] for line in metrics if line.get("bin_fill")]
    return tokens / max(1, sum(room) if room else tokens + padding)


def _header(name: str, metrics: Metrics, stopped: str) -> str:
    """The page's title and one line that says how far the run came, and why no farther."""
    first, last = metrics[0]["step"], metrics[-1]["step"]
    steps = f"steps {first:,} to {last:,}" if first != last else f"step {last:,}"
    note = f"Training report, {steps}, {clock(total(metrics, 'seconds'))} in steps" + (
        f"; {stopped}" if stopped else ""
    )
    return f'<header><h1>{escape(name)}</h1><p class="sub">{escape(note)}</p></header>'


def _tiles(metrics: Metrics) -> str:
    """The run's key figures."""
    tokens = total(metrics, "tokens")
    rates = [line["tokens_per_second"] for line in metrics if line.get("tokens_per_second") is not None]
    loss, valid, mfu = (last_value(metrics, field) for field in ("loss", "valid_loss", "mfu"))
    tiles = [("loss at the end", "not finite" if loss is None else f"{loss:.4f}")]
    if valid is not None:
        tiles.append(("held-out loss", f"{valid:.4f}"))
    tiles.append(("tokens trained on", number(tokens)))
    tiles.append(("of them supervised", f"{total(metrics, 'supervised_tokens') / max(1, tokens):.1%}"))
    tiles.append(("tokens/s, median step", number(_median(rates)) if rates else "unknown"))
    tiles.append(("of packed sequences filled", f"{_filled(metrics):.2%}"))
    if mfu is not None:
        tiles.append(("model FLOPs utilisation", f"{mfu:.1%}"))
    drawn = (f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for label, value in tiles)
    return f'<div class="tiles">{"".join(drawn)}</div>'


def _charts(metrics: Metrics) -> Iterator[str]:
    """The four curves of the run."""
    losses = [field_curve(metrics, "loss", "training loss", BLUE)]
    valid = held_out_curve(metrics, "held-out loss", ORANGE)
    losses += [valid] if valid.points else []
    rates = [
        field_curve(metrics, "tokens_per_second", "all tokens", TEAL),
        field_curve(metrics, "supervised_tokens_per_second", "supervised tokens", ORANGE),
    ]
    yield card("Loss", key(losses) + " &middot; mean over supervised tokens", line_chart(losses, label="Loss"))
    norm = [field_curve(metrics, "grad_norm", "gradient norm", ROSE)]
    yield card("Gradient norm", key(norm) + " &middot; before clipping", line_chart(norm, label="Gradient norm"))
    lr = [field_curve(metrics, "lr", "learning rate", VIOLET)]
    yield card("Learning rate", key(lr), line_chart(lr, label="Learning rate"))
    yield card("Throughput", key(rates) + " &middot; a second", line_chart(rates, label="Throughput"))


def _fill_card(shares: list[float], unit: str) -> str:
    """How full the packed sequences were, as a histogram."""
    if not shares:
        return card("How full the packed sequences are", "", '<p class="nothing">No tokens were recorded.</p>')
    mean = sum(shares) / len(shares)
    units = f"{unit}s" if len(shares) > 1 else unit
    note = f"{len(shares):,} {units}: mean {mean:.2%}, least {min(shares):.2%} filled with tokens"
    drawn = histogram(
        shares, label="Fill of the packed sequences", colour=TEAL, x_label=f"percent filled, count of {unit}s"
    )
    return card("How full the packed sequences are", note, drawn)


def _counts_card(metrics: Metrics) -> str:
    """Where every token went: nothing that came in is unaccounted for."""
    tokens, supervised = total(metrics, "tokens"), total(metrics, "supervised_tokens")
    padding = total(metrics, "padding_tokens")
    slots = max(1, tokens + padding)
    parts = [
        ("supervised", supervised, BLUE, "bear loss"),
        ("masked", tokens - supervised, "#9fb4e8", "context without loss"),
        ("padding", padding, "#d4d9e2", "fill documents and sequences"),
    ]
    bar = "".join(
        f'<i title="{name}: {count:,.0f}" style="width:{100 * count / slots:.3f}%;background:{colour}"></i>'
        for name, count, colour, _ in parts
    )
    rows = "".join(
        f'<div><dt><i style="background:{colour}"></i>{name}, {what}</dt>'
        f"<dd>{count:,.0f} &middot; {count / slots:.2%}</dd></div>"
        for name, count, colour, what in parts
    )
    drawn = f'<div class="bar">{bar}</div><dl class="keys">{rows}</dl>'
    return card("Where the tokens went", f"{slots:,.0f} token slots in all", drawn)


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a nested mapping with their dotted names."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, tree


def _facts_card(config_text: str) -> str:
    """The run's chief options, and all of them behind a fold."""
    try:
        leaves = dict(_leaves(yaml.safe_load(config_text)))
    except yaml.YAMLError:
        leaves = {}
    rows = []
    for wanted, label in FACTS:
        found = sorted((name for name in leaves if name.split(".")[-1] == wanted), key=lambda name: name.count("."))
        value = leaves[found[0]] if found else None
        if value is not None:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            rows.append(f"<div><dt>{label}</dt><dd>{escape(text)}</dd></div>")
    every = f"<details><summary>Every option</summary><pre>{escape(config_text.rstrip())}</pre></details>"
    return card("The run", "From config.yaml", f"<dl>{''.join(rows)}</dl>{every}", wide=True)


def _shown_sample(report: Path) -> str:
    """The card of the sample in a page that was written before."""
    parts = report.read_text(encoding="utf-8").split(SAMPLE) if report.exists() else []
    return parts[1] if len(parts) == 3 else ""


def _sample_card(sample: Sequence[tuple[str, bool]]) -> str:
    """One document, token by token, coloured by whether it bears loss."""
    supervised = sum(on for _, on in sample)
    note = f"{len(sample):,} tokens, {supervised:,} of them supervised"
    if len(sample) > MOST_TOKENS:
        note += f"; the first {MOST_TOKENS:,} are shown"
    tokens = []
    for index, (text, on) in enumerate(sample[:MOST_TOKENS]):
        # A line break is shown and also made, so that the page reads as the document does.
        shown = escape(text).replace("\n", "&crarr;\n").replace("\t", "&rarr;\t") or "&empty;"
        kind = ' class="on"' if on else ""
        tokens.append(f'<span{kind} title="token {index}: {"supervised" if on else "masked"}">{shown}</span>')
    meanings = (
        (TRAINED, "supervised: the model learns to write it"),
        (MASKED, "masked: read as context, no loss"),
    )
    keys = "".join(f'<span><i style="background:{colour}"></i>{text}</span>' for colour, text in meanings)
    legend = f'<div class="keys">{keys}</div>'
    drawn = f'{legend}<div class="sample">{"".join(tokens)}</div>'
    return card("One sample and its loss mask", note, drawn, wide=True)
