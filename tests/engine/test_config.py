"""Values, layouts, recipes and flags: every mistake is one sentence that names the mend."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.check_model import check_experts
from engine.check_values import check_values
from engine.cli import dump_run, parse_run
from engine.config import CheckpointConfig, LogConfig, OptimConfig, RunConfig
from engine.layout import Layout, check_layout, check_sequence
from engine.prepare import find_start, total_steps
from engine.run_folder import RunFolder
from engine.schedule import learning_rate
from examples.demo.builtin import parse_over_demo
from models.backend import choose_backend
from models.hf_config import describe
from tests.support.tiny import save_model


@pytest.fixture(scope="module")
def description(tmp_path_factory):
    """8 heads, 4 key-value heads, 4 layers, feed-forward 96, vocabulary 131 padded to 256."""
    return describe(save_model("llama", tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """4 layers of 8 experts of feed-forward size 64."""
    return describe(save_model("gpt_oss", tmp_path_factory.mktemp("experts")))


@pytest.mark.parametrize(
    ("layout", "ranks", "sentence"),
    [
        (Layout(tp=2, cp=2), 6, "6 ranks cannot be split as tp 2 x cp 2 x pp 1 = 4 ranks per model replica"),
        (Layout(tp=2, cp=2), 6, "start 4 or 8 ranks"),
        (Layout(tp=2, pp=2), 2, "start 4 ranks"),
        (
            Layout(tp=8),
            8,
            "the key-value heads (4) in tp 8 x cp 1 x pp 1 x dp 1 = 8 ranks; the nearest smaller choice is 4",
        ),
        (
            Layout(tp=3),
            3,
            "--tp 3 does not divide the attention heads (8) in tp 3 x cp 1 x pp 1 x dp 1 = 3 ranks; the nearest",
        ),
        (
            Layout(pp=3),
            3,
            "--pp 3 does not divide the layers (4) in tp 1 x cp 1 x pp 3 x dp 1 = 3 ranks",
        ),
        (Layout(pp=2, vpp=3), 2, "--vpp 3 does not divide the layers of a pipeline stage at --pp 2 (2)"),
        (Layout(vpp=2), 1, "--vpp 2 interleaves pipeline stages and needs --pp of at least 2"),
        (Layout(ep=2), 2, "this model has no experts"),
        (Layout(sp=True), 1, "--sp on splits the sequence over tensor-parallel ranks"),
        (Layout(tp=0), 1, "--tp 0 must be at least 1"),
    ],
)
def test_layout_is_refused(description, layout, ranks, sentence):
    with pytest.raises(ValueError) as caught:
        check_layout(layout, ranks, description)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "ranks", "sentence"),
    [
        (Layout(ep=3), 3, "--ep 3 does not divide the experts (8)"),
        (Layout(etp=5), 5, "--etp 5 does not divide the experts' feed-forward size (64)"),
        (Layout(ep=4), 2, "2 ranks cannot be split as ep 4 x etp 1 x pp 1 = 4 ranks for the experts"),
        (Layout(tp=2), 2, "--tp 2 with experts needs sequence parallelism"),
        (Layout(pp=2, stages=(1, 2)), 2, "--pp-layout 1,2 adds up to 3 layers and the model has 4"),
        (Layout(pp=2, stages=(1, 2, 1)), 2, "--pp-layout 1,2,1 has 3 stages and --pp 2 x --vpp 1 make 2"),
        (Layout(pp=2, stages=(4, 0)), 2, "each stage takes at least one"),
    ],
)
def test_layout_of_experts_and_stages_is_refused(experts, layout, ranks, sentence):
    with pytest.raises(ValueError) as caught:
        check_layout(layout, ranks, experts)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--pp-layout", "3;4"], "--pp-layout 3;4: give layers per stage, separated by commas"),
        (["--precision", "fp32", "--optim.gradients", "bf16"], "--optim.gradients bf16 has nothing narrow to sum"),
        (["--recompute-modules", "norm"], "--recompute-modules norm has no effect under --recompute none: give"),
        (["--moe.aux-loss", "-1"], "--moe.aux-loss -1.0 must be a number of 0 or more"),
    ],
)
def test_flags_of_experts_and_stages_are_checked(flags, sentence):
    with pytest.raises(ValueError) as caught:
        check_values(parse_run(["--model", "M", "--data", "D", *flags]))
    assert sentence in str(caught.value)


def test_flags_of_experts_need_experts(description, experts):
    config = parse_run(["--moe.aux-loss", "0.1", "--moe.dispatcher", "allgather"])
    check_experts(config.moe, experts)
    with pytest.raises(ValueError, match="--moe.aux-loss, --moe.dispatcher: this model has no experts"):
        check_experts(config.moe, description)


def test_backends_that_cannot_run_are_not_chosen():
    there = {"missing": None, "precision": "bf16"}
    assert choose_backend("auto", cuda=True, **there) == ("te", "a GPU and Transformer Engine are there")
    assert choose_backend("native", cuda=True, **there) == ("native", "asked for")
    assert choose_backend("auto", cuda=False, **there) == ("native", "no GPU is visible")
    absent = {"cuda": True, "missing": "Transformer Engine is not installed"}
    assert choose_backend("auto", precision="bf16", **absent) == ("native", absent["missing"])
    with pytest.raises(ValueError, match="--backend te cannot run here because no GPU is visible"):
        choose_backend("te", cuda=False, **there)
    with pytest.raises(ValueError, match="--backend te cannot run here because .* are taken in bf16 and fp8 alone"):
        choose_backend("te", cuda=True, missing=None, precision="fp32")
    with pytest.raises(ValueError, match="--precision fp8 needs --backend te .*is not installed"):
        choose_backend("auto", precision="fp8", **absent)


def test_layouts_that_fit_pass(description):
    for layout, ranks in ((Layout(), 3), (Layout(tp=4, sp=True), 8), (Layout(pp=2, vpp=2, cp=3), 6)):
        check_layout(layout, ranks, description)


@pytest.mark.parametrize(
    ("layout", "seq_len", "pad", "sentence"),
    [
        (Layout(cp=2), 96, 2, "start with --pad-documents-to 4"),
        (Layout(cp=2), 98, 4, "the nearest choices are 96 and 100"),
        (Layout(tp=4, sp=True), 98, 2, "the nearest choices are 96 and 100"),
    ],
)
def test_sequence_is_refused(layout, seq_len, pad, sentence):
    with pytest.raises(ValueError) as caught:
        check_sequence(layout, seq_len, pad)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seq_len": 0}, "--seq-len 0 must be above 0"),
        ({"model": "m"}, "--data is missing"),
        ({"data": ("d",)}, "--model is missing"),
        ({"optim": OptimConfig(beta2=1.0)}, "--optim.beta2 1.0 must lie in [0, 1)"),
        ({"optim": OptimConfig(schedule="wsd")}, "--optim.decay-steps"),
        ({"valid_every": 5}, "--valid-every 5 needs held-out data"),
        ({"optim": OptimConfig(lr=float("nan"))}, "--optim.lr nan must be a number"),
        ({"optim": OptimConfig(lr=-1.0)}, "--optim.lr -1.0 must be a number of 0 or more"),
        ({"optim": OptimConfig(eps=0.0)}, "--optim.eps 0.0 must be above 0, e.g. 1e-8"),
        ({"optim": OptimConfig(lr=1e-5, min_lr=2e-5)}, "--optim.min-lr 2e-05 is above --optim.lr 1e-05"),
        ({"optim": OptimConfig(lr=1e-5, warmup_steps=2, warmup_init=1e-4)}, "--optim.warmup-init 0.0001 is above"),
        ({"optim": OptimConfig(warmup_init=1e-6)}, "--optim.warmup-init 1e-06 has no effect without a warmup"),
        ({"optim": OptimConfig(decay_steps=3)}, "--optim.decay-steps 3 has no effect under --optim.schedule cosine"),
        (
            {"optim": OptimConfig(schedule="constant", min_lr=1e-6)},
            "--optim.min-lr 1e-06 has no effect under --optim.schedule constant",
        ),
        (
            {"steps": 6, "optim": OptimConfig(warmup_steps=3000)},
            "--optim.warmup-steps 3,000 must be shorter than the run, which has 6 steps; give fewer",
        ),
        ({"steps": 6, "optim": OptimConfig(warmup_steps=6)}, "--optim.warmup-steps 6 must be shorter than the run"),
        (
            {"steps": 6, "optim": OptimConfig(schedule="wsd", decay_steps=7)},
            "--optim.decay-steps 7 is longer than the run, which has 6 steps; give fewer",
        ),
        (
            {"steps": 6, "optim": OptimConfig(schedule="wsd", warmup_steps=3, decay_steps=4)},
            "--optim.warmup-steps 3 and --optim.decay-steps 4 together are longer than the run, which has 6 steps",
        ),
        (
            {"checkpoint": CheckpointConfig(allow_change=("precision", "optim.lr"))},
            "--checkpoint.allow-change optim.lr: no such setting needs to be allowed; those that do are model, "
            "optim.moments, optim.gradients, precision",
        ),
        (
            {"model": "runs/a/", "data": ("D",), "output": Path("runs/b/../a")},
            "--output runs/b/../a is the directory of --model",
        ),
        ({"model": "M", "data": ("A", "B:0.5"), "output": Path("B")}, "--output B is the directory of --data"),
        (
            {"model": "M", "data": ("A",), "valid": ("held=B",), "output": Path("B")},
            "--output B is the directory of --valid",
        ),
    ],
)
def test_value_is_refused(changes, sentence):
    with pytest.raises(ValueError) as caught:
        check_values(replace(RunConfig(), **changes))
    assert sentence in str(caught.value)


@pytest.mark.parametrize("name", ["every", "keep", "keep_every", "keep_best", "rescue_every", "rescue_minutes"])
def test_what_is_kept_is_not_negative(name):
    with pytest.raises(ValueError, match=f"^--checkpoint.{name.replace('_', '-')} -1 must be 0 or more$"):
        check_values(replace(RunConfig(), checkpoint=CheckpointConfig(**{name: -1})))


def test_going_back_and_starting_anew_exclude_each_other(tmp_path):
    both = parse_run(["--checkpoint.resume-from", "2", "--checkpoint.no-resume"]).checkpoint
    with pytest.raises(ValueError, match="^--checkpoint.resume-from and --checkpoint.no-resume exclude each other"):
        find_start(RunFolder(tmp_path), both)


def test_courses_that_just_fit_pass():
    for optim in (
        OptimConfig(warmup_steps=5),
        OptimConfig(schedule="wsd", warmup_steps=2, decay_steps=4),
        OptimConfig(schedule="wsd", decay_steps=6),
        OptimConfig(lr=1e-5, min_lr=1e-5, warmup_steps=1, warmup_init=1e-5),
        OptimConfig(lr=0.0),
    ):
        check_values(replace(RunConfig(), steps=6, optim=optim))
    check_values(replace(RunConfig(), epochs=1.0, optim=OptimConfig(warmup_steps=3000)))  # its length is not known yet


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "https://me:pass1234@example.org/model"},
        {"data": ("D", "https://example.org/data?token=abc1234")},
        {"log": LogConfig(wandb_project="hf_" + "aB3" * 12)},
    ],
)
def test_what_looks_like_a_token_is_refused_and_not_repeated(changes):
    with pytest.raises(ValueError, match="holds what looks like an access token or a password") as caught:
        check_values(replace(RunConfig(), **changes))
    assert not {"pass1234", "abc1234", "aB3aB3"} & set(re.findall(r"\w+", str(caught.value)))
    assert "aB3" not in str(caught.value)


def test_names_that_look_odd_are_no_tokens():
    folder = f"/cache/models--a--hf_model/snapshots/{'0123456789abcdef' * 2}01234567"
    check_values(replace(RunConfig(), model=folder, data=("s3://bucket/a:0.5", "hf_data/key=1"), output=Path("sk-run")))


@pytest.mark.parametrize(
    ("steps", "epochs", "expected"),
    [(None, None, 10), (7, None, 7), (None, 2.5, 24), (30, 2.0, 20), (15, 2.0, 15), (1, 0.01, 1)],
)
def test_the_length_that_is_reached_first_ends_a_run(steps, epochs, expected):
    order = SimpleNamespace(steps_in_epoch=lambda epoch: (10, 10, 8)[epoch])
    assert total_steps(order, steps, epochs) == expected


def test_a_later_length_wins(tmp_path):
    epochs = write(tmp_path / "epochs.yaml", "epochs: 2\noptim: {lr: 1e-3}\n")
    steps = write(tmp_path / "steps.yaml", "steps: 30\n")
    above = write(tmp_path / "above.yaml", "base: epochs.yaml\nsteps: 5\n")
    both = write(tmp_path / "both.yaml", "steps: 30\nepochs: 2\n")

    def length(*arguments: str, defaults: RunConfig | None = None) -> tuple[int | None, float | None]:
        config = parse_run(list(arguments), defaults)
        return config.steps, config.epochs

    assert length(epochs, "--steps", "7") == length(epochs, "--steps=7") == (7, None)
    assert length(steps, "--epochs", "0.5") == (None, 0.5)
    assert length(epochs, steps) == (30, None) and length(steps, epochs) == (None, 2)
    assert length(above) == (5, None) and length(above, epochs) == (None, 2)
    assert length(epochs, "--epochs", "None", "--steps", "7") == (7, None)
    assert length(epochs, "--steps", "None") == (None, 2)
    assert length("--epochs", "3", defaults=RunConfig(steps=300)) == (None, 3)
    assert parse_run([epochs, "--steps", "7"]).optim.lr == 1e-3
    again = write(tmp_path / "config.yaml", dump_run(parse_run([epochs, "--steps", "7"])))
    assert length(again) == (7, None)
    # Given at one place both hold, and the first that is reached ends the run.
    assert length(both) == length("--steps", "30", "--epochs", "2") == (30, 2)
    assert length(both, "--steps", "7") == (7, None) and length(both, steps) == (30, None)
    check_values(replace(RunConfig(), model="m", data=("d",), output=Path("r"), steps=30, epochs=2))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], (300, 30, 120)),
        (["--steps", "20"], (20, 2, 8)),
        (["--steps", "1"], (1, 0, 1)),
        (["--steps", "600"], (600, 30, 120)),
        (["--epochs", "0.8"], (None, 15, 60)),  # 150 steps
        (["--steps", "20", "--optim.warmup-steps", "5"], (20, 5, 8)),
        (["--steps", "20", "--optim.schedule", "constant"], (20, 2, 0)),
    ],
)
def test_a_demo_of_another_length_keeps_its_course(flags, expected):
    config = parse_over_demo(flags)
    check_values(config)
    assert (config.steps, config.optim.warmup_steps, config.optim.decay_steps) == expected


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_later_wins(tmp_path):
    base = write(tmp_path / "base.yaml", "seq-len: 1024\noptim:\n  lr: 2e-5\n  schedule: linear\n")
    above = write(
        tmp_path / "run.yaml",
        "base: base.yaml\ntp: 2\nsp: off\noptim: {lr: 1e-4}\nmcore: {num_layers_at_start_in_bf16: 2}\n",
    )
    config = parse_run([above, "--seq-len", "2048", "--mcore.fp8-margin=1"])
    assert (config.seq_len, config.tp, config.sp, config.optim.lr) == (2048, 2, "off", 1e-4)
    assert config.optim.schedule == "linear"
    assert config.mcore == {"num_layers_at_start_in_bf16": 2, "fp8_margin": 1}
    assert parse_run([base]).optim.lr == 2e-5
    assert parse_run(["--checkpoint.no-resume"]).checkpoint.resume is False


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("seq_length: 3", "unknown recipe key seq_length; the nearest is seq_len"),
        ("optim: {learning_rate: 3}", "unknown recipe key optim.learning_rate"),
        ("optim: 3", "recipe key optim takes keys of its own"),
        ("tp: two", "recipe key tp is 'two', which is no int"),
        ("tp: 1.5", "recipe key tp is 1.5, which is no int"),
        ("steps: .inf", "recipe key steps is inf, which is no int"),
        ("epochs: true", "recipe key epochs is True, which is no float"),
        ("valid: {math: DATA}", "recipe key valid is {'math': 'DATA'}; give a list of texts"),
        ("data: [null]", "recipe key data is [None]; give a list of texts"),
        ("mcore: 3", "recipe key mcore takes keys of its own, not 3"),
        ("batch_unit: bins", "choose one of sequences, conversations"),
        ("recompute_modules: [norm, flash]", "recompute_modules is 'flash'; choose one of norm, activation, mlp"),
        ("mcore: {hiden_size: 3}", "unknown flag mcore.hiden_size; the nearest is mcore.hidden_size"),
        ("- 3", "must hold keys and values"),
        ("a: [", "is not YAML"),
        ("valid:", "recipe key valid has no value"),
        ("mcore: {bf16: true}", "--mcore.bf16 is set by Lathe's own flag --precision"),
        ("mcore: {layernorm_epsilon: 1e-6}", "--mcore.layernorm_epsilon is set by the model"),
    ],
)
def test_recipe_is_refused(tmp_path, text, sentence):
    with pytest.raises(ValueError) as caught:
        parse_run([write(tmp_path / "bad.yaml", text)])
    assert sentence in str(caught.value)


def test_unknown_flag_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_run(["--seq-length", "3"])
    assert caught.value.code != 0
    assert "--seq-len" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"unknown flag mcore.hiden_size; the nearest is mcore.hidden_size"):
        parse_run(["--mcore.hiden-size=3"])


def test_schedules():
    optim = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=4, warmup_init=0.2, schedule="cosine")
    rates = [learning_rate(optim, step, 12) for step in range(1, 13)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[8] == pytest.approx(0.55)  # half-way down
    assert rates == sorted(rates[:5]) + sorted(rates[5:], reverse=True)
    linear = replace(optim, schedule="linear", warmup_steps=0)
    assert [learning_rate(linear, step, 9) for step in (1, 5, 10)] == pytest.approx([1.0, 0.6, 0.1])
    wsd = replace(optim, schedule="wsd", warmup_steps=0, decay_steps=4)
    assert [learning_rate(wsd, step, 10) for step in (1, 7, 9)] == pytest.approx([1.0, 1.0, 0.55])
    assert learning_rate(replace(optim, schedule="constant"), 12, 12) == 1.0
