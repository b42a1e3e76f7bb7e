"""The model card: README.md with the hub's block of metadata, written from what a model says of how it was made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from checkpoint_tools.fingerprint import content, weights_fingerprint
from data.checksums import text_sum
from engine.checkpointing.provenance import hub_name, version

RESULTS = "results.json"
_ENDING = "<!-- written by Lathe, checksum "  # and the checksum of all above: whether somebody has edited the card
_OF_RESULTS = ("data", "dataset_name", "questions", "scores", "temperature", "num_samples", "max_new_tokens")
_COUNTS = {
    "rows": "rows read",
    "filtered": "left out by a condition",
    "held_out": "held out",
    "not_taken": "not taken",
    "documents": "documents",
    "tokens": "tokens",
    "supervised_tokens": "supervised tokens",
}


def model_card(
    name: str,
    made_of: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]] = (),
    *,
    license: str = "unknown",
    base_model: str | None = None,
) -> str:
    """The text of a model's README.md.

    made_of: what its provenance.json says, or nothing; results: what results.json of its evaluations say; base_model:
    a hub name, where the provenance has none.
    """
    base = made_of.get("base_model") or {}
    base_model = base_model or (base.get("name") if base.get("hub") else None)
    data = ModelCardData(
        base_model=base_model,
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["lathe", "sft"],
        datasets=sorted(set(_datasets(made_of))) or None,
        model_name=name,
        eval_results=[one for result in results for one in _eval_results(result)] or None,
    )
    link = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else _plain(base.get("name") or "")
    of = f" of {link}" if link else ""
    blocks = [f"# {name}", f"A finetune{of}, made with Lathe {made_of.get('lathe', version())}."]
    blocks += _evaluation(results) + (_round(made_of, "##") if made_of else ["How it was trained is not recorded."])
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(blocks) + "\n\n"
    return f"{text}{_ENDING}{text_sum(text)} -->\n"


def is_untouched(card: str) -> bool:
    """Whether a card is one that Lathe has written, and nobody has edited since."""
    text, ending, rest = card.rpartition(_ENDING)
    return bool(ending) and rest == f"{text_sum(text)} -->\n"


def read_results(paths: Sequence[Path], model: Path) -> list[dict[str, Any]]:
    """The results of a model's weights in folders: an evaluation's output, or RUN/evaluation with those of many.

    What the same model was asked twice stands there once. ValueError for a folder that has none.
    """
    own: list[dict[str, Any]] = []
    fingerprint = weights_fingerprint(str(model)) if paths else ""
    for path in paths:
        found = _readable(path)
        of_model = [one for one in found if one["made_of"]["model"].endswith(f" [{fingerprint}]")]
        if not of_model:
            of = found[0]["made_of"]["model"]
            raise ValueError(
                f"--evaluation {path} has results of other weights, {of}: evaluate {model}, or leave it out"
            )
        for one in of_model:
            if not any(content(one["made_of"]) == content(other["made_of"]) for other in own):
                own.append(one)
    return own


def _readable(path: Path) -> list[dict[str, Any]]:
    """All results in a folder; prints how many cannot be read, which is an error where none can."""
    files = [file for depth in ("", "*/", "*/*/") for file in sorted(path.glob(depth + RESULTS))]
    files = [file for file in files if not any(part.startswith("earlier.") for part in file.relative_to(path).parts)]
    if not files:
        raise ValueError(f"--evaluation {path} holds no {RESULTS}: give the --output of lathe evaluate")
    read = [(file, _results(file)) for file in files]
    found, bad = [one for _, one in read if one], [file for file, one in read if not one]
    if not found:
        raise ValueError(f"--evaluation {bad[0]} is not what lathe evaluate writes")
    if bad:
        print(f"not read, as they are damaged or of an older version: {bad[0]} ({len(bad)} in all)")
    return found


def _results(file: Path) -> dict[str, Any] | None:
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        if all(name in results for name in _OF_RESULTS) and isinstance(results["made_of"]["model"], str):
            return results
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _datasets(made_of: Mapping[str, Any]) -> Iterator[str]:
    """The hub names of all data, also those of earlier rounds."""
    for data in made_of.get("data", []):
        yield from (source["hub"] for source in data["sources"] if source["hub"])
    if "earlier" in made_of:
        yield from _datasets(made_of["earlier"])


def _eval_results(result: Mapping[str, Any]) -> Iterator[EvalResult]:
    for metric, value in result["scores"].items():
        yield EvalResult(
            task_type="text-generation",
            dataset_type=hub_name(result["data"]) or result["dataset_name"],
            dataset_name=result["dataset_name"],
            metric_type=metric,
            metric_value=round(value, 4),
        )


def _evaluation(results: Sequence[Mapping[str, Any]]) -> list[str]:
    if not results:
        return []
    rows = [
        (result["dataset_name"], f"{result['questions']:,}", metric, f"{value:.4f}", _sampling(result))
        for result in results
        for metric, value in result["scores"].items()
    ]
    return ["## Evaluation", _table(("data", "questions", "metric", "score", "answers"), rows)]


def _sampling(result: Mapping[str, Any]) -> str:
    how = f"at temperature {result['temperature']:g}" if result["temperature"] else "the likeliest token each time"
    return f"{result['num_samples']} a question, {how}, at most {result['max_new_tokens']:,} tokens"


def _round(made_of: Mapping[str, Any], level: str) -> list[str]:
    """The blocks of one round of training, and those of the rounds before it."""
    blocks = [f"{level} Training", _which_weights(made_of.get("steps", []))]
    if rows := list(_course(made_of.get("course", {}))):
        blocks.append(_table(("of the run", "value"), rows))
    if data := [block for one in made_of.get("data", []) for block in _data(one)]:
        blocks += [f"{level} Data", *data]
    if rows := list(_settings(made_of.get("settings", {}))):
        blocks += [f"{level} Recipe", _table(("setting", "value"), rows)]
    if "earlier" in made_of:
        blocks += [f"{level} The round before", "The run began with weights that had been trained before."]
        blocks += _round(made_of["earlier"], f"{level}#")
    return blocks


def _which_weights(steps: Sequence[int]) -> str:
    names = ", ".join(f"{step:,}" for step in steps)
    if len(steps) > 1:
        return (
            f"These weights are the mean of those after steps {names} of one run: from fp32 master weights where there "
            "are any, summed in fp64 and rounded once. The losses below are those of the run, not of the mean."
        )
    return f"These are the weights after step {names}." if steps else "Which step they are of is not recorded."


def _course(course: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("steps", "skipped_steps", "tokens", "supervised_tokens"):
        if course.get(name) is not None and (name != "skipped_steps" or course[name]):
            yield name.replace("_", " "), f"{course[name]:,}"
    for name, at in (("first_loss", None), ("last_loss", None), ("valid_loss", "valid_step")):
        if course.get(name) is not None:
            label = name.replace("_", " ").replace("valid", "held-out")
            yield label, f"{course[name]:.4f}" + (f", after step {course[at]:,}" if at else "")
    if course.get("best_valid_loss") is not None:
        yield "best held-out loss", f"{course['best_valid_loss']:.4f}, after step {course['best_valid_step']:,}"


def _data(data: Mapping[str, Any]) -> Iterator[str]:
    """A directory of prepared data: its counts, those of its sources, and why rows were dropped."""
    weight = f", taken {data['weight']:g} times an epoch" if data.get("weight", 1) != 1 else ""
    if "documents" not in data:
        yield f"{_plain(data['name'])}{weight}; its counts are not recorded."
        return
    columns = {key: label for key, label in _COUNTS.items() if any(one.get(key) for one in (data, *data["sources"]))}
    parts = [(one["hub"] or one["name"], one) for one in data["sources"]]
    whole = [(f"{data['name']}{weight}", data)] if len(parts) != 1 or weight else []
    rows = [(name, *(f"{one[key]:,}" if key in one else "" for key in columns)) for name, one in parts + whole]
    yield _table(("source", *columns.values()), rows)
    if dropped := data.get("dropped"):
        reasons = "; ".join(f"{count:,} x {_plain(reason)}" for reason, count in dropped.items())
        yield f"Of {data.get('rows', 0):,} rows {sum(dropped.values()):,} were dropped: {reasons}."
    for role, text in (turn for prompt in data.get("prompts", []) for turn in prompt.items()):
        yield f"The {role} turn around a question:"
        yield "\n".join(f"    {line}" for line in text.splitlines()) or "    (empty)"


def _settings(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The settings of a run by name; of the optional sections those that are set."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            for key, one in value.items():
                if one is not None and (one or name == "optim") and key != "dispatcher":
                    yield f"{name}.{key}", str(one)
        elif name != "fp8" or settings.get("precision") == "fp8":
            yield name, str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(map(_plain, line)) + " |" for line in [head, ["---"] * len(head), *rows])


def _plain(text: str) -> str:
    """A text that stands in one cell of a table and opens no tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
