"""What --data and --valid name, and what a run says of the rows that its data has lost before it costs anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.audit import lost_rows
from data.index import write_index
from data.order import GlobalOrder
from engine.run_data import audit, check_batch, check_data, check_held_out, model_data, open_data, open_valid
from tests.support.tiny import VOCABULARY, conversations


def made(path: Path, **meta) -> Path:
    """A data directory of three documents whose meta.json says so."""
    write_index(path, conversations(3).documents, vocab_size=VOCABULARY, meta=meta)
    return path


def opened(path: Path, **meta):
    return open_data((str(made(path, **meta)),))[0][0]


def drops(**counts: int) -> dict:
    return {reason.replace("_", " "): {"count": count, "first": "a:1"} for reason, count in counts.items()}


def test_held_out_sets_have_names(tmp_path):
    for name in ("a/valid", "b/valid", "c", "with=sign"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        made(tmp_path / name)

    def names(*arguments: str) -> dict[str, tuple[str, float]]:
        found = open_valid(tuple(argument.format(tmp_path) for argument in arguments))
        return {name: (str(index.path.relative_to(tmp_path)), weight) for name, (index, weight) in found.items()}

    assert names("{}/c", "math={}/a/valid:0.5") == {"c": ("c", 1.0), "math": ("a/valid", 0.5)}
    # Directories of one name are told apart by their paths, unless a name is given.
    both = {f"{tmp_path}/a/valid": ("a/valid", 1.0), f"{tmp_path}/b/valid": ("b/valid", 1.0)}
    assert names("{}/a/valid", "{}/b/valid") == both
    assert names("one={}/a/valid", "{}/b/valid") == {"one": ("a/valid", 1.0), "valid": ("b/valid", 1.0)}
    assert list(names("{}/with=sign")) == ["with=sign"]
    for wrong, sentence in (
        (("x={}/c", "x={}/a/valid"), "--valid names two sets x"),
        (("{}/c", "{}/c"), "--valid names two sets /"),
        (("={}/c",), "give NAME=DATA, or DATA alone"),
        (("x=",), "give NAME=DATA, or DATA alone"),
        (("x={}/nowhere",), "nowhere: there is no such data directory"),
        (("x={}/c:0",), "the weight must be above 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            names(*wrong)


def refused(index, **options) -> str:
    with pytest.raises(ValueError) as caught:
        audit([index], **{"max_dropped": 0.01, "allow_unsupervised": False, **options})
    return str(caught.value)


def test_lost_rows_stop_a_run(tmp_path):
    """13 of the 1,200 rows that --where kept: 1.08%, just above the share that passes."""
    meta = {"rows": 1500, "filtered": 300, "dropped": drops(no_answer=4, empty_turn=9)}
    index = opened(tmp_path / "data", **meta)
    sentence = refused(index)
    assert sentence == (
        f'--data {index.path}: its preparation dropped 13 of 1,200 rows (1.08%), 9 of them for "empty turn"; look at '
        f"{index.path}/dropped.jsonl and prepare the data again, or allow it with --max-dropped 0.011"
    )
    audit([index], max_dropped=0.011, allow_unsupervised=False)
    half = opened(tmp_path / "half", rows=50, filtered=0, dropped=drops(no_answer=29))
    assert refused(half).endswith("--max-dropped 0.58")
    audit([half], max_dropped=0.58, allow_unsupervised=False)  # 0.58 * 50 is below 29 in floating point
    assert "--max-dropped 0.011" in refused(index, max_dropped=0.0, allow_unsupervised=True)
    audit(
        [opened(tmp_path / "few", **meta | {"dropped": drops(no_answer=12)})],
        max_dropped=0.01,
        allow_unsupervised=False,
    )


def test_rows_dropped_on_request_are_not_lost(tmp_path):
    reasons = {"duplicate_of_an_earlier_prompt": 500, "overlaps_a_test_question": 200, "no_answer": 1}
    index = opened(tmp_path / "data", rows=1000, filtered=0, dropped=drops(**reasons))
    audit([index], max_dropped=0.01, allow_unsupervised=False)
    assert str(lost_rows(index.meta)) == '1 of 1,000 rows (0.10%), 1 of them for "no answer"'
    only = opened(tmp_path / "only", rows=10, filtered=0, dropped=drops(duplicate=9))
    assert lost_rows(only.meta) is None


def test_older_directories_pass(tmp_path):
    for number, meta in enumerate(({}, {"rows": 9}, {"dropped": drops(no_answer=5)}, {"rows": 5, "filtered": 5})):
        audit([opened(tmp_path / str(number), **meta)], max_dropped=0.0, allow_unsupervised=False)


def test_what_trains_nothing_stops_a_run(tmp_path):
    kinds = {
        "chat": {"rows": 90, "documents": 90, "supervised_tokens": 400},
        "tool calls": {"rows": 10, "documents": 10, "supervised_tokens": 0},
        "text": {"rows": 3, "documents": 0, "supervised_tokens": 0},  # perhaps the three that were left out
        "rendered": {"rows": 4, "documents": 0, "supervised_tokens": 0},  # one of them at least was lost
    }
    sources = [
        {"name": "math", "rows": 95, "filtered": 0, "supervised_tokens": 400},
        {"name": "code", "rows": 5, "filtered": 0, "supervised_tokens": 0},
        {"name": "kept back", "rows": 9, "filtered": 3, "held_out": 5, "documents": 0, "supervised_tokens": 0},
    ]
    sources[2]["dropped"] = {"duplicate prompt": 1}
    more = {"held_out": 1, "not_taken": 1, "dropped": drops(duplicate_prompt=1, no_answer=1)}
    path = made(tmp_path / "data", rows=109, filtered=0, **more)
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(meta | {"kind_counts": kinds, "sources": sources}))
    index = open_data((str(path),))[0][0]
    sentence = refused(index)
    silent = "the 10 rows of kind tool calls and the 4 rows of kind rendered and the 5 rows of source code; "
    assert f"no token is supervised in {silent}" in sentence and "--allow-unsupervised" in sentence
    audit([index], max_dropped=0.01, allow_unsupervised=True)
    index.meta["held_out_of"] = "data"
    audit([index], max_dropped=0.01, allow_unsupervised=False)


def test_templates_are_compared_as_they_are(tmp_path):
    """Text and rendered rows have none and mix with anything; several by name are a dict."""
    named = {"default": "a", "tool_use": "b"}
    one = opened(tmp_path / "one", chat_template=named, end_token_ids=[5])
    same = opened(tmp_path / "same", chat_template=dict(named), end_token_ids=[5])
    other = opened(tmp_path / "other", chat_template={**named, "tool_use": "c"}, end_token_ids=[5])
    single = opened(tmp_path / "single", chat_template="a", end_token_ids=[5])
    text = opened(tmp_path / "text", chat_template=None, end_token_ids=[9])
    check_data([text, one, same, text], VOCABULARY)
    for different in (other, single):
        with pytest.raises(ValueError, match="different chat templates"):
            check_data([text, one, different], VOCABULARY)
    found = model_data([text, one], [other])
    assert found == {"tokenizer": None, "chat_template": named, "end_token_ids": [9, 5]}
    for name in ("text", "other"):
        (tmp_path / name / "tokenizer").mkdir()
    other.meta["vocab_size"] = VOCABULARY + 1
    assert model_data([text, one], [other])["tokenizer"] == tmp_path / "other" / "tokenizer"


def test_held_out_data_is_not_trained_on(tmp_path):
    """By its place, and by what it holds: a copy is no other data."""
    trained, same = opened(tmp_path / "trained"), opened(tmp_path / "copy")
    write_index(tmp_path / "other", conversations(3, seed=7).documents, vocab_size=VOCABULARY)
    other = open_data((str(tmp_path / "other"),))[0][0]
    check_held_out([trained], {"valid": other})
    for index in (trained, same):
        with pytest.raises(ValueError) as caught:
            check_held_out([other, trained], {"valid": index})
        assert f"--valid {index.path} holds the same documents as --data {trained.path}" in str(caught.value)


@pytest.mark.parametrize(("unit", "size"), [("conversations", "14 conversations"), ("sequences", "4 packed sequences")])
def test_a_batch_is_no_larger_than_an_epoch(unit, size):
    most = int(size.split()[0])
    shape = {"seq_len": 96, "pad_documents_to": 2, "too_long": "error", "seed": 1}
    order = GlobalOrder([(conversations(14), 1.0)], global_batch_size=5000, batch_unit=unit, **shape)
    assert order.size_of_epoch(0) == most
    check_batch(order, most, unit)
    with pytest.raises(ValueError) as caught:
        check_batch(order, 5000, unit)
    assert str(caught.value).startswith(f"--global-batch-size 5,000 is more than the {size} of an epoch of --data")
    assert str(caught.value).endswith(f"give --global-batch-size {most} or less")
