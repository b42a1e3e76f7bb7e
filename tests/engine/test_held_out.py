"""Losses of held-out sets and of sources in real runs: what a line holds, under which layout, and after a resume."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from torch import distributed

from data.index import IndexWriter, write_index
from data.token_files import write_idx
from engine import trainer
from engine.checkpointing.resume_point import find_resume_point
from engine.cli import parse_run
from engine.prepare import prepare_run
from engine.reporting.metrics import LEFT_OUT
from engine.run_folder import RunFolder
from tests.engine.checkpointing.test_resume import metrics
from tests.engine.test_failures import outcome, refusal
from tests.support.chatting import small_tokenizer
from tests.support.tiny import VOCABULARY, conversations, edit_meta, save_model

SHAPE = "--seq-len 96 --global-batch-size 6 --steps 3 --precision fp32 --optim.lr 1e-2 --pad-documents-to 4"


def write_mixed(path: Path, seed: int) -> Path:
    """A data directory of twelve documents of two sources."""
    index = conversations(12, seed, sources=2)
    writer = IndexWriter(path, vocab_size=VOCABULARY)
    for number, (tokens, spans) in enumerate(index.documents):
        one = np.array([len(tokens)]), spans, np.array([len(spans)]), index.sources[number : number + 1]
        writer.add(tokens, *one)
    writer.close({"sources": [{"name": "cot"}, {"name": "tir"}]})
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_model("qwen2_untied", folder / "model", layers=2)
    write_mixed(folder / "mixed", 1)
    write_mixed(folder / "held", 2)
    for name, count, seed in (("plain", 9, 3), ("math", 7, 4)):
        write_index(folder / name, conversations(count, seed).documents, vocab_size=VOCABULARY)
    silent = [(tokens, spans[:0]) for tokens, spans in conversations(4, 5).documents]
    write_index(folder / "silent", silent, vocab_size=VOCABULARY)
    return folder


def arguments(inputs: Path, output: Path, *extra: str) -> list[str]:
    base = ["--model", inputs / "model", "--data", inputs / "mixed", inputs / "plain", "--output", output]
    return [*map(str, base), *SHAPE.split(), *extra]


def held_out(inputs: Path, *names: str) -> list[str]:
    return ["--valid", *(name.format(inputs) for name in names), "--valid-every", "2"]


SETS = ("{}/held", "problems={}/math", "{}/silent")


@pytest.fixture(scope="module")
def whole(pool, inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    given = arguments(inputs, output, *held_out(inputs, *SETS), "--valid-at-start")
    assert pool.run(outcome, 1, given) == [""]
    return output


def test_each_set_and_source_has_its_loss(inputs, whole):
    lines = metrics(whole)
    assert [line["step"] for line in lines if "valid_loss" in line] == [2, 3]
    assert [line["step"] for line in lines if "valid_loss_at_start" in line] == [1]
    for line, end in ((lines[0], "_at_start"), (lines[1], ""), (lines[2], "")):
        losses = line[f"valid_losses{end}"]
        assert list(losses) == ["held", "problems", "silent"] and losses["silent"] is None
        counts = [supervised(conversations(12, 2)), supervised(conversations(7, 4))]
        mean = np.average([losses["held"], losses["problems"]], weights=counts)
        assert line[f"valid_loss{end}"] == pytest.approx(mean, rel=1e-9)
        sources = line[f"valid_source_losses{end}"]
        assert list(sources) == ["held/cot", "held/tir"]
        assert min(sources.values()) < losses["held"] < max(sources.values())
    assert None in [loss for line in lines for loss in line["source_losses"].values()]
    for line in lines:
        losses, tokens = line["source_losses"], line["source_tokens"]
        assert list(losses) == list(tokens) == ["cot", "tir", "plain"]
        assert [losses[name] is None for name in losses] == [not tokens[name] for name in losses]
        assert sum(tokens.values()) == line["supervised_tokens"]
        total = sum(losses[name] * tokens[name] for name in tokens if tokens[name])
        assert total == pytest.approx(line["loss"] * line["supervised_tokens"], rel=1e-6)


def supervised(index) -> int:
    """Tokens that are predicted and count: the first of a document is never predicted."""
    return sum(int((spans[:, 1] - np.maximum(spans[:, 0], 1)).sum()) for _, spans in index.documents)


def test_a_set_is_measured_as_if_it_were_alone(pool, inputs, whole, tmp_path):
    """And in two ranks as in one."""
    given = arguments(inputs, tmp_path / "run", *held_out(inputs, "{}/held"), "--valid-at-start", "--cp", "2")
    assert pool.run(outcome, 2, given) == ["", ""]
    for found, wanted in zip(metrics(tmp_path / "run"), metrics(whole), strict=True):
        for field in ("valid_losses", "valid_losses_at_start"):
            assert (field in found) == (field in wanted)
            if field in found:
                assert found[field] == {"held": pytest.approx(wanted[field]["held"], rel=1e-5)}
                assert found[field.replace("losses", "loss")] == found[field]["held"]
        assert found["source_tokens"] == wanted["source_tokens"]
        losses = [np.array(list(line["source_losses"].values()), float) for line in (found, wanted)]
        np.testing.assert_allclose(*losses, rtol=1e-5)  # nan for null, which must agree


def test_a_resumed_run_does_not_measure_its_start_again(pool, inputs, whole, tmp_path):
    sets = (*held_out(inputs, *SETS), "--valid-at-start")
    for steps in ("2", "3"):
        short = arguments(inputs, tmp_path / "run", *sets, "--steps", steps, "--optim.schedule", "constant")
        assert pool.run(outcome, 1, short) == [""]
    lines = metrics(tmp_path / "run")
    assert [sorted(key for key in line if key.startswith("valid")) for line in lines[1:]] == [
        ["valid_loss", "valid_losses", "valid_source_losses"]
    ] * 2
    assert lines[0]["valid_losses_at_start"] == metrics(whole)[0]["valid_losses_at_start"]


def test_the_start_is_the_model_that_was_given(pool, inputs, whole, tmp_path):
    """At a rate of nought it is still that model after a step; a run with one source tells none apart."""
    extra = ("--data", str(inputs / "plain"), "--steps", "1", "--optim.lr", "0", "--valid-at-start")
    given = arguments(inputs, tmp_path / "run", *extra, *held_out(inputs, "problems={}/math"))
    assert pool.run(outcome, 1, given) == [""]
    (line,) = metrics(tmp_path / "run")
    first = metrics(whole)[0]["valid_losses_at_start"]["problems"]
    assert line["valid_losses"] == line["valid_losses_at_start"] == {"problems": first}
    assert [key for key in line if "source" in key] == []


def test_truncation_to_nothing_is_refused_or_null(pool, inputs, tmp_path):
    """Only the prompts of these fit into a sequence."""
    for name, first in (("trained", 1), ("long", 0)):
        documents = [(np.arange(first, first + 60) % VOCABULARY, [[50, 60]]) for _ in range(6)]
        write_index(tmp_path / name, documents, vocab_size=VOCABULARY)
    extra = ("--data", str(tmp_path / "trained"), "--valid", str(tmp_path / "long"), "--seq-len", "32", "--steps", "1")
    sentence = refused(inputs, tmp_path / "run", *extra, "--too-long", "truncate")
    assert "leaves 6 of 6 documents without a supervised token" in sentence and "--allow-unsupervised" in sentence
    only_held_out = ("--data", str(inputs / "plain"), "--seq-len", "48", "--too-long", "truncate")
    assert "--valid long: --too-long truncate leaves 6 of 6" in refused(
        inputs, tmp_path / "run", *extra, *only_held_out
    )
    edit_meta(tmp_path / "trained", kind_counts={"chat": {"rows": 6, "documents": 6, "supervised_tokens": 0}})
    allowed = (*extra, "--too-long", "truncate", "--allow-unsupervised")
    (printed,) = pool.run(start, 1, inputs, tmp_path / "run", *allowed)
    assert "truncated 6 (6 to nothing supervised), packed" in printed
    assert f"\nno token is supervised in the 6 rows of kind chat of {tmp_path / 'trained'}\n" in printed
    (line,) = metrics(tmp_path / "run")
    assert (line["loss"], line["valid_loss"], line["valid_losses"]) == (None, None, {"long": None})
    edit_meta(tmp_path / "trained", kind_counts={})
    assert pool.run(outcome, 1, arguments(inputs, tmp_path / "cut", *extra, "--too-long", "cut")) == [""]
    (line,) = metrics(tmp_path / "cut")
    assert line["supervised_tokens"] == 6 * 10 and line["valid_loss"] > 0


def refused(inputs: Path, output: Path, *extra: str) -> str:
    return refusal(inputs, output, "--data", str(inputs / "plain"), *extra)


def test_held_out_flags_without_data(inputs, tmp_path):
    assert "--valid-at-start needs held-out data" in refused(inputs, tmp_path / "run", "--valid-at-start")
    assert "--max-dropped 3.0 is a share" in refused(inputs, tmp_path / "run", "--max-dropped", "3")


def test_lost_rows_stop_a_run_before_the_model_is_read(inputs, tmp_path):
    meta = {"rows": 50, "filtered": 0, "dropped": {"no answer": {"count": 2, "first": "a:1"}}}
    write_index(tmp_path / "data", conversations(6).documents, vocab_size=VOCABULARY, meta=meta)
    extra = ("--data", str(tmp_path / "data"))
    assert "dropped 2 of 50 rows (4.00%)" in refused(inputs, tmp_path / "run", *extra, "--model", "no/such/model")
    config = parse_run(arguments(inputs, tmp_path / "run", *extra, "--max-dropped", "0.04"))
    assert len(prepare_run(config, world_size=1, cuda=False).order.indexes[0]) == 6


def start(inputs: Path, output: Path, *extra: str) -> str:
    """What a run on one rank prints."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        error = outcome(arguments(inputs, output, *extra))
    return error or printed.getvalue()


def test_a_prefix_trains_without_a_tokenizer_of_its_own(pool, inputs, tmp_path):
    tokenizer = small_tokenizer()
    model = save_model("qwen2_untied", tmp_path / "model", layers=2, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(model)
    lengths = np.array([150, 20, 97], np.int32)
    tokens = np.random.default_rng(0).integers(0, 90, lengths.sum()).astype(np.int32)
    (tmp_path / "text.bin").write_bytes(tokens.tobytes())
    write_idx(tmp_path / "text.idx", tokens.dtype, lengths)
    extra = ("--model", str(model), "--data", str(tmp_path / "text"), "--steps", "1", "--checkpoint.export-hf")
    extra += ("--global-batch-size", "5")
    (printed,) = pool.run(start, 1, inputs, tmp_path / "run", *extra)
    assert "data: 3 documents, dropped 0, truncated 0, cut 2 into 4 pieces, packed sequences of 96 tokens" in printed
    assert f"could not be compared with that of {tmp_path / 'text'}, which is not recorded\n" in printed
    (line,) = metrics(tmp_path / "run")
    assert line["supervised_tokens"] == lengths.sum() - 3
    export = tmp_path / "run" / "hf" / "step_000001"
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (export / name).read_bytes() == (model / name).read_bytes()
    assert "One sample and its loss mask" not in (tmp_path / "run" / "report.html").read_text()
    tokens[-1] = len(tokenizer)
    (tmp_path / "text.bin").write_bytes(tokens.tobytes())
    sentence = refused(inputs, tmp_path / "new", *extra)
    assert f"holds token {len(tokenizer)} and the model has {len(tokenizer)} tokens" in sentence


def interrupted(given: list[str], batch: int) -> int:
    """Trains, and tells the last rank to stop within this batch of held-out loss; how many were computed."""
    measure, seen = trainer.run_microbatches, 0

    def signalled(*rest, forward_only: bool = False, **options):
        nonlocal seen
        if forward_only:
            if seen == batch and distributed.get_rank() == distributed.get_world_size() - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            seen += 1
        return measure(*rest, forward_only=forward_only, **options)

    trainer.run_microbatches = signalled
    try:
        assert outcome(given) == ""
        return seen
    finally:
        trainer.run_microbatches = measure


def test_a_signal_within_a_measurement_is_heard_and_its_step_measured_later(pool, inputs, tmp_path):
    """At the start, after a step, when that is made up for, and after the last step: the record is the whole run's."""
    extra = (*held_out(inputs, *SETS), "--valid-at-start", "--optim.schedule", "constant")
    assert pool.run(outcome, 2, arguments(inputs, tmp_path / "whole", *extra)) == ["", ""]
    run, given = RunFolder(tmp_path / "run"), arguments(inputs, tmp_path / "run", *extra)
    for batch, why, steps, left_out in (
        (1, "stopped while starting up, before step 1 of 3", 0, False),
        (4, "saved and stopped after step 2 of 3", 2, True),
        (1, "stopped while starting up, before step 3 of 3", 2, True),
        (4, "saved and stopped after step 3 of 3", 3, True),
    ):
        assert pool.run(interrupted, 2, given, batch) == [batch + 1] * 2
        assert run.why_unfinished() == f"{why}: SIGTERM was received"
        lines = metrics(run.path) if run.metrics.exists() else []
        assert len(lines) == steps and [LEFT_OUT in line for line in lines[-1:]] == [left_out] * bool(steps)
        assert not steps or (find_resume_point(run.path).step == steps and "valid_loss" not in lines[-1])
    assert pool.run(outcome, 2, given) == ["", ""]
    wanted = metrics(tmp_path / "whole")
    assert [list(line.items()) for line in metrics(run.path)] == [list(line.items()) for line in wanted]
    assert not run.unfinished.exists() and [line["step"] for line in wanted if "valid_loss" in line] == [2, 3]
    assert pool.run(outcome, 2, given) == ["", ""]  # which is done, and measures nothing
    assert len(metrics(run.path)) == 3
