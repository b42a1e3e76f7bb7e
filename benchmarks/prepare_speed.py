"""Preparing data against the bare tokenizer, with the same number of threads.

    python benchmarks/prepare_speed.py [--source FILE.jsonl] [--tools [N]] [--num-workers N] [--rows N] [--repeats N]

The bare tokenizer encodes text that is already rendered; preparing is the command, from the start of its Python to the
last byte of the data directory: it reads the rows, renders, encodes and finds the supervised spans. `--tools N` makes
conversations of N calls, each with what the tool gave back. A byte-level BPE tokenizer is trained on the spot; the
fastest of the repeats counts, and the two take turns. CPU seconds (of all threads and processes) say the same where
other programs share the machine.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data.preparation.formats import to_conversation

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def generated_rows(count: int) -> list[dict]:
    """Question-and-answer rows of made-up words, about as long as grade-school problems."""
    chance = random.Random(0)
    words = ["".join(chance.choices("aeioubcdfghklmnprst", k=chance.randint(2, 9))) for _ in range(5000)]

    def text(shortest: int, longest: int) -> str:
        return " ".join(chance.choice(words) for _ in range(chance.randint(shortest, longest))) + "."

    return [{"question": text(20, 80), "answer": text(30, 120)} for _ in range(count)]


def with_calls(row: dict, calls: int) -> dict:
    """The row as a conversation in which a tool is called between question and answer."""
    messages = [{"role": "user", "content": row["question"]}]
    words = row["answer"].split()
    for number in range(calls):
        function = {"name": "look_up", "arguments": {"about": " ".join(words[number % 7 : number % 7 + 12])}}
        call = {"id": f"call{number:05d}", "type": "function", "function": function}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        answer = {"role": "tool", "tool_call_id": call["id"], "content": " ".join(words[: 10 + number % 20])}
        messages.append(answer)
    messages.append({"role": "assistant", "content": row["answer"]})
    schema = {"type": "object", "properties": {"about": {"type": "string"}}}
    return {
        "messages": messages,
        "tools": [{"type": "function", "function": {"name": "look_up", "parameters": schema}}],
    }


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
    parser.add_argument("--tools", type=int, nargs="?", const=2, default=0, help="calls in each conversation")
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
    if arguments.tools:
        rows = [with_calls(row, arguments.tools) for row in rows]
    conversations = map(to_conversation, rows)
    rendered = [tokenizer.apply_chat_template(one.messages, tools=one.tools, tokenize=False) for one in conversations]
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
            output = Path(folder, f"data{repeat}")
            flags = ["--model", model, "--sources", source, "--output", output, "--num-workers", arguments.num_workers]
            command = [sys.executable, ROOT / "examples" / "prepare_data.py", *flags]
            with timed(seconds["prepare_data"], processor["prepare_data"]):
                subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
            meta = json.loads((output / "meta.json").read_text())
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
