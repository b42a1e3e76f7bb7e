"""Preparing data against the bare tokenizer, with the same number of threads.

    python benchmarks/prepare_speed.py [--source FILE.jsonl] [--num-workers N] [--rows N] [--repeats N]

The bare tokenizer encodes text that is already rendered; preparing reads the rows, renders, encodes, finds
the supervised spans and writes the data directory, from its call to its last byte. A byte-level BPE
tokenizer is trained on the spot; the fastest of the repeats counts, and the two take turns. CPU
seconds (of all threads and processes) say the same where other programs share the machine.
"""

import argparse
import io
import itertools
import json
import os
import random
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data.preparation.formats import to_conversation
from data.preparation.prepare import PrepareOptions, prepare

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def generated_rows(count: int) -> list[dict]:
    """Question-and-answer rows of made-up words, about as long as grade-school problems."""
    chance = random.Random(0)
    words = ["".join(chance.choices("aeioubcdfghklmnprst", k=chance.randint(2, 9))) for _ in range(5000)]

    def text(shortest: int, longest: int) -> str:
        return " ".join(chance.choice(words) for _ in range(chance.randint(shortest, longest))) + "."

    return [{"question": text(20, 80), "answer": text(30, 120)} for _ in range(count)]


def trained_tokenizer(rows: list[dict], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    texts = (text for row in rows[:5000] for text in row.values() if isinstance(text, str))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=TEMPLATE)


@contextmanager
def timed(seconds: list[float], processor: list[float]):
    """Appends how long the body took, and the processor time of this process and its finished children."""
    start, used = time.perf_counter(), sum(os.times()[:4])
    yield
    seconds.append(time.perf_counter() - start)
    processor.append(sum(os.times()[:4]) - used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="JSONL file with question and answer (else generated)")
    parser.add_argument("--num-workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rows", type=int, default=30_000, help="the source is repeated to this many rows")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(arguments.num_workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"

    rows = generated_rows(arguments.rows)
    if arguments.source:
        rows = [json.loads(line) for line in arguments.source.read_text().splitlines()]
    rows = list(itertools.islice(itertools.cycle(rows), arguments.rows))
    tokenizer = trained_tokenizer(rows, arguments.vocab_size)
    messages = [to_conversation(row).messages for row in rows]
    rendered = [tokenizer.apply_chat_template(one, tokenize=False) for one in messages]
    seconds = {"bare encode_batch": [], "prepare_data": []}
    processor = {name: [] for name in seconds}
    with tempfile.TemporaryDirectory() as folder:
        source, model = Path(folder, "rows.jsonl"), Path(folder, "model")
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tokenizer.save_pretrained(model)
        for repeat in range(arguments.repeats):
            with timed(seconds["bare encode_batch"], processor["bare encode_batch"]):
                encodings = tokenizer.backend_tokenizer.encode_batch(rendered, add_special_tokens=False)
            tokens = sum(map(len, encodings))
            del encodings
            options = PrepareOptions(
                sources=(str(source),),
                model=str(model),
                output=Path(folder, f"data{repeat}"),
                num_workers=arguments.num_workers,
            )
            with timed(seconds["prepare_data"], processor["prepare_data"]):
                meta = prepare(options, Console(file=io.StringIO()))
            assert meta["tokens"] == tokens, "the bare tokenizer made other tokens"

    table = Table(title=f"{len(rows):,} rows, {tokens:,} tokens, {arguments.num_workers} threads")
    for column in ("", "seconds", "tokens/s", "rows/s a core", "ratio", "CPU s", "ratio"):
        table.add_column(column, justify="right")
    bare = min(seconds["bare encode_batch"])
    for name, runs in seconds.items():
        best = min(runs)
        per_core = len(rows) / best / arguments.num_workers
        used, bare_used = min(processor[name]), min(processor["bare encode_batch"])
        table.add_row(
            name,
            f"{best:.2f}",
            f"{tokens / best:,.0f}",
            f"{per_core:,.0f}",
            f"{bare / best:.2f}",
            f"{used:.2f}",
            f"{bare_used / used:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
