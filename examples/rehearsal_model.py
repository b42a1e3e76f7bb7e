"""Makes a small Hugging Face model with random weights and a tokenizer trained on your rows, for rehearsals.

python examples/rehearsal_model.py --sources rows.jsonl --output MODEL [--vocab-size 4096 --hidden-size 256 ...]
"""

import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from data.preparation.conversation import RowError
from data.preparation.files import open_source
from data.preparation.formats import Fields, RowReader
from data.preparation.rows import JsonLines, Table, Unreadable
from examples.flags import exit_status


@dataclass(frozen=True, kw_only=True)
class RehearsalOptions:
    """Shape of the model; what is not given comes from the demo's model.json."""

    sources: tuple[str, ...]
    """Files, directories or hub names, as for prepare_data.py, whose conversations the tokenizer learns from."""
    output: Path
    """Hugging Face directory to make."""
    format: str = "auto"
    """The format of the rows, where it is not to be recognised."""
    fields: Fields = field(default_factory=Fields)
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    num_layers: int = 6
    num_heads: int = 8
    num_key_value_heads: int = 4
    max_position_embeddings: int = 4096
    seed: int = 0


def texts(files: list[JsonLines | Table], reader: RowReader, dropped: Counter[str]) -> Iterator[str]:
    """Yields the text of every usable row, and counts the others by their reasons."""
    for file in files:
        for start, stop in file.chunks(None)[0]:
            for _, row in file.read(start, stop):
                try:
                    if isinstance(row, Unreadable):
                        raise row.error
                    conversation = reader(row)
                except RowError as error:
                    dropped[error.reason] += 1
                    continue
                turns = (f"{turn['role']}\n{turn['content']}" for turn in conversation.messages)
                yield "\n".join(turns) if conversation.text is None else conversation.text


def make_model(options: RehearsalOptions) -> None:
    """Trains the tokenizer, draws the weights, writes the directory."""
    try:
        files = [file for source in options.sources for file in open_source(source)]
    except ValueError as error:
        raise ValueError(f"--sources {error}") from error
    dropped: Counter[str] = Counter()
    rows = texts(files, RowReader(format=options.format, fields=options.fields), dropped)
    first = next(rows, None)  # before the libraries that make models are loaded
    if first is None:
        reasons = ", ".join(f"{count:,} x {reason}" for reason, count in dropped.items())
        raise ValueError(
            f"--sources {' '.join(options.sources)}: no row can be used ({reasons or 'there are none'}):"
            " name their --format, or their columns with --fields.*"
        )
    from transformers import AutoModelForCausalLM

    from examples.demo.model import train_tokenizer, write_model

    fields = json.loads((Path(__file__).parent / "demo" / "model.json").read_text(encoding="utf-8"))
    tokenizer = train_tokenizer(itertools.chain([first], rows), options.vocab_size)
    for reason, count in dropped.items():
        print(f"left out: {count:,} x {reason}")
    fields |= {
        "vocab_size": options.vocab_size,
        "hidden_size": options.hidden_size,
        "intermediate_size": options.intermediate_size,
        "num_hidden_layers": options.num_layers,
        "num_attention_heads": options.num_heads,
        "num_key_value_heads": options.num_key_value_heads,
        "max_position_embeddings": options.max_position_embeddings,
    }
    write_model(options.output, fields, tokenizer, options.seed)
    model = AutoModelForCausalLM.from_pretrained(options.output, trust_remote_code=False)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{options.output}: {parameters / 1e6:.1f} M parameters, vocabulary {len(tokenizer):,}")


def main(arguments: list[str]) -> int:
    """Reads the command line and makes the model; returns the exit status."""
    return exit_status(lambda: make_model(tyro.cli(RehearsalOptions, args=arguments, description=__doc__)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
