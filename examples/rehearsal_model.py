"""Makes a small Hugging Face model with random weights and a tokenizer trained on your rows, for rehearsals.

python examples/rehearsal_model.py --sources rows.jsonl --output MODEL [--vocab-size 4096 --hidden-size 256 ...]
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from data.preparation.conversation import RowError
from data.preparation.formats import Fields, to_conversation


@dataclass(frozen=True, kw_only=True)
class RehearsalOptions:
    """Shape of the model; what is not given comes from the demo's model.json."""

    sources: tuple[Path, ...]
    """JSONL files whose conversations the tokenizer learns from."""
    output: Path
    """Hugging Face directory to make."""
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    num_layers: int = 6
    num_heads: int = 8
    num_key_value_heads: int = 4
    max_position_embeddings: int = 4096
    seed: int = 0


def texts(sources: tuple[Path, ...]):
    """Yields the contents of every message of every usable row."""
    for source in sources:
        with open(source, encoding="utf-8") as file:
            for line in file:
                try:
                    conversation = to_conversation(json.loads(line), Fields(), None)
                except (RowError, ValueError):
                    continue
                yield "\n".join(f"{turn['role']}\n{turn.get('content') or ''}" for turn in conversation.messages)


def make_model(options: RehearsalOptions) -> None:
    """Trains the tokenizer, draws the weights, writes the directory."""
    from transformers import AutoModelForCausalLM

    from examples.demo.model import train_tokenizer, write_model

    fields = json.loads((Path(__file__).parent / "demo" / "model.json").read_text(encoding="utf-8"))
    tokenizer = train_tokenizer(texts(options.sources), options.vocab_size)
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
    model = AutoModelForCausalLM.from_pretrained(options.output)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{options.output}: {parameters / 1e6:.1f} M parameters, vocabulary {len(tokenizer):,}")


def main(arguments: list[str]) -> int:
    """Reads the command line and makes the model; returns the exit status."""
    try:
        make_model(tyro.cli(RehearsalOptions, args=arguments, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
