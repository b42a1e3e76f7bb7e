"""Conditions on rows: what is left out is counted, what a condition fails on is dropped and said."""

from __future__ import annotations

import pytest

from tests.support.chatting import small_tokenizer
from tests.support.preparing import answers, jsonl, rows, run, texts


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    small_tokenizer().save_pretrained(folder)
    return folder


def test_rows_are_kept_that_meet_every_condition(model, tmp_path):
    some = [row | {"source": "ab"[number % 2], "rate": str(number / 100)} for number, row in enumerate(rows(100))]
    some[7]["rate"] = "n/a"
    source = jsonl(tmp_path / "a.jsonl", some)
    where = ("source in ('b',)", "rate != 'n/a' and float(rate) <= 0.3")
    meta, printed = run(model, tmp_path / "data", source, where=where)
    kept = [row for row in some if row["source"] == "b" and row["rate"] != "n/a" and float(row["rate"]) <= 0.3]
    assert texts(tmp_path / "data") == answers(kept)
    assert (meta["rows"], meta["filtered"], meta["documents"]) == (100, 100 - len(kept), len(kept)) and len(kept) == 14
    assert meta["dropped"] == {} and "filtered" in printed and not (tmp_path / "data" / "dropped.jsonl").exists()
    # Other conditions make other data; without any, nothing is left out or said.
    with pytest.raises(ValueError, match="choose another, or replace it with --overwrite"):
        run(model, tmp_path / "data", source, where=where[:1])
    meta, printed = run(model, tmp_path / "whole", source)
    assert meta["filtered"] == 0 and "filtered" not in printed


def test_tokens_are_those_of_the_tokenizer(model, tmp_path):
    some = [row | {"tokens": 5} for row in rows(30)]  # a column that the function's name hides
    tokenizer = small_tokenizer()
    lengths = [len(tokenizer(row["answer"], add_special_tokens=False)["input_ids"]) for row in some]
    least = sorted(lengths)[15]
    run(
        model,
        tmp_path / "data",
        jsonl(tmp_path / "a.jsonl", some),
        where=(f"tokens(answer) >= {least} and row['tokens'] == 5",),
    )
    kept = [row for row, length in zip(some, lengths, strict=True) if length >= least]
    assert texts(tmp_path / "data") == answers(kept) and 0 < len(kept) < 30


def test_rows_on_which_a_condition_fails_are_dropped_and_counted(model, tmp_path):
    some = [row | {"rate": "0.5"} for row in rows(10)]
    del some[3]["rate"]
    some[5]["rate"] = None
    some[6] = ["no", "row"]
    source = jsonl(tmp_path / "a.jsonl", some)
    meta, printed = run(model, tmp_path / "data", source, where=("float(row['rate']) < 1",))
    assert (meta["rows"], meta["filtered"], meta["documents"]) == (10, 0, 7)
    assert (
        meta["dropped"]["--where could not be evaluated"]["count"] == 2
        and meta["dropped"]["not an object"]["count"] == 1
    )
    assert f"{source}:4: float(row['rate']) < 1: KeyError: 'rate'" in printed
    with pytest.raises(ValueError, match="name 'pass_rate' is not defined; the row has question, answer, rate"):
        run(model, tmp_path / "other", source, where=("pass_rate > 0.5",), limit=3)


def test_conditions_that_are_refused(model, tmp_path):
    source = jsonl(tmp_path / "a.jsonl", rows(5))
    with pytest.raises(ValueError, match=r"--where rate => 1: not an expression \(invalid syntax\)"):
        run(model, tmp_path / "data", source, where=("rate => 1",))
    with pytest.raises(ValueError, match="none of 5 rows can be used: 5 x left out by --where"):
        run(model, tmp_path / "data", source, where=("len(answer) > 1000",))
    with pytest.raises(ValueError, match="5 x --where could not be evaluated"):
        run(model, tmp_path / "data", source, where=("open('/etc/passwd')",))
    assert not (tmp_path / "data").exists()
