"""Two-digit additions and subtractions in words, with answers worked out digit by digit.

A small model learns column arithmetic quickly when the answer goes through it as a person would: units
first, the carry or the borrow spoken aloud, then the tens, then the number. Each digit is a token of its
own (see `model.py`), so no sum has to be memorised. Held-out problems share no pair of operands with the
training problems, in either order and under either operation: what is measured is arithmetic, not recall.
"""

import json
import random
from pathlib import Path

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana")
THINGS = ("apples", "books", "cards", "coins", "marbles", "pens", "shells", "stamps")

ADDITIONS = (
    "{name} has {a} {things} and gets {b} more. How many {things} now?",
    "{name} has {a} {things} and {other} has {b}. How many {things} together?",
    "A box holds {a} {things}. {name} adds {b}. How many {things} are inside?",
    "{name} sold {a} {things} in May and {b} in June. How many {things} in all?",
)
SUBTRACTIONS = (
    "{name} has {a} {things} and gives away {b}. How many {things} are left?",
    "{name} has {a} {things} and {other} has {b}. How many more {things} has {name}?",
    "A box holds {a} {things}. {name} takes {b}. How many {things} stay inside?",
    "{name} needs {a} {things} and has {b}. How many {things} are missing?",
)
SMALLEST, LARGEST = 10, 99
TRAIN = 24_000  # training problems


def worked_answer(a: int, b: int, operation: str) -> str:
    """The solution as text, ending with the result in a box; `operation` is "+" or "-".

    Raises `ValueError` where an operand has not two digits or the result would be negative.
    """
    if not (SMALLEST <= a <= LARGEST and SMALLEST <= b <= LARGEST):
        raise ValueError(f"operands {a} and {b} must lie in {SMALLEST}..{LARGEST}")
    tens_a, units_a = divmod(a, 10)
    tens_b, units_b = divmod(b, 10)
    if operation == "+":
        units = units_a + units_b
        carry = units // 10
        first = f"{units_a}+{units_b}={units}" + (", carry 1" if carry else "")
        second = f"{tens_a}+{tens_b}" + ("+1" if carry else "") + f"={tens_a + tens_b + carry}"
        result = a + b
    elif operation == "-":
        if b > a:
            raise ValueError(f"{a} - {b} would be negative")
        borrow = int(units_a < units_b)
        first = f"{units_a + 10 * borrow}-{units_b}={units_a + 10 * borrow - units_b}"
        first += ", borrow 1" if borrow else ""
        second = f"{tens_a}-{tens_b}" + ("-1" if borrow else "") + f"={tens_a - tens_b - borrow}"
        result = a - b
    else:
        raise ValueError(f"operation {operation!r} is neither '+' nor '-'")
    return f"{first}. {second}. \\boxed{{{result}}}"


def _conversation(a: int, b: int, operation: str, rng: random.Random) -> dict:
    """One row: a user turn in words, the worked answer, and the bare result for grading."""
    template = rng.choice(ADDITIONS if operation == "+" else SUBTRACTIONS)
    name, other = rng.sample(NAMES, 2)
    problem = template.format(name=name, other=other, things=rng.choice(THINGS), a=a, b=b)
    messages = [
        {"role": "user", "content": problem},
        {"role": "assistant", "content": worked_answer(a, b, operation)},
    ]
    return {"messages": messages, "expected_answer": str(a + b if operation == "+" else a - b)}


def draw_problems(pairs: list[tuple[int, int]], count: int, rng: random.Random) -> list[dict]:
    """`count` rows with distinct problems, additions and subtractions in turn, over all `pairs` evenly.

    Drawing four times as often as that without finding as many means that there are hardly more of them.
    """
    rows: list[dict] = []
    seen: set[str] = set()
    draws = 0
    while len(rows) < count:
        if draws > 4 * count:
            raise ValueError(f"{len(pairs)} pairs of operands hardly give {count} distinct problems")
        draws += 2 * len(pairs)
        for low, high in rng.sample(pairs, len(pairs)):
            swapped = (high, low) if rng.random() < 0.5 else (low, high)
            for row in (_conversation(*swapped, "+", rng), _conversation(high, low, "-", rng)):
                problem = row["messages"][0]["content"]
                if problem not in seen and len(rows) < count:
                    seen.add(problem)
                    rows.append(row)
    rng.shuffle(rows)
    return rows


def make_problems(train: int = TRAIN, heldout: int = 512, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Training and held-out rows, `{"messages": [user, assistant], "expected_answer": "85"}`.

    A tenth of the 4,095 unordered pairs of operands is kept for the held-out rows. The same seed gives the
    same rows. Raises `ValueError` when more distinct problems are asked for than there are.
    """
    rng = random.Random(seed)
    numbers = range(SMALLEST, LARGEST + 1)
    pairs = [(low, high) for low in numbers for high in numbers if low <= high]
    rng.shuffle(pairs)
    kept_out = len(pairs) // 10
    return draw_problems(pairs[kept_out:], train, rng), draw_problems(pairs[:kept_out], heldout, rng)


def write_problems(directory: str | Path, train: int = TRAIN, heldout: int = 512, seed: int = 0) -> tuple[Path, Path]:
    """Write `train.jsonl` and `heldout.jsonl` into `directory` and return their paths."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / "train.jsonl", directory / "heldout.jsonl"
    for path, rows in zip(paths, make_problems(train, heldout, seed), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths
