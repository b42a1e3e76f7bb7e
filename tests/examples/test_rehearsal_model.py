"""A rehearsal learns its tokenizer from rows of every format, and makes no model where there are none to use."""

import json

import pytest

from examples import rehearsal_model

WORDS = "apples and oranges are counted by the merchant's daughter"
SMALL = ["--hidden-size", "16", "--intermediate-size", "16", "--num-layers", "1", "--num-heads", "2"]
SMALL += ["--num-key-value-heads", "1", "--vocab-size", "300"]


@pytest.fixture
def source(tmp_path):
    def write(*rows) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
        return str(path)

    return write


def test_the_tokenizer_learns_from_rows_of_every_format(source, tmp_path, capsys):
    from transformers import AutoTokenizer

    rows = [{"prompt": f"How many? {number}", "completion": WORDS} for number in range(20)]
    rows += [{"text": WORDS}, {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": WORDS}]}]
    arguments = ["--sources", source(*rows, {"problem": "no answer"}, "{"), "--output", str(tmp_path / "model"), *SMALL]
    assert rehearsal_model.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "left out: 1 x unknown fields" in printed and "left out: 1 x not JSON" in printed
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert len(tokenizer) == 300
    assert len(tokenizer(WORDS)["input_ids"]) < len(WORDS) / 2  # it knows these words
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("row", "flags", "sentence"),
    [
        ({"query": "a", "reply": "b"}, [], "no row can be used (1 x unknown fields): name their --format, or"),
        ({"query": "a", "reply": "b"}, ["--format", "alpacca"], "--format alpacca: there is no such format"),
        ("{", ["--fields.question", "query"], "no row can be used (1 x not JSON)"),
    ],
)
def test_rows_that_cannot_be_used_make_no_model(source, tmp_path, capsys, row, flags, sentence):
    arguments = ["--sources", source(row), "--output", str(tmp_path / "model"), *flags]
    assert rehearsal_model.main(arguments) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
    assert rehearsal_model.main(["--sources", str(tmp_path / "no.jsonl"), "--output", str(tmp_path / "model")]) == 2
    assert "--sources" in capsys.readouterr().err
