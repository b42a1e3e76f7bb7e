"""Every row and every token is trained on, masked, held out, not taken, filtered or dropped, and counted as such."""

import json
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.index import DocumentIndex
from data.preparation.sources import Source
from tests.support.preparing import dropped, jsonl, prepare_in_process, run

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}


def talk(*turns, **columns) -> dict:
    return {"messages": [*turns], **columns}


def calling(calls) -> dict:
    return talk(USER, {"role": "assistant", "content": "", "tool_calls": calls})


# Malformed rows: each with the reason that it must be counted by.
MALFORMED = [
    ('{"question": "a"', "not JSON"),
    ("[" * 200 + "]" * 200, "not JSON"),
    ("[1]", "not an object"),
    ("{}", "empty row"),
    ({"prose": "a"}, "unknown fields"),
    ({"question": "a"}, "unknown fields"),
    ({"question": None, "answer": "a"}, "not text"),
    ({"question": "a", "answer": " "}, "empty text"),
    ({"input": "a", "output": "b", "problem": "c", "solution": "d"}, "ambiguous fields"),
    (talk(USER), "no assistant turn"),
    (talk({"role": "robot", "content": "x"}, ANSWER), "unknown role"),
    (talk(USER, "a"), "malformed message"),
    ({"messages": "[{"}, "malformed messages"),
    (talk(USER, ANSWER, tools="x"), "malformed tools"),
    (calling([{"function": {}}]), "malformed tool call"),
    (calling("["), "malformed tool_calls"),
    (talk(USER, {"role": "assistant", "content": ""}), "empty text"),
    (talk({"role": "user", "content": [{"type": "image"}]}, ANSWER), "not text"),
    ({"question": "\ud800", "answer": "b"}, "not Unicode"),
    (talk(USER, {**ANSWER, "weight": 0}), "no turn to train"),
]


def test_ten_thousand_malformed_rows_are_counted_one_by_one(model, tmp_path):
    assert len(MALFORMED) == 20
    good = {"question": "Two?", "answer": "2."}
    lines = [row for number in range(500) for row in (*(row for row, _ in MALFORMED), *[good] * (number % 2))]
    meta, _ = run(model, tmp_path / "data", jsonl(tmp_path / "a.jsonl", lines))
    expected = Counter({reason: 0 for _, reason in MALFORMED})
    expected.update(reason for _, reason in MALFORMED * 500)
    assert {reason: drop["count"] for reason, drop in meta["dropped"].items()} == dict(expected)
    assert (meta["rows"], meta["documents"], sum(expected.values())) == (10_250, 250, 10_000)
    listed = dropped(tmp_path / "data")
    # rows with good ones after every second twenty: the lines of those that are left
    lines_of = [number + 1 for number, row in enumerate(lines) if row is not good]
    assert [drop["line"] for drop in listed] == lines_of
    assert [drop["reason"] for drop in listed] == [reason for _, reason in MALFORMED] * 500
    assert meta["sources"][0]["dropped"] == dict(expected)


ROWS = st.sampled_from(
    [
        *({"question": f"Q{number}?", "answer": "A. " * number} for number in range(1, 7)),
        talk(USER, ANSWER, USER, {**ANSWER, "weight": 0}),
        talk(USER, ANSWER),
        {"text": "apples are left " * 20},
        {"text": "apples"},
        {"question": "left out", "answer": "A."},
        "{",
        {"prose": "a"},
    ]
)
SOURCES = st.lists(
    st.tuples(
        st.lists(ROWS, min_size=1, max_size=12),
        st.sampled_from([0.3, 0.5, 1.0, 1.5, 3.0, 2]),
        st.sampled_from([None, 0, 1, 0.3]),
    ),
    min_size=1,
    max_size=3,
)


@pytest.fixture(scope="module")
def in_process():
    with pytest.MonkeyPatch.context() as patch:
        prepare_in_process(patch)
        yield


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    sources=SOURCES,
    dedup=st.sampled_from(["none", "prompt", "conversation"]),
    max_length=st.sampled_from([None, 24]),
    hold_out=st.sampled_from([0, 1, 0.2]),
)
def test_nothing_is_lost_without_a_count(model, in_process, sources, dedup, max_length, hold_out):
    folder = Path(tempfile.mkdtemp())
    try:
        named = []
        for number, (lines, take, held) in enumerate(sources):
            path = jsonl(folder / f"{number}.jsonl", lines)
            named.append(Source(data=str(path), take=take, hold_out=held, where=("row.get('question') != 'left out'",)))
        options = {"dedup": dedup, "max_length": max_length, "hold_out": hold_out}
        try:
            meta, _ = run(model, folder / "data", *named, **options)
        except ValueError as error:  # too few documents to take, to hold out, or to leave
            assert any(
                why in str(error) for why in ("is more than its", "would leave nothing", "leave none of", "can be used")
            )
            return
        check(folder / "data", meta, sources)
    finally:
        shutil.rmtree(folder)


def check(folder: Path, meta: dict, sources: list) -> None:
    """Counts again what meta.json says, from the files and the given rows."""
    train = DocumentIndex(folder)
    valid = DocumentIndex(folder / "valid") if (folder / "valid").exists() else None
    listed = dropped(folder) if (folder / "dropped.jsonl").exists() else []
    for number, ((lines, take, _), said) in enumerate(zip(sources, meta["sources"], strict=True)):
        own = np.flatnonzero(train.sources == number)
        held = np.flatnonzero(valid.sources == number) if valid is not None else own[:0]
        drops = Counter(drop["reason"] for drop in listed if drop["example_of"] == said["name"])
        assert said["rows"] == len(lines) and said["dropped"] == drops
        assert said["filtered"] == sum(isinstance(row, dict) and row.get("question") == "left out" for row in lines)
        used = said["rows"] - said["filtered"] - drops.total() + said["cut"]  # different documents
        assert used == said["not_taken"] + len(held) + len(own) - said["repeated"]
        whole = min(round(take * used) if take < 1 else used, take if isinstance(take, int) else used)
        assert used - said["not_taken"] == whole
        if take in (1.5, 3.0):
            assert len(own) == round(take * (used - len(held)))
        assert (said["documents"], said["held_out"]) == (len(own), len(held))
        tokens = int(train.lengths[own].sum())
        assert said["tokens"] == tokens
        spans, _ = train.spans_of(own)
        assert said["supervised_tokens"] == int((spans[:, 1] - spans[:, 0]).sum()) <= tokens
        taken_twice = said["repeated_tokens"]
        elsewhere = said["not_taken_tokens"] + said["held_out_tokens"] + said["dropped_tokens"]
        assert said["encoded_tokens"] == tokens - taken_twice + elsewhere
        if valid is not None:
            assert said["held_out_tokens"] == int(valid.lengths[held].sum())
            assert valid.meta["sources"][number]["documents"] == len(held)
        by_kind = np.bincount(train.kind_numbers[own], minlength=len(train.kinds))
        assert {kind: tally["documents"] for kind, tally in said["kinds"].items() if tally["documents"]} == {
            train.kinds[kind]: count for kind, count in enumerate(by_kind.tolist()) if count
        }
    for name in ("rows", "filtered", "not_taken", "held_out", "repeated", "cut"):
        assert meta[name] == sum(said[name] for said in meta["sources"])
    assert {reason: drop["count"] for reason, drop in meta["dropped"].items()} == Counter(d["reason"] for d in listed)
    assert json.loads((folder / "meta.json").read_text()) == meta
