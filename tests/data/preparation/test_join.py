"""Mixtures: which documents are written, how often, in which order, and which are held out."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import data.preparation.join
import data.preparation.workers
from data.index import DocumentIndex
from data.preparation.prompt import Prompt
from data.preparation.selection import find_duplicates, select
from data.preparation.sources import Source
from tests.support.chatting import small_tokenizer
from tests.support.preparing import answers, contents, dropped, jsonl, prepare_in_process, rows, run, texts

END = "<|im_end|>"


@pytest.fixture(scope="module")
def in_process():
    with pytest.MonkeyPatch.context() as patch:
        prepare_in_process(patch)
        yield


def numbered(start: int, stop: int) -> list[dict]:
    return [{"question": f"Question {number}?", "answer": f"Answer {number}."} for number in range(start, stop)]


def numbers_of(folder) -> list[int]:
    """The numbers of the documents of numbered rows, in their order."""
    return [int(text.removesuffix(f".{END}").split()[1]) for (text,) in texts(folder)]


@pytest.mark.parametrize(
    ("take", "documents", "counts"),
    [(0.5, 6, {1}), (1.0, 11, {1}), (2.5, 28, {2, 3}), (3.0, 33, {3}), (4, 4, {1}), (11, 11, {1})],
)
def test_a_part_is_exact(model, tmp_path, in_process, small_chunks, take, documents, counts):
    source = Source(data=str(jsonl(tmp_path / "a.jsonl", numbered(0, 11))), take=take)
    meta, _ = run(model, tmp_path / "data", source, seed=4)
    found = numbers_of(tmp_path / "data")
    assert len(found) == meta["documents"] == documents
    assert found == sorted(found) and {found.count(number) for number in found} == counts
    assert (meta["not_taken"], meta["repeated"]) == (11 - len(set(found)), documents - len(set(found)))
    other = run(model, tmp_path / "other", source, seed=5)[0]
    assert other["documents"] == documents
    assert (numbers_of(tmp_path / "other") == found) == (take in (1.0, 3.0, 11))  # nothing to choose


def test_more_than_there_is_is_refused(model, tmp_path, in_process):
    path = jsonl(tmp_path / "a.jsonl", [*numbered(0, 5), "no row"])
    with pytest.raises(ValueError, match=r"^--sources a: take 6 is more than its 5 documents$"):
        run(model, tmp_path / "data", f"{path}:6")
    with pytest.raises(ValueError, match="the parts to take leave none of 5 documents"):
        run(model, tmp_path / "data", f"{path}:0.01")
    with pytest.raises(ValueError, match="none of 1 rows can be used: 1 x not JSON"):
        run(model, tmp_path / "data", f"{jsonl(tmp_path / 'bad.jsonl', ['no row'])}:7")
    with pytest.raises(ValueError, match="hold_out 3 would leave nothing of 3 documents"):
        run(model, tmp_path / "data", Source(data=str(path), take=3, hold_out=3))


def test_a_mixture_in_order_with_its_account(model, tmp_path, in_process, small_chunks):
    first = jsonl(tmp_path / "first.jsonl", numbered(0, 40))
    folder = tmp_path / "second"
    folder.mkdir()
    jsonl(folder / "x.jsonl", numbered(40, 60))
    jsonl(folder / "y.jsonl", ["{", *[row | {"id": 1} for row in numbered(60, 80)]])
    sources = (
        Source(data=str(first), take=0.5, hold_out=4),
        Source(data=str(folder), take=2.0, where=("'7' not in question",)),
    )
    meta, printed = run(model, tmp_path / "data", *sources, hold_out=0.25)
    index, valid = DocumentIndex(tmp_path / "data"), DocumentIndex(tmp_path / "data" / "valid")
    found, held = numbers_of(tmp_path / "data"), numbers_of(tmp_path / "data" / "valid")
    assert found == sorted(found) and held == sorted(held) and not {*found} & {*held}
    kept = [number for number in range(40, 80) if "7" not in str(number)]
    assert (len(kept), sum(number < 40 for number in held), sum(number >= 40 for number in held)) == (27, 4, 7)
    assert sum(number < 40 for number in found) == 20 - 4
    assert sorted(found[16:]) == sorted([*{*kept} - {*held}] * 2)
    assert index.source_names == valid.source_names == ["first", "second"]
    assert index.sources.tolist() == [0] * 16 + [1] * 40 and valid.sources.tolist() == [0] * 4 + [1] * 7
    assert index.kinds == ["question_answer"] and not index.kind_numbers.any()
    one, two = meta["sources"]
    assert (one["rows"], one["documents"], one["not_taken"], one["held_out"], one["repeated"]) == (40, 16, 20, 4, 0)
    assert (two["rows"], two["documents"], two["filtered"], two["held_out"], two["repeated"]) == (41, 40, 13, 7, 20)
    assert two["dropped"] == {"not JSON": 1} and two["unused_columns"] == ["id"]
    assert [(file["name"], file["rows"]) for file in two["files"]] == [
        (f"{folder}/x.jsonl", 20),
        (f"{folder}/y.jsonl", 21),
    ]
    assert valid.meta["sources"][1]["documents"] == 7 and valid.meta["held_out_of"] == "data"
    assert dropped(tmp_path / "data")[0] | {"row": ""} == {
        "source": f"{folder}/y.jsonl", "line": 1, "reason": "not JSON", "row": "", "example_of": "second",
        "detail": dropped(tmp_path / "data")[0]["detail"],
    }  # fmt: skip
    assert "second: columns not used: id" in printed and f"second: 21 rows of {folder}/y.jsonl" in printed
    assert re.search(r"second +41 +13 +1 +0 +7 +20 +40 ", printed)


def test_duplicates_go_where_a_row_before_has_the_same(model, tmp_path, in_process, small_chunks):
    same = [{"question": "Q?", "answer": "A."}, {"question": "Q?", "answer": "B."}, {"question": "Q?", "answer": "A."}]
    first = jsonl(tmp_path / "a.jsonl", [*same, *numbered(0, 20)])
    second = jsonl(tmp_path / "b.jsonl", [*numbered(10, 30), "[]", same[1]])
    meta, _ = run(model, tmp_path / "data", first, second, dedup="conversation")
    assert texts(tmp_path / "data") == answers([*same[:2], *numbered(0, 30)])
    assert meta["dropped"]["duplicate conversation"] == {"count": 12, "first": f"{first}:3: the same as {first}:1"}
    listed = dropped(tmp_path / "data")
    assert [(drop["source"], drop["line"]) for drop in listed] == [
        (str(first), 3), *((str(second), line) for line in range(1, 11)), (str(second), 21), (str(second), 22)
    ]  # fmt: skip
    assert listed[1]["detail"] == f"the same as {first}:14" and listed[-1]["detail"] == f"the same as {first}:2"
    assert [source["dropped"].get("duplicate conversation", 0) for source in meta["sources"]] == [1, 11]
    meta, _ = run(model, tmp_path / "prompts", first, second, dedup="prompt")
    assert texts(tmp_path / "prompts") == answers([same[0], *numbered(0, 30)])
    assert run(model, tmp_path / "all", first, second)[0]["documents"] == 44
    examples = Prompt(user="{}", examples=(("One?", "1."),))  # which all rows begin with
    meta, _ = run(model, tmp_path / "examples", first, second, dedup="prompt", prompt=examples)
    assert meta["documents"] == 31


def test_text_is_cut_so_that_every_token_is_predicted_once(model, tmp_path, in_process):
    tokenizer = small_tokenizer()
    some = ["apples left " * count + f"and {count}." for count in (1, 9, 30)]
    lines = [{"text": text} for text in (*some, some[2])]
    lines.insert(2, {"question": "How? " * 30, "answer": "So."})
    meta, _ = run(model, tmp_path / "data", jsonl(tmp_path / "a.jsonl", lines), max_length=16, dedup="prompt")
    run(model, tmp_path / "whole", jsonl(tmp_path / "b.jsonl", [{"text": text} for text in some]))
    index, whole = DocumentIndex(tmp_path / "data"), DocumentIndex(tmp_path / "whole")
    pieces = iter(range(len(index)))
    for document in range(3):
        tokens, predicted = whole.tokens(document), []
        joined = index.tokens(next(pieces)) if len(tokens) <= 16 else []
        predicted = [len(joined)]
        while len(joined) < len(tokens):
            piece = next(pieces)
            after = int(len(joined) > 0)
            assert len(index.tokens(piece)) <= 16 and index.spans(piece).tolist() == [[after, len(index.tokens(piece))]]
            assert not after or index.tokens(piece)[0] == joined[-1]
            joined = [*joined, *index.tokens(piece)[after:]]
            predicted.append(len(index.tokens(piece)) - after)
        assert np.array_equal(joined, tokens) and sum(predicted) == len(tokens)
    assert next(pieces, None) is None and tokenizer.decode(index.tokens(0)).startswith("apples left and 1.")
    assert meta["cut"] == len(index) - 3 and meta["supervised_tokens"] == whole.lengths.sum()
    assert {reason: drop["count"] for reason, drop in meta["dropped"].items()} == {
        "longer than --max-length": 1,
        "duplicate prompt": 1,
    }
    assert not index.may_be_cut and whole.may_be_cut


def test_repeats_are_written_in_blocks(model, tmp_path, in_process, small_chunks, monkeypatch):
    source = jsonl(tmp_path / "a.jsonl", rows(30))
    run(model, tmp_path / "one" / "data", f"{source}:2.7")
    monkeypatch.setattr(data.preparation.join, "_BLOCK", 100)
    run(model, tmp_path / "two" / "data", f"{source}:2.7")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_mixture_is_the_same_for_any_workers_and_after_a_stop(model, tmp_path, small_chunks, monkeypatch):
    some = [*rows(60), "oops", *rows(20), {"text": "apples are left " * 40}]
    sources = [Source(data=str(jsonl(tmp_path / "a.jsonl", some)), take=1.5, hold_out=0.1)]
    sources.append(Source(data=str(jsonl(tmp_path / "b.jsonl", numbered(0, 50))), take=20))
    options = {"dedup": "prompt", "hold_out": 3, "max_length": 40}
    run(model, tmp_path / "one" / "data", *sources, num_workers=1, **options)
    run(model, tmp_path / "three" / "data", *sources, num_workers=3, **options)
    write = data.preparation.workers.write_part

    def stopped(job, number, *rest):
        if number % 3 == 2:
            raise OSError("stopped")
        write(job, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(data.preparation.workers, "write_part", stopped)
        with pytest.raises(OSError, match="stopped"):
            run(model, tmp_path / "again" / "data", *sources, **options)
    _, printed = run(model, tmp_path / "again" / "data", *sources, **options)
    assert "continuing: " in printed
    one = contents(tmp_path / "one")
    assert {"data/valid/sources.npy", "data/kinds.npy", "data/dropped.jsonl"} < set(one)
    assert one == contents(tmp_path / "three") == contents(tmp_path / "again")


def test_selection_of_large_numbers_is_exact():
    sizes = (1000, 0, 500)
    sources = [Source(data=name, name=name, take=take) for name, take in zip("abc", (0.123, 5.0, 3.3), strict=True)]
    found = select(sources, sizes, hold_out=7, seed=1)
    held = [int(found.held_out[:1000].sum()), int(found.held_out[1000:].sum())]
    assert sum(held) == 7
    assert found.copies[:1000].sum() == 123 - held[0] and found.copies[:1000].max() == 1
    assert found.copies[1000:].sum() == round(3.3 * (500 - held[1])) and set(found.copies[1000:]) == {0, 3, 4}
    assert np.array_equal(found.copies, select(sources, sizes, hold_out=7, seed=1).copies)
    other = select(sources[:1], sizes[:1], hashes=np.array([[7, n % 10] for n in range(1000)], np.uint64))
    assert other.copies.sum() == 1 and (other.duplicate_of >= 0).sum() == 990


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=30))
def test_duplicates_are_of_the_first(hashes):
    found = find_duplicates(np.array(hashes, np.uint64).reshape(-1, 2))
    expected = [hashes.index(one) if hashes.index(one) < place else -1 for place, one in enumerate(hashes)]
    assert found.tolist() == expected
