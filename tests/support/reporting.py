"""A small data directory written by hand: two sources, three kinds, repeats, dropped rows that try to break a page."""

import json
from pathlib import Path

import numpy as np

from data.index import IndexWriter
from tests.support.chatting import small_tokenizer

END = "<|im_end|>"
SCRIPT = "<script>alert('x')</script>"
ANSWERS = [f"The answer is {number * number}. " for number in range(12)]
REASONS = {"not JSON": 40, "unknown fields": 7, f"odd {SCRIPT}": 1}


def document(question: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and spans of one turn, of which the answer and its end are supervised."""
    tokenizer = small_tokenizer()
    head = tokenizer(f"<|im_start|>user\n{question}{END}\n<|im_start|>assistant\n", add_special_tokens=False)
    tail = tokenizer(answer + END, add_special_tokens=False)
    tokens = np.array(head["input_ids"] + tail["input_ids"], np.int32)
    return tokens, np.array([[len(head["input_ids"]), len(tokens)]], np.int32)


def write_data(path: Path, *, named: bool = True, with_tokenizer: bool = True) -> Path:
    """Documents 0 to 11 differ, 12 and 13 are document 3 again; an older directory where it is not `named`."""
    documents = [document(f"How many is {number}? {SCRIPT}", answer) for number, answer in enumerate(ANSWERS)]
    documents += [documents[3], documents[3]]
    writer = IndexWriter(path, vocab_size=len(small_tokenizer()))
    sources = np.array([0] * 8 + [1] * 6)
    kinds = np.array([0] * 8 + [1, 1, 2, 2, 2, 2])
    for number, (tokens, spans) in enumerate(documents):
        numbers = (sources[number : number + 1], kinds[number : number + 1]) if named else ()
        writer.add(tokens, np.array([len(tokens)]), spans, np.array([1]), *numbers)
    meta = {
        "rows": len(documents) + sum(REASONS.values()) + 2,
        "filtered": 0,
        "held_out": 2,
        "dropped": {reason: {"count": count, "first": "a.jsonl:1"} for reason, count in REASONS.items()},
        "stripped_turns": 17,
        "lost_socks": 4321,
        "open_turns": 0,
        "chat_template": "{{ messages }}",
    }
    if named:
        first = {"name": "maths", "rows": 10, "filtered": 0, "dropped": {"not JSON": 40}, "unused_columns": ["url"]}
        meta |= {
            "sources": [first, {"name": "<b>[tools]", "rows": 6}],
            "kinds": ["question_answer", "tools", "messages"],
        }
    with open(writer.directory / "dropped.jsonl", "w", encoding="utf-8") as file:
        for reason, count in REASONS.items():
            for line in range(count):
                row = "{not json" if reason == "not JSON" else {"reason": "unknown fields", "text": f"{line} \ud800"}
                drop = {"source": "a.jsonl", "line": line + 1, "reason": reason, "detail": f"why {line}", "row": row}
                file.write(json.dumps(drop) + "\n")
    writer.close(meta, small_tokenizer() if with_tokenizer else None)
    return path
