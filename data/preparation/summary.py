"""What preparing prints at its end: the account by source, why rows were dropped, and what deserves a look."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data.audit import MAX_DROPPED, lost_rows, unsupervised
from data.preparation.columns import listing
from data.preparation.dropped import printable

_ALWAYS = ("rows", "dropped", "documents", "tokens", "supervised_tokens")  # the others only where there are any
_COLUMNS = ("rows", "filtered", "dropped", "cut", "not_taken", "held_out", "repeated", *_ALWAYS[2:])
_FILES = 20  # of a source that are named
NOTES = {
    "open_turns": "assistant turns end with no end token or text in this template",
    "rewritten_turns": "assistant turns were changed by the template (such as earlier thinking left out)",
    "straddling_tokens": "supervised tokens hold characters on both sides of a turn's boundary",
    "untrained_turns": "assistant turns are not trained, as their rows, the prompt's examples or --train-on say",
    "stripped_turns": "assistant turns are not trained, because the template leaves out their thinking"
    " (--stripped-thinking trains them)",
    "masked_tool_outputs": "outputs of executed code inside assistant turns are not trained",
}


def print_summary(meta: dict[str, Any], output: Path, console: Console) -> None:
    """Prints the counts, every reason for which rows were dropped, and what deserves a look."""
    sources = [source | {"dropped": sum(source["dropped"].values())} for source in meta["sources"]]
    everything = meta | {"dropped": sum(drop["count"] for drop in meta["dropped"].values())}
    table = Table(title=str(output), show_header=False)
    for name in (*_COLUMNS, "longest"):
        if name in (*_ALWAYS, "held_out", "longest") or everything[name]:
            table.add_row(name.replace("_", " "), f"{everything[name]:,}")
    console.print(table)
    lines = [line for source in sources for line in _of_source(source)] + _of_all(meta, output)
    for line in [*_by_source(sources), *lines]:
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def _by_source(sources: list[dict[str, Any]]) -> list[str]:
    """A table of several sources; plain lines, which may be wider than a terminal, where rich would cut the numbers."""
    names = [name for name in _COLUMNS if name in _ALWAYS or any(source[name] for source in sources)]
    rows = [["source", *(name.replace("_", " ") for name in names)]]
    rows += [[source["name"], *(f"{source[name]:,}" for name in names)] for source in sources]
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], widths)]) for row in rows]
    return lines if len(sources) > 1 else []


def _of_source(source: dict[str, Any]) -> list[str]:
    """How many rows each file had, where there are several, and the columns that were not used."""
    name, files, lines = source["name"], source["files"], []
    if len(files) > 1:
        lines += [f"{name}: {file['rows']:,} rows of {file['name']}" for file in files[:_FILES]]
        if more := files[_FILES:]:
            lines.append(f"{name}: {sum(file['rows'] for file in more):,} rows of {len(more):,} more files")
    if source["unused_columns"]:
        lines.append(f"{name}: columns not used: {listing(source['unused_columns'])}")
    if not source["documents"]:
        lines.append(f"warning: no document of {name} is left to train on")
    return lines


def _of_all(meta: dict[str, Any], output: Path) -> list[str]:
    lines = [f"dropped {drop['count']:,}: {why}, first {drop['first']}" for why, drop in meta["dropped"].items()]
    if lines:
        lines.append(f"the dropped rows are listed in {output / 'dropped.jsonl'}")
    lost = lost_rows(meta)
    if lost and lost.count > MAX_DROPPED * lost.rows:
        lines.append(f"warning: lost {lost}: training refuses this data unless --max-dropped allows it")
    for silent in unsupervised(meta):
        lines.append(f"warning: no token is supervised in {silent}: training refuses this without --allow-unsupervised")
    for file in meta["decontaminated"]:
        short = f" ({file['too_short']:,} of them too short to compare)" if file["too_short"] else ""
        lines.append(
            f"{file['file']}: {file['rows']:,} rows overlap one of {file['questions']:,} test questions{short}"
        )
    if not meta["end_token_ids"]:
        lines.append("warning: no token of its own ends a turn in this template: generation will not stop")
    lines += [f"note: {meta[name]:,} {note}" for name, note in NOTES.items() if meta[name]]
    return lines + [f"note: {note}" for note in meta["notes"]]
