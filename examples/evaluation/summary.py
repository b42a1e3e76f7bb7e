"""All results in RUN/evaluation beside each other: `summary.json`, and which step is best by them."""

import fcntl
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from engine.reporting.report import write_report
from engine.reporting.report_evaluation import FILE as SUMMARY
from engine.run_folder import RunFolder, read_object, replace_text
from examples.evaluation.options import folder_name
from examples.evaluation.run import RESULTS
from examples.made_of import differences


def show_in_run(output: Path) -> None:
    """Adds results to the summary and the report of the run in whose `evaluation` they lie; nothing elsewhere."""
    output = output.absolute()
    runs = [RunFolder(folder) for folder in output.parents]
    run = next((run for run in runs if run.evaluation in (output, *output.parents) and run.config.exists()), None)
    if run is not None:
        write_summary(run)


def write_summary(run: RunFolder, watched: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Writes the summary, see `summarise`, and the run's report with it; returns the summary."""
    with _alone(run):
        summary = summarise(run, watched)
        failed = any(one["failed"] for one in summary["watched"].values())
        if run.metrics.exists() and (summary["results"] or failed):
            try:
                write_report(run.path, keep_sample=True)
            except (OSError, ValueError, KeyError) as error:  # the results are worth more than the page
                print(f"report.html could not be written: {error}", file=sys.stderr, flush=True)
    return summary


def summarise(run: RunFolder, watched: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write `RUN/evaluation/summary.json` and return what it holds.

    `results`: one entry for each MODEL/NAME/results.json, and for a results.json of one model in `evaluation` itself
    or a folder of it; steps first, by step and name. `best`: by name, the step with the highest pass@1, of equal ones
    the earlier. Averages and other models are no steps. Only results that were asked as the newest step of their name
    are compared; `comparable` says so of each. `watched`: by name, in which `state` the watching is, and of the models
    that `failed` why they have no results. Names that are not given here keep what another process wrote of them.
    """
    paths = [path for depth in ("", "*/", "*/*/") for path in run.evaluation.glob(depth + RESULTS)]
    found = [entry for path in paths if (entry := _entry(run, path)) is not None]
    newest: dict[str, dict[str, Any]] = {}
    for entry in sorted(found, key=lambda entry: (entry["step"] is not None, entry["graded"])):
        newest[entry["name"]] = entry
    for entry in found:
        entry["comparable"] = not differences(_asked(entry), _asked(newest[entry["name"]]))
    found.sort(key=lambda entry: (entry["step"] is None, entry["step"], entry["model"], entry["name"]))
    best: dict[str, dict[str, Any]] = {}
    for entry in found:
        if entry["comparable"] and entry["step"] is not None:
            before = best.get(entry["name"])
            if before is None or entry["score"] > before["score"]:
                best[entry["name"]] = {key: entry[key] for key in ("step", "model", "score")}
    others = read_object(run.evaluation / SUMMARY).get("watched", {})
    summary = {"best": best, "results": found, "watched": {**others, **(watched or {})}}
    replace_text(run.evaluation / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return summary


def summary_text(summary: dict[str, Any]) -> str:
    """The summary as it is printed: a line for each result, and the best step of each name."""
    lines = []
    for entry in summary["results"]:
        scores = "  ".join(f"{name} {value:.4f}" for name, value in entry["scores"].items())
        remark = "" if entry["comparable"] else "  (asked otherwise than the newest: not compared)"
        lines.append(f"{entry['model']:<16} {entry['name']:<16} {scores}{remark}")
    lines += [
        f"{model:<16} {name:<16} could not be graded: {why}"
        for name, watched in summary["watched"].items()
        for model, why in watched["failed"].items()
    ]
    lines += [
        f"best step by pass@1 on {name}: {best['step']:,} ({best['score']:.4f})"
        for name, best in summary["best"].items()
    ]
    return "\n".join(lines)


def _entry(run: RunFolder, path: Path) -> dict[str, Any] | None:
    """What a summary says of one results.json; None for one that is no evaluation's, or was set aside."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if any(part.startswith("earlier.") for part in path.relative_to(run.evaluation).parts):
            return None
        name, model = path.parent.name, path.parents[1].name
        if run.evaluation in (path.parent, path.parents[1]):
            name, model = folder_name(results["dataset_name"]), results["model_name"]
        number = model.removeprefix("step_")
        return {
            "model": model,
            "step": int(number) if number != model and number.isdecimal() else None,
            "name": name,
            **{key: results[key] for key in ("dataset_name", "score", "scores", "questions", "num_samples", "made_of")},
            "results": path.relative_to(run.evaluation).as_posix(),
            "graded": path.stat().st_mtime,
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def _alone(run: RunFolder) -> Iterator[None]:
    """One process at a time, of those that grade under several names: none writes what it read before another wrote."""
    with (run.evaluation / "summary.lock").open("a") as file:
        with suppress(OSError):  # this file system has no locks
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _asked(entry: dict[str, Any]) -> dict[str, Any]:
    """What an evaluation was made of beside the model."""
    return {key: value for key, value in entry["made_of"].items() if key != "model"}
