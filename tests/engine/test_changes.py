"""A run that is resumed with other settings says each of them, and refuses what would change its course."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch

from engine.changes import changed_settings, resume_lines
from engine.checkpointing.directory import STATE
from engine.checkpointing.resume_point import find_resume_point
from engine.checkpointing.store_reader import StoreReader
from engine.cli import dump_run, parse_run
from engine.config import RunConfig
from engine.prepare import prepare_run
from engine.run_folder import RunFolder
from models.hf_config import describe
from tests.engine.test_failures import arguments, outcome
from tests.support.tiny import make_inputs, save_model

SETTINGS = "--model M --data D --steps 40 --optim.lr 1e-3 --optim.schedule constant --precision fp32 --tp 2"
BEFORE = SETTINGS.split()


def lines_of(tmp_path: Path, *flags: str, precision: str | None = "fp32") -> list[str]:
    """What a run says of these flags that is resumed from one with the settings of BEFORE."""
    (tmp_path / "config.yaml").write_text(dump_run(parse_run(BEFORE)))
    return list(resume_lines(parse_run(flags), tmp_path / "config.yaml", precision=precision))


def test_each_changed_setting_is_a_line(tmp_path):
    forgotten = "--model M --data D --steps 50 --precision fp32 --tp 1 --pp 2 --log.print-every 5"
    assert lines_of(tmp_path, *forgotten.split()) == [
        "steps: 40 -> 50",
        "optim.lr: 0.001 -> 2e-05",
        "optim.schedule: constant -> cosine",
        "log.print-every: 10 -> 5",
        "layout: tp: 2 -> 1, pp: 1 -> 2",
    ]
    assert lines_of(tmp_path, *BEFORE, "--output", "elsewhere", "--checkpoint.resume-from", "3") == []
    assert lines_of(tmp_path, *BEFORE, "--model", str(Path("M").absolute())) == []
    (line,) = lines_of(tmp_path, *BEFORE, "--model", "N")
    assert line.startswith("model: M -> N, which is not read")
    assert lines_of(tmp_path, *BEFORE, "--mcore.fp8-margin=1") == ["mcore.fp8-margin: None -> 1"]


@pytest.mark.parametrize(
    ("flags", "name", "said"),
    [
        ("--precision bf16", "precision", "--precision was fp32 and is bf16"),
        ("--optim.moments bf16", "optim.moments", "--optim.moments was fp32 and is bf16"),
        ("--optim.gradients bf16", "optim.gradients", "--optim.gradients was fp32 and is bf16"),
        ("--override.rope-theta 5000", "model", "--override.rope-theta was None and is 5000"),
    ],
)
def test_a_change_of_course_is_to_be_allowed(tmp_path, flags, name, said):
    with pytest.raises(ValueError) as caught:
        lines_of(tmp_path, *BEFORE, *flags.split())
    assert str(caught.value).startswith(said)
    assert f"allow the change with --checkpoint.allow-change {name}" in str(caught.value)
    others = [other for other in ("precision", "optim.moments", "optim.gradients", "model") if other != name]
    with pytest.raises(ValueError, match=f"--checkpoint.allow-change {name}$"):
        lines_of(tmp_path, *BEFORE, *flags.split(), "--checkpoint.allow-change", *others)
    assert len(lines_of(tmp_path, *BEFORE, *flags.split(), "--checkpoint.allow-change", name)) == 1


def test_what_an_older_run_wrote_is_no_noise(tmp_path):
    """Settings that came later have their defaults; a checkpoint says itself how precise it was."""
    assert lines_of(tmp_path, *BEFORE, precision=None) == []
    old = (tmp_path / "config.yaml").read_text().replace("bucket_size: 0\n", "").replace("  eps: 1.0e-08\n", "")
    (tmp_path / "config.yaml").write_text(old)
    assert "  eps:" not in old and "bucket_size" not in old
    assert resume_lines(parse_run(BEFORE), tmp_path / "config.yaml", precision="fp32") == ()
    with pytest.raises(ValueError, match="--precision was bf16 and is fp32"):
        resume_lines(parse_run(BEFORE), tmp_path / "config.yaml", precision="bf16")
    (tmp_path / "config.yaml").write_text("no_such_setting: 1\n")
    (line,) = resume_lines(parse_run(BEFORE), tmp_path / "config.yaml", precision="fp32")
    assert "cannot be read" in line and "no_such_setting" in line
    (line,) = resume_lines(parse_run(BEFORE), tmp_path / "gone.yaml", precision="fp32")
    assert "gone.yaml: there is no such file" in line


def test_a_setting_that_is_not_given_is_none():
    (change,) = changed_settings(RunConfig(), parse_run(["--valid-every", "0", "--valid", "A", "B"]))
    assert str(change) == "valid: none -> A B"


@pytest.fixture
def inputs(tmp_path):
    return make_inputs(tmp_path)


def printed(given: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        error = outcome(given)
    return error or text.getvalue()


def state(output: Path) -> dict[str, torch.Tensor]:
    store = StoreReader(find_resume_point(output).directory / STATE)
    return {key: store.read(key) for key in store.keys()}  # noqa: SIM118  (no dict)


def test_moments_become_narrow_where_that_is_allowed(pool, inputs):
    """And wide again; a rate of nought shows the weights unchanged, and the record goes on."""
    output = inputs / "run"
    first = arguments(inputs, output, "--optim.schedule", "constant")
    assert pool.run(outcome, 1, first) == [""]
    kept = state(output)
    narrow = [*first, "--steps", "3", "--optim.lr", "0", "--optim.moments", "bf16"]
    with pytest.raises(ValueError, match="--optim.moments was fp32 and is bf16"):
        prepare_run(parse_run(narrow), world_size=1, cuda=False)
    (text,) = pool.run(printed, 1, [*narrow, "--checkpoint.allow-change", "optim.moments"])
    assert "\nchanged: optim.moments: fp32 -> bf16\n" in text and "\nchanged: optim.lr: 0.001 -> 0\n" in text
    found = state(output)
    moments = [key for key in found if "exp_avg" in key]
    assert moments and all(torch.equal(found[key], found[key].bfloat16().float()) for key in moments)
    assert not all(torch.equal(kept[key], kept[key].bfloat16().float()) for key in moments)
    weights = [key for key in found if not key.startswith("optimizer.")]
    assert all(torch.equal(found[key], kept[key]) for key in weights)


def test_a_start_that_saved_nothing_changes_nothing(pool, inputs):
    """What counts is what the checkpoint was made with, also for one to which a run goes back."""
    run = RunFolder(inputs / "run")
    first = arguments(inputs, run.path, "--optim.schedule", "constant", "--checkpoint.every", "1")
    assert pool.run(outcome, 1, first) == [""]
    for step in (1, 2):
        (run.checkpoint(step) / "config.yaml").write_text(run.config.read_text())
    narrow = [*first, "--steps", "3", "--optim.moments", "bf16"]
    run.config.write_text(dump_run(parse_run([*narrow, "--checkpoint.allow-change", "optim.moments"])))  # was killed
    for back in ([], ["--checkpoint.resume-from", "1"]):
        with pytest.raises(ValueError, match=f"--optim.moments was fp32 and is bf16, .* the run in {run.path}: give"):
            prepare_run(parse_run([*narrow, *back]), world_size=1, cuda=False)
        assert prepare_run(parse_run([*first, *back]), world_size=1, cuda=False).changes == ()


@pytest.mark.parametrize(("was", "becomes"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_another_precision_keeps_master_weights_and_moments(pool, inputs, was, becomes):
    output = inputs / "run"
    first = arguments(inputs, output, "--optim.schedule", "constant", "--precision", was)
    assert pool.run(outcome, 1, first) == [""]
    kept = state(output)
    flags = ["--steps", "3", "--optim.lr", "0", "--precision", becomes, "--checkpoint.allow-change", "precision"]
    (text,) = pool.run(printed, 1, [*first, *flags])
    assert f"\nchanged: precision: {was} -> {becomes}\n" in text
    found = state(output)
    for key in (key for key in kept if key.startswith("decoder.") and key.endswith("weight")):
        masters = [one[name] for one in (kept, found) for name in masters_of(one, key)]
        assert len(masters) == 2 and torch.equal(*masters), key
    losses = [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert losses[2] < losses[0]


def masters_of(held: dict[str, torch.Tensor], key: str) -> list[str]:
    """The fp32 weights of a checkpoint: beside weights that are narrower, or the weights themselves."""
    if held[key].dtype == torch.float32:
        return [key]
    return [name for name in held if name.endswith(f".{key}") and not any(m in name for m in ("exp_avg", "step"))]


def test_rope_of_another_base_where_that_is_allowed(pool, inputs):
    output = inputs / "run"
    assert pool.run(outcome, 1, arguments(inputs, output)) == [""]
    longer = arguments(inputs, output, "--steps", "3", "--override.rope-theta", "5000")
    with pytest.raises(ValueError, match="or allow the override with --checkpoint.allow-change model"):
        prepare_run(parse_run(longer), world_size=1, cuda=False)
    allowed = [*longer, "--checkpoint.allow-change", "model"]
    (text,) = pool.run(printed, 1, allowed)
    assert "\nchanged: override.rope-theta: None -> 5000\n" in text
    assert describe(RunFolder(output).checkpoint(3) / "hf").rope[0]["rope_theta"] == 5000
    # What was allowed once is the run's own from then on.
    again = prepare_run(parse_run([*longer, "--steps", "4"]), world_size=1, cuda=False)
    assert again.description.rope[0]["rope_theta"] == 5000 and again.changes == ("steps: 3 -> 4",)
    save_model("qwen2_untied", inputs / "other", layers=1)
    wrong = [*allowed, "--model", str(inputs / "other")]
    with pytest.raises(ValueError, match="differs from the model of the run .* in transformer, .*; give what"):
        prepare_run(parse_run(wrong), world_size=1, cuda=False)
