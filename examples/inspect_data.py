"""Shows documents of prepared data; supervised tokens stand on green, or in [[ ]] where there is no colour.

python examples/inspect_data.py DATA [--row 17 ...] [--source NAME] [--kind NAME] [--random N] [--dropped [REASON]]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from examples.flags import exit_status

if TYPE_CHECKING:
    from rich.console import Console

    from data.documents import Documents

SHOWN = 3  # documents, where it is not said which or how many


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Without other flags: what DATA holds, and three documents of it."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """A data directory, or PREFIX of megatron-core's PREFIX.bin and PREFIX.idx."""
    row: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = ()
    """Show these documents, by their numbers in DATA, which count from 0."""
    source: str | None = None
    """Show documents of this source."""
    kind: str | None = None
    """Show documents made of rows of this kind."""
    random: int | None = None
    """Show this many documents (3 unless given), drawn by --seed."""
    seed: int = 0
    """Chooses which documents are drawn."""
    dropped: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="[REASON]")] = None
    """Show dropped rows instead: one for each reason, or several (--random, 3 unless given) for this one."""
    full: bool = False
    """Show long documents and rows whole, instead of leaving out their middle."""
    tokenizer: str | None = None
    """Directory or hub name of the tokenizer for a PREFIX; without one, ids are shown."""
    report: bool = False
    """Only write DATA/data_report.html, as prepare_data.py did."""


def inspect_data(options: InspectOptions, console: Console) -> None:
    """Prints what the options ask for. Raises ValueError for what the user can mend."""
    from data.index import open_index
    from data.preparation.samples import print_document, title_of

    chosen = [flag for flag in ("source", "kind", "random") if getattr(options, flag) is not None]
    if options.row and chosen:
        raise ValueError(f"--row names documents by itself: leave --{chosen[0]} out")
    if options.random is not None and options.random < 1:
        raise ValueError(f"--random {options.random}: give how many documents to show, at least 1")
    index = open_index(options.data)
    if options.dropped is not None:
        print_dropped(index, " ".join(options.dropped), options, console)
        return
    tokenizer = load_tokenizer(index, options.tokenizer)
    if options.report:
        console.print(write_report(index, tokenizer), soft_wrap=True, markup=False, highlight=False)
        return
    documents = options.row or chosen_documents(index, options)
    for document in documents:
        check_document(index, document, tokenizer, options)
    if not options.row and not chosen:
        print_summary(index, console)
    for document in documents:
        tokens, spans = index.tokens(document), index.spans(document)
        print_document(console, tokenizer, tokens, spans, title_of(index, document), full=options.full)
        console.print()


def load_tokenizer(index: Documents, name: str | None) -> Any:
    """--tokenizer, or the one in the data directory; None where there is neither."""
    from data.preparation.samples import saved_tokenizer

    if name is None:
        return saved_tokenizer(index.path / "tokenizer")
    if (tokenizer := saved_tokenizer(Path(name))) is not None:
        return tokenizer
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False).backend_tokenizer
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"--tokenizer {name}: no tokenizer could be loaded ({type(error).__name__})") from None


def write_report(index: Documents, tokenizer: Any) -> str:
    """Writes the page of a data directory again and returns its path."""
    from data.index import DocumentIndex
    from data.preparation.data_report import write_data_report

    if not isinstance(index, DocumentIndex):
        raise ValueError(f"--report: {index.path} is no data directory that a report could be written into")
    return str(write_data_report(index.path, tokenizer))


def chosen_documents(index: Documents, options: InspectOptions) -> list[int]:
    """Documents drawn among those of the source and the kind, in their order; ValueError where there are none."""
    import numpy as np

    from data.order import permutation

    fits = np.ones(len(index), dtype=bool)
    asked = []
    for flag, wanted, names, numbers in (
        ("--source", options.source, index.source_names, index.sources),
        ("--kind", options.kind, index.kinds, index.kind_numbers),
    ):
        if wanted is None:
            continue
        asked.append(f"{flag} {wanted}")
        if wanted not in names:
            raise ValueError(f"{flag} {wanted}: {index.path} has the {flag[2:]}s {', '.join(names)}")
        fits &= numbers == names.index(wanted)
    found = np.flatnonzero(fits)
    if not len(found):
        raise ValueError(f"{' '.join(asked)}: {index.path} has no such document")
    return sorted(found[permutation(len(found), options.seed)[: options.random or SHOWN]].tolist())


def check_document(index: Documents, document: int, tokenizer: Any, options: InspectOptions) -> None:
    """Refuses a document that is not there, and one whose tokens the chosen tokenizer does not have."""
    if not 0 <= document < len(index):
        raise ValueError(f"--row {document}: {index.path} has {len(index):,} documents, 0 to {len(index) - 1}")
    largest = int(index.tokens(document).max())
    if options.tokenizer is not None and tokenizer.id_to_token(largest) is None:
        raise ValueError(
            f"--tokenizer {options.tokenizer} has no token {largest}, which document {document} holds: give the"
            " tokenizer that the data was made with"
        )


def print_dropped(index: Documents, reason: str, options: InspectOptions, console: Console) -> None:
    """Prints a dropped row for every reason, or several for the reason that was asked for."""
    from rich.text import Text

    from data.preparation.dropped import ROW_CHARACTERS, find_dropped, place_of, printable, row_text

    dropped = index.meta.get("dropped", {})
    if reason and reason not in dropped:
        raise ValueError(f"--dropped {reason}: {index.path} has the reasons {', '.join(dropped) or '(none)'}")
    if not dropped:
        console.print("no row was dropped")
        return
    reasons = [reason] if reason else sorted(dropped, key=lambda one: (-dropped[one]["count"], one))
    examples = find_dropped(index.path, reasons, (options.random or SHOWN) if reason else 1)
    for one in reasons:
        text = Text().append(f"{one}: {dropped[one]['count']:,} of {index.meta['rows']:,} rows\n", "bold")
        for drop in examples[one]:
            text.append(f"{place_of(drop)}\n", "dim")
            text.append(row_text(drop.get("row"), None if options.full else ROW_CHARACTERS) + "\n")
        if not examples[one]:
            text.append(printable(f"first {dropped[one].get('first', '')}\n"), "dim")
        console.print(text, soft_wrap=True)


def print_summary(index: Documents, console: Console) -> None:
    """Prints what became of the rows, and a table of the sources and of the kinds of rows."""
    from rich.table import Table
    from rich.text import Text

    from data.preparation.measures import read_contents
    from data.preparation.report_parts import percent

    contents = read_contents(index)
    names = [name for name in ("held_out", "not_taken", "filtered") if contents.count(name)]
    counts = [f"{contents.count(name):,} {name.replace('_', ' ')}" for name in names]
    line = ", ".join([f"{len(index):,} documents", *counts, f"{contents.drops:,} dropped"])
    console.print(f"{index.path}: {contents.rows:,} rows, {line}", soft_wrap=True, markup=False, highlight=False)
    sources = [*contents.sources, contents.all] if len(contents.sources) > 1 else contents.sources
    for heading, groups in (("source", sources), ("kind", contents.kinds)):
        table = Table(heading, "documents", "tokens", "supervised", "mean", "longest")
        for column in table.columns[1:]:
            column.justify = "right"
        for group in groups:
            share = percent(group.supervised_tokens, group.tokens)
            mean = group.tokens / max(1, group.documents)
            numbers = (f"{group.documents:,}", f"{group.tokens:,}", share, f"{mean:,.1f}", f"{group.longest:,}")
            table.add_row(Text(group.name), *numbers)
        console.print(table)


def main(arguments: list[str]) -> int:
    """Reads the command line and shows; returns the exit status. A user's mistake is one sentence."""

    def show() -> None:
        options = tyro.cli(InspectOptions, args=arguments, description=__doc__)
        from rich.console import Console

        inspect_data(options, Console())

    return exit_status(show)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
