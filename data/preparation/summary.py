"""What preparing prints at its end: the account by source, why rows were dropped, and what deserves a look."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_ALWAYS = ("rows", "dropped", "documents", "tokens", "supervised_tokens")  # the others only where there are any
_COLUMNS = ("rows", "filtered", "dropped", "cut", "not_taken", "held_out", "repeated", *_ALWAYS[2:])
_FILES = 20  # of a source that are named
_NOTES = {
    "open_turns": "assistant turns end with no end token or text in this template",
    "rewritten_turns": "assistant turns were changed by the template (such as earlier thinking left out)",
    "straddling_tokens": "supervised tokens hold characters on both sides of a turn's boundary",
    "untrained_turns": "assistant turns are not trained, as their rows say",
    "stripped_turns": "assistant turns are not trained, because the template leaves out their thinking"
    " (--stripped-thinking trains them)",
    "masked_tool_outputs": "outputs of executed code inside assistant turns are not trained",
}


def print_summary(meta: dict[str, Any], output: Path, console: Console) -> None:
    """Prints the counts, every reason for which rows were dropped, and what deserves a look."""

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    sources = [source | {"dropped": sum(source["dropped"].values())} for source in meta["sources"]]
    dropped = sum(drop["count"] for drop in meta["dropped"].values())
    everything = meta | {"dropped": dropped, "name": "all"}
    if len(sources) > 1:
        names = [name for name in _COLUMNS if name in _ALWAYS or everything[name]]
        by_source = Table(title="sources")
        for name in ("", *names):
            by_source.add_column(name.replace("_", " "), justify="right" if name else "left", overflow="fold")
        for source in (*sources, everything):
            by_source.add_row(source["name"], *(f"{source[name]:,}" for name in names))
        console.print(by_source)
    table = Table(title=str(output), show_header=False)
    for name in (*_COLUMNS, "longest"):
        if name in (*_ALWAYS, "held_out", "longest") or everything[name]:
            table.add_row(name.replace("_", " "), f"{everything[name]:,}")
    console.print(table)
    for source in sources:
        _say_files(source, say)
    for reason, drop in meta["dropped"].items():
        say(f"dropped {drop['count']:,}: {reason}, first {drop['first']}")
    if dropped:
        say(f"the dropped rows are listed in {output / 'dropped.jsonl'}")
    for file in meta["decontaminated"]:
        short = f" ({file['too_short']:,} of them too short to compare)" if file["too_short"] else ""
        say(f"{file['file']}: {file['rows']:,} rows overlap one of {file['questions']:,} test questions{short}")
    if not meta["end_token_ids"]:
        say("warning: no token of its own ends a turn in this template: generation will not stop")
    for name, note in _NOTES.items():
        if meta[name]:
            say(f"note: {meta[name]:,} {note}")
    for note in meta["notes"]:
        say(f"note: {note}")


def _say_files(source: dict[str, Any], say) -> None:
    """How many rows each file of a source had, where there are several, and the columns that were not used."""
    files = source["files"]
    if len(files) > 1:
        for file in files[:_FILES]:
            say(f"{source['name']}: {file['rows']:,} rows of {file['name']}")
        if more := files[_FILES:]:
            say(f"{source['name']}: {sum(file['rows'] for file in more):,} rows of {len(more):,} more files")
    if source["unused_columns"]:
        say(f"{source['name']}: columns not used: {', '.join(source['unused_columns'])}")
    if source["rows"] and not source["documents"] and not source["held_out"]:
        say(f"warning: no document of {source['name']} is left")
