"""The report's card about answers: scores of the exported steps, and what could not be graded.

Both are read off `RUN/evaluation/summary.json`.
"""

import json
from html import escape
from pathlib import Path
from typing import Any

from engine.reporting.charts import Curve, line_chart
from engine.reporting.report_parts import PALETTE, card, key

FILE = "summary.json"


def evaluation_card(folder: Path) -> str:
    """Scores by step, and all of them in a table; an empty string where nothing was tried or the file is damaged."""
    try:
        summary = json.loads((folder / FILE).read_text(encoding="utf-8"))
        # A run that went back to an earlier step has set aside what it knew of later ones.
        results = [entry for entry in summary["results"] if (folder / entry["results"]).exists()]
        there = {entry["model"] for entry in results}
        best = {name: at for name, at in summary["best"].items() if at["model"] in there}
        failed = [
            (f"{model}, {name}", why)
            for name, watched in summary.get("watched", {}).items()
            for model, why in watched["failed"].items()
        ]
        return _card(results, best, failed) if results or failed else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""


def _card(results: list[dict[str, Any]], best: dict[str, dict[str, Any]], failed: list[tuple[str, str]]) -> str:
    names = list(dict.fromkeys(entry["name"] for entry in results))
    curves = []
    for name, colour in zip(names, PALETTE, strict=False):
        of_name = [entry for entry in results if entry["name"] == name and entry["comparable"]]
        points = [(entry["step"], entry["score"]) for entry in of_name if entry["step"] is not None]
        curves.append(Curve(label=name, colour=colour, points=points, dots=True))
    drawn = line_chart(curves, label="Scores by step") if any(curve.points for curve in curves) else ""
    said = [f"{name}: step {at['step']:,} is best ({at['score']:.4f})" for name, at in best.items()]
    note = " &middot; ".join([key(curves), "pass@1 of the exported steps", *map(escape, said)]) if drawn else "pass@1"
    rows = "".join(f"<div><dt>{escape(_title(entry))}</dt><dd>{_scores(entry, best)}</dd></div>" for entry in results)
    rows += "".join(f"<div><dt>{escape(of)}</dt><dd>not graded: {escape(why)}</dd></div>" for of, why in failed)
    return card("Answers, graded", note, f"{drawn}<dl>{rows}</dl>")


def _title(entry: dict[str, Any]) -> str:
    return f"{entry['model']}, {entry['name']}"


def _scores(entry: dict[str, Any], best: dict[str, dict[str, Any]]) -> str:
    scores = " &middot; ".join(f"{escape(name)} {value:.4f}" for name, value in entry["scores"].items())
    is_best = best.get(entry["name"], {}).get("model") == entry["model"]
    remark = " &middot; best step" if is_best else "" if entry["comparable"] else " &middot; asked otherwise"
    return f"{scores} &middot; {entry['questions']:,} questions{remark}"
