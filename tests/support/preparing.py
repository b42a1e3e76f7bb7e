"""Small sources, and ways to prepare and to read them back, for tests of prepare_data."""

import io
import json
import os
import sys
from pathlib import Path

from rich.console import Console

from data.index import DocumentIndex
from data.preparation.prepare import PrepareOptions, prepare
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


def run(model: Path, output: Path, *sources: Path | str, **options) -> tuple[dict, str]:
    """The meta and what was printed."""
    printed = io.StringIO()
    options = {"num_workers": 2, "model": str(model), **options}
    chosen = PrepareOptions(sources=tuple(map(str, sources)), output=output, **options)
    return prepare(chosen, Console(file=printed, width=200)), printed.getvalue()


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
