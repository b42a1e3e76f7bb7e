"""A user's mistakes and a machine's: one sentence, nothing lost, nothing half-done left behind."""

from __future__ import annotations

import copy
import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data.index import write_index
from engine.check_model import check_model
from engine.checkpointing import saver
from engine.checkpointing.resume_point import find_resume_point
from engine.cli import parse_run
from engine.prepare import prepare_run
from engine.train import train
from models.hf_config import describe
from tests.support.marks import slow
from tests.support.tiny import VOCABULARY, conversations, make_inputs, save_model

SHAPE = ["--seq-len", "96", "--global-batch-size", "4", "--steps", "2", "--precision", "fp32", "--optim.lr", "1e-3"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def arguments(inputs: Path, output: Path, *extra: str, model: str = "model") -> list[str]:
    fixed = ["--model", inputs / model, "--data", inputs / "data", "--output", output]
    return [*map(str, fixed), *SHAPE, *extra]


def refusal(inputs: Path, output: Path, *extra: str, model: str = "model", ranks: int = 1) -> str:
    """The sentence with which a run is refused before anything starts."""
    config = parse_run(arguments(inputs, output, *extra, model=model))
    with pytest.raises(ValueError) as caught:
        prepare_run(config, world_size=ranks, cuda=False)
    assert not output.exists()
    return str(caught.value)


def altered(inputs: Path, name: str, change) -> str:
    """A copy of the model directory under another name, changed by `change(path)`."""
    target = inputs / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(inputs / "model", target)
    change(target)
    return name


def edit_tensors(change):
    def edit(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    return edit


def test_model_directories_that_are_refused(inputs, tmp_path):
    output = tmp_path / "run"
    missing = altered(inputs, "missing", edit_tensors(lambda tensors: tensors.pop("model.norm.weight")))
    assert "lacks 1 tensor(s): model.norm.weight" in refusal(inputs, output, model=missing)
    extra = altered(inputs, "extra", edit_tensors(lambda tensors: tensors.update({"stray": torch.ones(1)})))
    assert "stray" in refusal(inputs, output, model=extra)

    def truncate(path: Path) -> None:
        file = path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-10])

    assert "model.safetensors" in refusal(inputs, output, model=altered(inputs, "cut", truncate))

    def unknown(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"architectures": ["NewForCausalLM"]}))

    sentence = refusal(inputs, output, model=altered(inputs, "unknown", unknown))
    assert "unsupported architecture NewForCausalLM: supported are" in sentence
    assert "there is no such directory" in refusal(inputs, output, model="../no/such/place")


def test_runs_that_are_refused(inputs, tmp_path):
    output = tmp_path / "run"
    assert "start 4 ranks" in refusal(inputs, output, "--tp", "2", "--cp", "2", ranks=2)
    assert "max_position_embeddings 256" in refusal(inputs, output, "--seq-len", "512")
    assert "there is no such data directory" in refusal(inputs, output, "--data", str(inputs / "nowhere"))
    assert "the weight must be above 0" in refusal(inputs, output, "--data", f"{inputs / 'data'}:-1")
    assert "--backend te cannot run here" in refusal(inputs, output, "--backend", "te")
    assert "--precision fp8 needs --backend te" in refusal(inputs, output, "--precision", "fp8")


def test_experts_too_narrow_for_their_product(tmp_path):
    """Rows of whole 16 bytes: 24 numbers a rank fit in bf16 and fp32, 12 in fp32 alone, 6 in neither."""

    def check(precision: str, etp: int, **changes) -> None:
        description = describe(save_model("qwen3_moe", tmp_path / f"{etp}", layers=1, **changes))
        flags = ["--precision", precision, "--etp", str(etp), "--tp", "2", "--seq-len", "96"]
        check_model(parse_run(flags), description, 8, pad_multiple=2)

    for precision, etp in (("bf16", 2), ("fp32", 2), ("fp32", 4)):
        check(precision, etp)
    with pytest.raises(
        ValueError, match=r"--etp 4 .* hidden size 64 and .* size 12 \(of 48\), .* of 8 .* among 1, 2, 3$"
    ):
        check("bf16", 4)
    with pytest.raises(
        ValueError, match=r"--etp 8 .* size 6 \(of 48\), .* of 4 alone; choose --etp among 1, 2, 3, 4, 6$"
    ):
        check("fp32", 8)
    with pytest.raises(ValueError, match=r"--etp 1 .* hidden size 68 .* does not train at this --precision"):
        check("bf16", 1, hidden_size=68)
    check("fp32", 1, hidden_size=68)


def outcome(arguments: list[str], file_limit: int | None = None) -> str:
    """Trains in a pool's process, with an upper limit on file sizes in bytes if asked; returns the error."""
    from engine.layout import world_from_environment

    config = parse_run(arguments)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, limits[1]))
        train(prepare_run(config, world_size=world_from_environment()[1], cuda=False))
    except (ValueError, OSError, FloatingPointError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return ""


def test_documents_longer_than_a_bin(pool, inputs, tmp_path):
    lengths = [len(tokens) for tokens, _ in conversations(10).documents]
    too_long = sum(length > 30 for length in lengths)
    assert 0 < too_long < 10
    base = arguments(inputs, tmp_path / "run", "--seq-len", "30")
    sentence = pool.run(outcome, 1, base)[0]
    assert f"{too_long} of 10 documents" in sentence and str(max(lengths)) in sentence and "truncate" in sentence
    for choice in ("drop", "truncate"):
        output = tmp_path / choice
        whole = str(10 - too_long * (choice == "drop"))  # all documents that stay
        extra = ["--too-long", choice, "--output", str(output), "--steps", "1", "--global-batch-size", whole]
        extra += ["--allow-unsupervised"]  # truncated at 30 tokens, some of these have none left
        assert pool.run(outcome, 1, [*base, *extra])[0] == ""
        line = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
        kept = sum(min(length, 30) for length in lengths if choice == "truncate" or length <= 30)
        assert line["tokens"] == kept


def test_loss_that_is_not_finite_stops_before_the_update(pool, inputs, tmp_path):
    """One document holds a token whose embedding is infinite; only its microbatch is named."""
    index = conversations(4)
    tokens = index.documents[2][0]
    tokens[0] = VOCABULARY - 1
    for number, (others, _) in enumerate(index.documents):
        if number != 2:
            others[others == VOCABULARY - 1] = 0
    write_index(tmp_path / "data", index.documents, vocab_size=VOCABULARY)

    def poison(tensors):
        tensors["model.embed_tokens.weight"][VOCABULARY - 1] = torch.inf

    model = altered(inputs, "poisoned", edit_tensors(poison))
    output = tmp_path / "run"
    extra = ("--data", str(tmp_path / "data"), "--seq-len", "48", "--steps", "3")
    for layout, ranks in (((), 2), (("--pp", "2"), 2)):
        shutil.rmtree(output, ignore_errors=True)
        found = pool.run(outcome, ranks, arguments(inputs, output, *extra, *layout, model=model))
        assert len(set(found)) == 1
        assert found[0].startswith("FloatingPointError: step 1: the loss is not finite, the update was not made")
        assert f"{tmp_path / 'data'}:2" in found[0]
        assert (output / "metrics.jsonl").read_text() == "" and find_resume_point(output) is None


@pytest.mark.parametrize("ranks", [slow(1), 2])
def test_full_disk_leaves_earlier_checkpoints_whole(pool, inputs, tmp_path, ranks):
    output = tmp_path / "run"
    assert pool.run(outcome, ranks, arguments(inputs, output, "--steps", "1")) == [""] * ranks
    longer = arguments(inputs, output, "--steps", "2")
    for sentence in pool.run(outcome, ranks, longer, 20_000):
        assert sentence.startswith("CheckpointFailed: ")
        assert "step_000002 could not be written and nothing of it is left" in sentence
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["latest", "step_000001"]
    assert find_resume_point(output).step == 1
    assert pool.run(outcome, ranks, longer) == [""] * ranks
    assert find_resume_point(output).step == 2
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


def test_a_save_that_cannot_fit_is_refused_before_it_starts(monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(saver.shutil, "disk_usage", lambda path: usage._replace(free=15 * 10**6))
    with pytest.raises(OSError, match=r"0.01 GiB are needed and 0.01 GiB are free"):
        saver._check_space(tmp_path, 16 * 10**6)
    saver._check_space(tmp_path, 14 * 10**6)


def test_weights_of_several_dtypes_are_refused_before_anything_starts(inputs, tmp_path):
    def narrow(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()

    model = altered(inputs, "mixed", edit_tensors(narrow))
    assert "weights of one dtype are needed" in refusal(inputs, tmp_path / "run", model=model)


def test_tokenizer_that_does_not_match(inputs, tmp_path):
    from tests.support.chatting import small_tokenizer

    first, second = copy.deepcopy(small_tokenizer()), copy.deepcopy(small_tokenizer())
    second.add_tokens(["<|another|>"])
    model = altered(inputs, "with_tokenizer", first.save_pretrained)
    documents = conversations(4).documents
    from data.preparation.tokenizer import tokenizer_fingerprint

    meta = {"tokenizer_fingerprint": tokenizer_fingerprint(second)}
    write_index(tmp_path / "data", documents, vocab_size=VOCABULARY, meta=meta)
    sentence = refusal(inputs, tmp_path / "run", "--data", str(tmp_path / "data"), model=model)
    assert "was prepared with another tokenizer" in sentence
    from transformers import AutoTokenizer

    meta = {"tokenizer_fingerprint": tokenizer_fingerprint(AutoTokenizer.from_pretrained(inputs / model))}
    write_index(tmp_path / "same", documents, vocab_size=VOCABULARY, meta=meta)
    config = parse_run(arguments(inputs, tmp_path / "run", "--data", str(tmp_path / "same"), model=model))
    assert np.array_equal(
        prepare_run(config, world_size=1, cuda=False).order.indexes[0].lengths, [len(t) for t, _ in documents]
    )
