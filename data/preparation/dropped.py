"""DATA/dropped.jsonl: the rows that could not be used, found by the reason, and shown in a few lines."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.preparation.report_parts import clipped
from data.preparation.samples import CONTROLS

ROW_CHARACTERS = 600  # of a row that is shown


def find_dropped(directory: Path, reasons: Iterable[str], each: int = 1) -> dict[str, list[dict[str, Any]]]:
    """The first `each` dropped rows of every reason; the file is read no farther than they need, a line at a time."""
    found: dict[str, list[dict[str, Any]]] = {reason: [] for reason in reasons}
    # As it stands in a line: most lines are of reasons that are found already, and need not be parsed.
    missing = {f'"reason": {json.dumps(reason)}': reason for reason in found}
    file = directory / "dropped.jsonl"
    if not file.is_file():
        return found
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            if not missing:
                break
            if not any(mark in line for mark in missing):
                continue
            drop = json.loads(line)
            if drop["reason"] in found and len(found[drop["reason"]]) < each:
                found[drop["reason"]].append(drop)
            missing = {mark: reason for mark, reason in missing.items() if len(found[reason]) < each}
    return found


def place_of(drop: dict[str, Any]) -> str:
    """Where a dropped row stands, and what is wrong with it."""
    place = f"{drop['source']}:{drop['line']}"
    return printable(f"{place}: {drop['detail']}" if drop.get("detail") else place)


def row_text(row: Any, most: int | None = ROW_CHARACTERS) -> str:
    """A dropped row as JSON, or its line as it stands where it is none; clipped after `most` characters."""
    text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, indent=1)
    return printable(text if most is None else clipped(text, most))


def printable(text: str) -> str:
    """A text without what would steer a terminal, and without halves of surrogate pairs, which no file can hold."""
    return text.translate(CONTROLS).encode("utf-8", "backslashreplace").decode()
