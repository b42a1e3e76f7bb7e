"""Rows whose prompt repeats a test question are dropped, and each match is reported."""

import random

import pyarrow
import pyarrow.parquet
import pytest

from data.preparation.conversation import Conversation
from data.preparation.decontaminate import Questions
from data.preparation.files import open_source
from tests.support.chatting import chat
from tests.support.preparing import answers, dropped, jsonl, run, texts

LONG = "A farmer has twelve cows and sells three of them every spring until only two remain; how many springs pass?"
SHORT = "Compute the sum of angles."


def questions(tmp_path, rows: list, ngram: int = 13) -> Questions:
    found = Questions(ngram)
    found.add_file("test", open_source(str(jsonl(tmp_path / "test.jsonl", rows))))
    return found


def asked(*texts: str) -> Conversation:
    return Conversation([{"role": "user", "content": text} for text in texts])


def test_an_overlap_is_a_run_of_words_whatever_stands_between_them(tmp_path):
    found = questions(tmp_path, [{"problem": LONG}, {"problem": SHORT}, {"problem": "What is 2?"}])
    words = LONG.lower().replace(";", "").rstrip("?").split()
    run_of = " ".join(words[4:17])
    assert found.find(asked(f"Hi. {run_of.upper()}!")).detail == f'test:1, "{run_of}"'
    assert found.find(asked("no", "Say:  " + ",\n".join(words[4:17]))).file == 0
    assert found.find(asked(" ".join(words[4:16]))) is None  # a run of twelve
    assert found.find(asked(" ".join(words[4:10]), " ".join(words[10:17]))) is None  # of two turns
    assert found.find(Conversation([], text=f"x {run_of} y", kind="text")).detail.startswith("test:1")
    assert found.find(Conversation([{"role": "assistant", "content": LONG}])) is None
    assert found.find(asked("Now compute the sum of   angles, please")).detail == 'test:2, "compute the sum of angles"'
    assert found.find(asked("compute the sum of all angles")) is None
    assert found.find(asked("what is 2?")) is None  # three words are too few to say anything
    assert (found.questions, found.too_short) == ([3], [1])
    shorter = questions(tmp_path, [{"problem": LONG}], ngram=4)
    assert shorter.find(asked("he sells three of them")) is not None


def test_questions_are_found_in_every_kind_of_file(tmp_path):
    texts = [f"Question number {number} is about {number} green and {number} blue apples" for number in range(5)]
    jsonl(
        tmp_path / "a.jsonl",
        [chat(("system", "s"), ("user", texts[0])), {"prompt": [{"role": "user", "content": texts[1]}]}],
    )
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "question": [texts[2]]}), tmp_path / "b.parquet")
    (tmp_path / "c.csv").write_text(f"instruction,answer\n{texts[3]},4\n")
    jsonl(tmp_path / "d.jsonl", [{"conversations": [{"from": "human", "value": texts[4]}]}])
    found = Questions(8)
    for name in ("a.jsonl", "b.parquet", "c.csv", "d.jsonl"):
        found.add_file(name, open_source(str(tmp_path / name)))
    assert [found.find(asked(text)).file for text in texts] == [0, 0, 1, 2, 3]
    assert found.questions == [2, 1, 1, 1]


@pytest.mark.parametrize("row", [{"q": "What?"}, {"problem": None}, "{", "[1]"])
def test_a_test_row_without_a_question_is_named(tmp_path, row):
    with pytest.raises(
        ValueError, match=r"--decontaminate .*test\.jsonl:2: no question found \((its column must be one of|not JSON)"
    ):
        questions(tmp_path, [{"problem": LONG}, row])


def test_overlapping_rows_are_dropped_and_reported(model, tmp_path, small_chunks):
    good = [{"question": f"How many apples are {n}?", "answer": f"{n}."} for n in range(30)]
    bad = [{"question": f"Read well. {LONG}", "answer": "4."}, {"question": SHORT, "answer": "180."}]
    source = jsonl(tmp_path / "a.jsonl", [*good[:10], bad[0], *good[10:], bad[1], bad[0]])
    first, second = (
        jsonl(tmp_path / "one.jsonl", [{"problem": LONG}]),
        jsonl(tmp_path / "two.jsonl", [{"problem": SHORT}]),
    )
    named = tuple(map(str, (first, second)))
    meta, printed = run(model, tmp_path / "data", source, decontaminate=named)
    assert texts(tmp_path / "data") == answers(good)
    drop = meta["dropped"]["overlaps a test question"]
    assert drop["count"] == 3 and drop["first"].startswith(f'{source}:11: {first}:1, "a farmer has twelve')
    assert [line["line"] for line in dropped(tmp_path / "data")] == [11, 32, 33]
    assert [(one["file"], one["questions"], one["rows"]) for one in meta["decontaminated"]] == [
        (str(first), 1, 2),
        (str(second), 1, 1),
    ]
    assert f"{first}: 2 rows overlap one of 1 test questions" in printed
    with pytest.raises(ValueError, match=r"--decontaminate missing\.jsonl: there is no such file"):
        run(model, tmp_path / "other", source, decontaminate=("missing.jsonl",))
    jsonl(second, [{"problem": LONG}])  # another content, another preparation
    with pytest.raises(ValueError, match="exists: choose another"):
        run(model, tmp_path / "data", source, decontaminate=named)


def test_a_hit_is_what_a_plain_search_finds(tmp_path):
    chance = random.Random(0)
    words = ["a", "b"]
    some = [" ".join(chance.choices(words, k=chance.randint(1, 12))) for _ in range(40)]
    found = questions(tmp_path, [{"problem": text} for text in some[:20]], ngram=7)
    hits = 0
    for text in some[20:]:
        runs = {
            tuple(one.split()[start : start + 7]) for one in some[:20] for start in range(max(1, len(one.split()) - 6))
        }
        expected = any(f" {' '.join(run)} " in f" {text} " for run in runs if len(run) >= 5)
        assert (found.find(asked(text)) is not None) == expected
        hits += expected
    assert 0 < hits < 20
