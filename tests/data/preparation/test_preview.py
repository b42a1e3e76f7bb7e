"""`--preview` shows documents of every source and kind, and why rows would be dropped, and writes nothing."""

import pytest

from data.preparation.sources import Source
from tests.support.chatting import chat, small_tokenizer
from tests.support.preparing import contents, jsonl, prepare_in_process, rows, run


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    prepare_in_process(monkeypatch)


def test_documents_of_all_sources_and_kinds_are_shown(model, tmp_path):
    mixed = [*rows(9), chat(("user", "Hello?"), ("assistant", "Good day.")), *rows(300)]
    first = jsonl(tmp_path / "a.jsonl", mixed)
    second = jsonl(tmp_path / "b.jsonl", ["{", "", {"prose": "x"}, {"prose": "y"}, {"text": "two apples"}])
    before = contents(tmp_path)
    meta, printed = run(
        model, None, first, Source(data=str(second), name="texts", where=("row.get('prose') != 'x'",)), preview=3
    )
    assert meta == {} and contents(tmp_path) == before
    shown = [line for line in printed.splitlines() if f"{tmp_path}" in line and "would drop" not in line]
    assert shown == [
        f"a, question_answer, {first}:1",
        f"a, messages, {first}:10",
        f"texts, text, {second}:5",
    ]
    assert "[[Good day.<|im_end|>]]" in printed and "[[The answer is 0. <|im_end|>]]" in printed
    assert "[[two apples" in printed and "so so" not in printed
    assert "a: 64 rows looked at, 0 dropped, 64 documents" in printed
    assert "texts: 4 rows looked at, 1 left out by --where, 2 dropped, 1 documents" in printed
    assert f"would drop 1: not JSON, first {second}:1: " in printed
    assert f"would drop 1: unknown fields, first {second}:4: the row has prose" in printed


def test_one_source_gives_all_that_are_asked_for(model, tmp_path, small_chunks):
    source = jsonl(tmp_path / "a.jsonl", rows(200))
    _, printed = run(model, None, source, preview=130, max_length=len(small_tokenizer()))
    assert printed.count("[[The answer is ") == 130
    assert f"a, question_answer, {source}:130\n" in printed and f"{source}:131\n" not in printed
    _, printed = run(model, tmp_path / "data", f"{source}:2", preview=1000)
    assert printed.count("[[The answer is ") == 200 and not (tmp_path / "data").exists()
