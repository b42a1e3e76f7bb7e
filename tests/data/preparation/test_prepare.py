"""Sources become one data directory: the same for any number of processes, and nothing is lost on the way."""

import json
import os
import re
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

import data.preparation.rows
from data.index import DocumentIndex
from data.preparation.formats import Fields
from data.preparation.sources import Source
from data.preparation.tokenizer import tokenizer_fingerprint
from tests.support.chatting import chat, small_tokenizer
from tests.support.preparing import ROOT, answers, contents, jsonl, rows, run, texts

GSM8K = Path(os.environ.get("LATHE_DATA", ROOT.parent / "shared" / "data")) / "gsm8k_train.jsonl"


def test_output_is_the_same_for_any_number_of_workers(model, tmp_path, small_chunks):
    source = jsonl(tmp_path / "a.jsonl", [*rows(60), "oops", *rows(40)])
    meta, printed = run(model, tmp_path / "one" / "data", source, num_workers=1, hold_out=5)
    assert len(list(data.preparation.rows.JsonLines("a", source).chunks(None)[0])) > 5
    run(model, tmp_path / "three" / "data", source, num_workers=3, hold_out=5)
    one, three = contents(tmp_path / "one"), contents(tmp_path / "three")
    assert one == three
    assert {"data/meta.json", "data/valid/tokens.bin", "data/dropped.jsonl"} < set(one)
    assert not any(".parts" in name or ".partial" in name for name in one)
    assert (meta["rows"], meta["documents"], meta["held_out"]) == (101, 95, 5)
    assert re.search(r"supervised tokens\W+" + f"{meta['supervised_tokens']:,}", printed)


def test_documents_counts_and_meta(model, tmp_path, small_chunks):
    some = rows(50)
    meta, printed = run(
        model,
        tmp_path / "data",
        jsonl(tmp_path / "a.jsonl", some[:30]),
        jsonl(tmp_path / "b.jsonl", some[30:]),
    )
    index = DocumentIndex(tmp_path / "data")
    assert texts(tmp_path / "data") == answers(some)  # in the order of the rows
    assert len(index) == meta["documents"] == meta["rows"] == 50
    assert meta["tokens"] == index.lengths.sum() == sum(len(index.tokens(i)) for i in range(50))
    assert meta["supervised_tokens"] == sum(int((index.spans(i)[:, 1] - index.spans(i)[:, 0]).sum()) for i in range(50))
    assert meta["longest"] == index.lengths.max()
    assert meta["dropped"] == {} and not (tmp_path / "data" / "dropped.jsonl").exists()
    assert meta["end_tokens"] == ["<|im_end|>"]
    assert meta["tokenizer_fingerprint"] == tokenizer_fingerprint(small_tokenizer())
    assert index.fingerprint == meta["fingerprint"] == index.meta["fingerprint"]
    assert "warning" not in printed and "note" not in printed


def test_bad_rows_are_dropped_counted_and_kept(model, tmp_path, small_chunks):
    good = rows(40)
    lines = [
        *good[:20],
        "",
        '{"question": "a"',
        {"prose": "b"},
        *good[20:],
        chat(("user", "u")),
        {"prose": "c"},
        [1],
    ]
    meta, printed = run(model, tmp_path / "data", jsonl(tmp_path / "a.jsonl", lines))
    assert meta["rows"] == 45 and meta["documents"] == 40  # an empty line is no row
    where = str(tmp_path / "a.jsonl")
    found = {reason: (drop["count"], drop["first"].split(": ")[0]) for reason, drop in meta["dropped"].items()}
    assert found == {
        "not JSON": (1, f"{where}:22"),
        "unknown fields": (2, f"{where}:23"),
        "no assistant turn": (1, f"{where}:44"),
        "not an object": (1, f"{where}:46"),
    }
    assert f"dropped 2: unknown fields, first {where}:23: the row has prose" in printed
    kept = [json.loads(line) for line in (tmp_path / "data" / "dropped.jsonl").read_text().splitlines()]
    assert [drop["line"] for drop in kept] == [22, 23, 44, 45, 46]
    assert kept[0]["row"] == '{"question": "a"' and kept[3]["row"] == {"prose": "c"}
    assert texts(tmp_path / "data") == answers(good)


def test_strict_names_the_first_bad_row(model, tmp_path, small_chunks):
    source = jsonl(tmp_path / "a.jsonl", [*rows(30), {"prose": "b"}, *rows(30), "{", *rows(5)])
    with pytest.raises(ValueError, match=r"a\.jsonl:31: unknown fields: the row has prose"):
        run(model, tmp_path / "data", source, strict=True)
    assert not (tmp_path / "data").exists()


def test_rows_that_are_all_bad_are_an_error(model, tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [chat(("user", "u"), ("robot", "r"))] * 3)
    with pytest.raises(
        ValueError, match=r"none of 3 rows can be used: 3 x unknown role \(first .*a\.jsonl:1: the role of message 1"
    ):
        run(model, tmp_path / "data", source)
    assert not (tmp_path / "data").exists()


def test_every_kind_of_source_gives_the_same_documents(model, tmp_path, small_chunks):
    some = rows(30)
    expected = answers(some)
    (tmp_path / "list.json").write_text(json.dumps(some))
    (tmp_path / "data.json").write_text(json.dumps({"version": 1, "data": some}, indent=1))
    jsonl(tmp_path / "lines.json", some)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some), tmp_path / "table.parquet", row_group_size=8)
    datasets.Dataset.from_list(some).save_to_disk(tmp_path / "saved")
    splits = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(some), "test": datasets.Dataset.from_list(some[:2])}
    )
    splits.save_to_disk(tmp_path / "splits")
    sources = ["list.json", "data.json", "lines.json", "table.parquet", "saved", "splits::train"]
    for number, name in enumerate(sources):
        run(model, tmp_path / f"data{number}", f"{tmp_path}/{name}")
        assert texts(tmp_path / f"data{number}") == expected, name
    run(model, tmp_path / "test", tmp_path / "splits", split="test")
    assert texts(tmp_path / "test") == expected[:2]
    with pytest.raises(ValueError, match="choose one of its splits with --split: train, test"):
        run(model, tmp_path / "none", tmp_path / "splits")


def test_directories_of_files_load_as_data_sets(model, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    jsonl(folder / "train.jsonl", rows(9))
    run(model, tmp_path / "data", f"{folder}::train")
    assert texts(tmp_path / "data") == answers(rows(9))


def test_limit_counts_rows_of_each_source_after_where(model, tmp_path, small_chunks):
    some = rows(60)
    first, second = jsonl(tmp_path / "a.jsonl", ["", *some[:25]]), jsonl(tmp_path / "b.jsonl", some[25:])
    meta, _ = run(model, tmp_path / "data", first, second, limit=30)
    assert texts(tmp_path / "data") == answers([*some[:25], *some[25:55]])
    where = ("'5' in question",)
    meta, _ = run(model, tmp_path / "few", first, second, limit=3, where=where)
    kept = [row for row in some if "5" in row["question"]]  # 5, 15, then 25, 35, 45
    assert texts(tmp_path / "few") == answers(kept[:5])
    assert (meta["rows"], meta["filtered"], meta["documents"]) == (46, 41, 5)  # all of a, b up to its third


def test_hold_out_is_disjoint_and_repeatable(model, tmp_path, small_chunks):
    source = jsonl(tmp_path / "a.jsonl", rows(50))
    meta, printed = run(model, tmp_path / "data", source, hold_out_fraction=0.1)
    train, valid = texts(tmp_path / "data"), texts(tmp_path / "data" / "valid")
    assert len(valid) == meta["held_out"] == 5 and len(train) == 45
    assert sorted(train + valid) == sorted(answers(rows(50)))
    assert re.search(r"held out\W+5", printed)
    run(model, tmp_path / "other", source, hold_out=5, seed=1)
    assert texts(tmp_path / "other" / "valid") != valid
    with pytest.raises(ValueError, match="--hold-out 50 would leave nothing of 50 documents"):
        run(model, tmp_path / "all", source, hold_out=50)


def test_prompt_and_fields(model, tmp_path):
    (tmp_path / "prompt.yaml").write_text("system: Put it in \\boxed{}.\nuser: 'Q: {ask}'\n")
    source = jsonl(tmp_path / "a.jsonl", [{"ask": "1+1?", "say": "2"}, {"question": "1+1?", "say": "2"}])
    fields = Fields(question="ask", answer="say")
    meta, _ = run(model, tmp_path / "data", source, prompt=tmp_path / "prompt.yaml", fields=fields)
    index = DocumentIndex(tmp_path / "data")
    assert small_tokenizer().decode(index.tokens(0)) == (
        "<|im_start|>system\nPut it in \\boxed{}.<|im_end|>\n<|im_start|>user\nQ: 1+1?<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n"
    )
    assert meta["dropped"]["unknown fields"]["count"] == 1
    assert meta["options"]["prompt"]["user"] == "Q: {ask}"


def test_tokenizer_larger_than_the_model_is_refused(tmp_path):
    small_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"vocab_size": 17}')
    source = jsonl(tmp_path / "a.jsonl", rows(3))
    with pytest.raises(ValueError, match=r"has \d+ tokens, .*model has embeddings for 17: .*--resize-embeddings"):
        run(tmp_path / "model", tmp_path / "data", source)
    meta, _ = run(tmp_path / "model", tmp_path / "data", source, resize_embeddings=True)
    assert meta["documents"] == 3 and meta["options"]["resize_embeddings"]


def test_what_a_user_can_mend_is_named(model, tmp_path):
    source, folder = jsonl(tmp_path / "a.jsonl", rows(3)), tmp_path / "damaged"
    small_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"vocab_size": ')
    (tmp_path / "open.jinja").write_text("{% for m in messages %}")
    (tmp_path / "empty.jinja").write_text("{{ messages | length }}")
    mixed = (Source(data=str(source), name="talk", format="messages", prompt="math"), source)
    for sources, options, message in (
        ((source,), {"model": str(folder)}, f"--model {folder}: {folder}/config.json is damaged"),
        ((source,), {"chat_template": tmp_path / "open.jinja"}, "--chat-template .*open.jinja: .* is not Jinja"),
        ((source,), {"chat_template": tmp_path / "empty.jinja"}, "empty.jinja: .*no assistant turn.*: give another$"),
        ((source,), {"prompt": "Solve {problem}. " * 30}, "--prompt Solve {problem}. .*: there is no such file"),
        (mixed, {}, "--sources talk: --format messages takes whole conversations"),
    ):
        with pytest.raises(ValueError, match=message):
            run(options.pop("model", model), tmp_path / "data", *sources, **options)


def test_names_that_no_terminal_can_show_end_nothing(model, tmp_path):
    odd = [{"\ud800": 1}, *({**row, "\ud801": 1} for row in rows(3))]
    source = jsonl(tmp_path / "a.jsonl", odd)
    for options in ({}, {"preview": 1}):
        _, printed = run(model, tmp_path / "data", source, **options)
        assert r"the row has \ud800: name two" in printed
        printed.encode()  # as a terminal does


@pytest.mark.skipif(not GSM8K.is_file(), reason="needs gsm8k_train.jsonl in LATHE_DATA")
def test_real_problems(model, tmp_path):
    meta, _ = run(model, tmp_path / "data", GSM8K)
    assert (meta["rows"], meta["documents"], meta["dropped"]) == (7473, 7473, {})
    index, lines = DocumentIndex(tmp_path / "data"), GSM8K.read_text(encoding="utf-8").splitlines()
    for number in (0, 3000, 7472):
        row = json.loads(lines[number])
        (first, stop), *more = index.spans(number)
        assert small_tokenizer().decode(index.tokens(number)[first:stop]) == row["answer"] + "<|im_end|>"
        assert more == []
