"""Small sources, and ways to prepare and to read them back, for tests of prepare_data."""

import io
import json
import os
import sys
from pathlib import Path

from rich.console import Console

import data.preparation.workers
from data.index import DocumentIndex
from data.preparation.options import PrepareOptions
from data.preparation.prepare import prepare
from data.preparation.sources import Source
from tests.support.chatting import small_tokenizer

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
SCRIPT = [sys.executable, str(ROOT / "examples" / "prepare_data.py")]


def rows(count: int) -> list[dict]:
    return [
        {"question": f"How many is {i}?", "answer": f"The answer is {i * i}. " + "so " * (i % 5)} for i in range(count)
    ]


def jsonl(path: Path, lines: list) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def run(model: Path, output: Path | None, *sources: Path | str | Source, **options) -> tuple[dict, str]:
    """The meta and what was printed."""
    printed = io.StringIO()
    options = {"num_workers": 2, "model": str(model), **options}
    named = tuple(source if isinstance(source, Source) else str(source) for source in sources)
    chosen = PrepareOptions(sources=named, output=output, **options)
    return prepare(chosen, Console(file=printed, width=200)), printed.getvalue()


def prepare_in_process(patch) -> None:
    """Makes preparing quick for many small cases: no processes, one tokenizer, no report of the data."""

    def make_parts(job, *_):
        patch.setattr(data.preparation.workers, "_job", job)
        for number in range(len(job.chunks)):
            data.preparation.workers._make_part(number)

    patch.setattr("data.preparation.prepare.make_parts", make_parts)
    patch.setattr("data.preparation.prepare.load_tokenizer", lambda *_, **__: small_tokenizer())
    patch.setattr("data.preparation.prepare.write_data_report", lambda *_: None)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def texts(folder: Path) -> list[list[str]]:
    """The supervised texts of every document."""
    index, tokenizer = DocumentIndex(folder), small_tokenizer()
    return [
        [tokenizer.decode(index.tokens(number)[first:stop]) for first, stop in index.spans(number)]
        for number in range(len(index))
    ]


def answers(some: list[dict]) -> list[list[str]]:
    return [[row["answer"] + "<|im_end|>"] for row in some]


def dropped(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "dropped.jsonl").read_text(encoding="utf-8").splitlines()]
