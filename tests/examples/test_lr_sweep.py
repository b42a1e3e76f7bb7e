"""Learning rates beside each other: real runs, one of which blows up, and the ways to ask wrongly."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from engine.cli import dump_run, parse_run
from engine.schedule import learning_rate
from examples import lr_sweep
from examples.sweep_settings import own_length
from tests.support.tiny import save_model, write_documents

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_model("qwen2_tied", folder / "model", layers=1)
    save_model("qwen2_tied", folder / "other", layers=1, rms_norm_eps=1e-3)
    write_documents(folder / "data", 14)
    write_documents(folder / "valid", 6, seed=1)
    return folder


def sweep(*arguments) -> tuple[int, str]:
    """The exit status and what the table said."""
    printed = io.StringIO()
    return lr_sweep.main(list(map(str, arguments)), Console(file=printed, width=120)), printed.getvalue()


def test_rates_are_trained_and_compared(inputs, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    paths = ["--model", inputs / "model", "--data", inputs / "data", "--valid", inputs / "valid"]
    shape = "--seq-len 96 --global-batch-size 4 --steps 6 --precision fp32 --optim.clip-grad 0"
    own = ["--lrs", "1e-3,1e-6,1e30", "--output", tmp_path]
    status, printed = sweep(*own, "--", *paths, *shape.split())
    assert status == 0
    results = {one["lr"]: one for one in json.loads((tmp_path / "sweep.json").read_text())}
    made_of = json.loads((tmp_path / "lr_0.001.json").read_text())
    assert results[1e-3]["made_of"] == results[1e30]["made_of"] == made_of
    assert made_of["steps"] == 6 and "optim.lr" not in made_of and "tp" not in made_of
    assert results[1e30]["state"] == "failed" and results[1e30]["steps"] < 6
    assert results[1e-3]["state"] == "done" and results[1e-3]["steps"] == results[1e-6]["steps"] == 6
    assert results[1e-3]["valid_loss"] < results[1e-6]["valid_loss"]
    lines = [json.loads(line) for line in (tmp_path / "lr_0.001" / "metrics.jsonl").read_text().splitlines()]
    assert results[1e-3]["loss"] == lines[-1]["loss"] and results[1e-3]["valid_loss"] == lines[-1]["valid_loss"]
    assert [line.split("│")[1].strip() for line in printed.splitlines() if "best" in line] == ["0.001"]
    assert sum("failed" in line for line in printed.splitlines()) == 1
    # What is there can be compared without training, and nothing is trained twice.
    monkeypatch.setattr(lr_sweep, "train", None)
    capfd.readouterr()
    assert sweep(*own)[1] == sweep(*own, "--", *paths, *shape.split())[1] == printed
    # What was made of something else is not taken for this call's, nor gone on with.
    for changed, said in (
        (["--global-batch-size", "2"], "global-batch-size: 4 -> 2"),
        (["--steps", "12"], "steps: 6 -> 12); give another --output, or the settings of before, since rates that"),
        (["--data", inputs / "valid", "--valid", inputs / "data"], f"data: {inputs / 'data'}:1 ["),
        (["--model", inputs / "other"], f"model: {inputs / 'model'} ["),
    ):
        assert sweep(*own, "--", *paths, *shape.split(), *changed)[0] == 2
        (sentence,) = capfd.readouterr().err.splitlines()
        assert sentence.startswith(f"error: --output {tmp_path}: lr_0.001 was trained with other settings ({said[:4]}")
        assert said in sentence
    shutil.move(inputs / "model", inputs / "moved")
    assert sweep(*own, "--", "--model", inputs / "moved", *paths[2:], *shape.split())[1] == printed
    shutil.move(inputs / "moved", inputs / "model")
    # A run of a job of its own is held against the others by its config.yaml.
    (tmp_path / "lr_1e-06.json").unlink()
    assert sweep(*own)[1] == printed
    config = tmp_path / "lr_1e-06" / "config.yaml"
    config.write_text(config.read_text().replace("seed: 1234", "seed: 5"))
    status, differing = sweep(*own)
    assert status == 1 and "the runs differ in more than their rates (seed: 1234 -> 5)" in differing
    config.write_text(config.read_text().replace("seed: 5", "seed: 1234"))
    # A mistake in another call is none of the rate's.
    with pytest.raises(SystemExit):
        sweep(*own, "--", *paths, *shape.split(), "--no-such-flag", "1")
    # A run that has stopped early, or has not begun, is not compared.
    (tmp_path / "lr_1e-06" / "unfinished").touch()
    status, printed = sweep("--lrs", "1e-3,1e-6,5", "--output", tmp_path)
    assert status == 1 and "no rate is the best yet: 1e-06, 5 still to be trained to the end" in printed


@pytest.mark.slow
def test_an_interrupt_reaches_the_run_and_ends_the_sweep(inputs, tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "lr_sweep.py"), "--lrs", "1e-3,1e-6", "--output", str(tmp_path)]
    command += ["--", "--model", str(inputs / "model"), "--data", str(inputs / "data"), "--seq-len", "96"]
    command += ["--global-batch-size", "4", "--steps", "100000", "--precision", "fp32"]
    command += ["--optim.schedule", "constant"]  # which alone goes on to another length
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = tmp_path / "lr_0.001" / "metrics.jsonl"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A test run in the background may have been started to ignore it.
    listening = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, env=environment, **pipes, **listening) as process:
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 1):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and errors.splitlines()[-1] == "interrupted: the same command continues"
    steps = len(log.read_text().splitlines())
    assert (tmp_path / "lr_0.001" / "checkpoints" / "latest").read_text().strip() == f"step_{steps:06d}"
    assert (tmp_path / "lr_0.001" / "unfinished").exists() and not (tmp_path / "lr_1e-06").exists()
    command[command.index("100000")] = str(steps + 2)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "sweep.json").read_text())
    assert [(one["steps"], one["state"]) for one in results] == [(steps + 2, "done")] * 2


@pytest.mark.parametrize(("sent", "heard"), [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGUSR1", "SIGTERM")])
def test_what_ends_a_sweep_is_passed_on_to_the_run(tmp_path, monkeypatch, sent, heard):
    """The training script has a session of its own: what is not passed on would leave it running."""
    script = (
        "import os, pathlib, signal, sys, time\n"
        f"signal.signal(signal.{heard}, lambda *_: (pathlib.Path(sys.argv[1]).write_text('heard'), sys.exit(0)))\n"
        f"os.kill(os.getppid(), signal.{sent})\n"
        "time.sleep(60)\n"
    )
    # A test run in the background may have been started to ignore it.
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
    with pytest.raises(KeyboardInterrupt):
        lr_sweep.run_to_the_end([sys.executable, "-c", script, str(tmp_path / "note")])
    assert (tmp_path / "note").read_text() == "heard"


def scaled(tmp_path: Path, recipe: str, *flags: str) -> tuple[tuple[int, int], list[str]]:
    """Warmup and decay of a sweep's runs under a recipe, and what is said of them."""
    (tmp_path / "recipe.yaml").write_text(recipe)
    given = [str(tmp_path / "recipe.yaml"), *flags]
    config, lines = own_length(parse_run(given), given)
    return (config.optim.warmup_steps, config.optim.decay_steps), lines


def test_warmup_and_decay_are_those_of_the_sweeps_length(tmp_path):
    recipe = "steps: 30000\noptim: {schedule: wsd, warmup_steps: 3000, decay_steps: 6000}\n"
    lengths, lines = scaled(tmp_path, recipe, "--steps", "300")
    assert lengths == (30, 60)
    assert lines == [
        "warmup_steps: 3,000 of the recipe's 30,000 steps, 30 of the sweep's 300 steps",
        "decay_steps: 6,000 of the recipe's 30,000 steps, 60 of the sweep's 300 steps",
    ]
    assert scaled(tmp_path, recipe, "--steps", "300", "--optim.warmup-steps", "7") == ((7, 60), lines[1:])
    for flags in ([], ["--steps", "60000"]):
        assert scaled(tmp_path, recipe, *flags) == ((3000, 6000), [])
    own = "optim: {warmup_steps: 9}\n"  # a file of settings that were never for another length
    assert scaled(tmp_path, own, "--steps", "300") == ((9, 0), [])
    epochs = "epochs: 2\noptim: {warmup_steps: 440}\n"
    assert scaled(tmp_path, epochs, "--steps", "300", "--optim.warmup-steps", "9") == ((9, 0), [])
    with pytest.raises(ValueError, match=r"warmup_steps 440 belong to a run of 2 epoch\(s\) .* give --optim.warmup-st"):
        scaled(tmp_path, epochs, "--steps", "300")
    lines = ["warmup_steps: 440 of the recipe's 2 epoch(s), 55 of the sweep's 0.25 epoch(s)"]
    assert scaled(tmp_path, epochs, "--epochs", "0.25") == ((55, 0), lines)


def test_a_length_of_another_kind_or_place(tmp_path):
    """Epochs against steps, both at once, and a second file with a length of its own."""
    steps = "steps: 30000\noptim: {warmup_steps: 3000}\n"
    both = "steps: 30000\nepochs: 2\noptim: {warmup_steps: 3000}\n"
    for recipe, flags, said in (
        (
            steps,
            "--epochs 0.5",
            "a run of 30,000 steps and cannot be scaled to --epochs 0.5: give --optim.warmup-steps",
        ),
        (steps, "--steps 300 --epochs 1", "30,000 steps and cannot be scaled to --steps 300 --epochs 1: give"),
        (both, "--steps 300", r"a run of 30,000 steps or 2 epoch\(s\) and cannot be scaled to --steps 300: give"),
    ):
        with pytest.raises(ValueError, match=said):
            scaled(tmp_path, recipe, *flags.split())
        assert scaled(tmp_path, recipe, *flags.split(), "--optim.warmup-steps", "9") == ((9, 0), [])
    assert scaled(tmp_path, both, "--steps", "30000", "--epochs", "2") == ((3000, 0), [])
    (tmp_path / "short.yaml").write_text("steps: 300\n")
    assert scaled(tmp_path, steps, str(tmp_path / "short.yaml"))[0] == (30, 0)
    assert scaled(tmp_path, steps, str(tmp_path / "short.yaml"), "--steps", "60")[0] == (6, 0)
    (tmp_path / "short.yaml").write_text("steps: 300\noptim: {warmup-steps: 20}\n")  # which is its own
    assert scaled(tmp_path, steps, str(tmp_path / "short.yaml")) == ((20, 0), [])
    (tmp_path / "short.yaml").write_text("epochs: 1\n")
    with pytest.raises(ValueError, match="cannot be scaled to --epochs 1"):
        scaled(tmp_path, steps, str(tmp_path / "short.yaml"))


def test_a_rate_that_is_done_is_begun_again_only_for_more(inputs, tmp_path, monkeypatch):
    """Where epochs end a run before its --steps, it is done all the same."""
    given = ["--model", inputs / "model", "--data", inputs / "data", "--optim.schedule", "constant"]
    run = tmp_path / "lr_0.001"
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {n}, "loss": 1, "grad_norm": 1}}\n' for n in (1, 2)))
    trained = []
    monkeypatch.setattr(lr_sweep, "train", lambda options, rate, flags: trained.append(rate))
    own = ["--lrs", "1e-3", "--output", tmp_path, "--", *given]
    before = [*given, "--steps", "9", "--epochs", "1"]
    (run / "config.yaml").write_text(dump_run(parse_run(list(map(str, before)))))
    for length, begun in (("--steps 9 --epochs 1", 0), ("--steps 2", 0), ("--steps 10", 1), ("--epochs 2", 1)):
        trained.clear()
        assert sweep(*own, *length.split())[0] == 0 and len(trained) == begun, length


def test_a_published_recipe_reaches_its_rates_in_a_short_sweep(tmp_path, monkeypatch, capsys):
    """Its warmup of 3,000 steps left a sweep at rates that were never reached."""
    trained = []
    monkeypatch.setattr(lr_sweep, "train", lambda options, rate, flags: trained.append((rate, flags)))
    recipe = ROOT / "examples" / "recipes" / "openmathreasoning-qwen2.5-14b.yaml"
    sweep("--lrs", "1e-5,1e-3", "--output", tmp_path, "--", recipe, "--steps", "60")
    assert [rate for rate, _ in trained] == [1e-5, 1e-3]
    for _, flags in trained:
        optim = parse_run(flags).optim
        assert learning_rate(replace(optim, lr=1.0, min_lr=0.0), 7, 60) == 1.0
    assert "warmup_steps: 3,000 of the recipe's 30,000 steps, 6 of the sweep's 60 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--lrs", "1e-5,x"), "--lrs 1e-5,x: give rates above 0"),
        (("--lrs", "1e-5,-1"), "--lrs 1e-5,-1: give rates above 0"),
        (("--lrs", "1e-5,0.00001"), "a rate is named twice"),
        (
            ("--lrs", "1e-5", "--", "--model", "M", "--data", "x", "--steps", "6", "--optim.warmup-steps", "3000"),
            "--optim.warmup-steps 3,000 must be shorter than the run, which has 6 steps",
        ),
        (
            ("--lrs", "1e-3,1e-5", "--", "--model", "M", "--data", "x", "--optim.min-lr", "1e-4"),
            "--optim.min-lr 0.0001 is above --optim.lr 1e-05",
        ),
        (
            ("--lrs", "1e-5", "--", "--model", "nowhere", "--data", "x"),
            "the run of --optim.lr 1e-05 ended with status 2; see above",
        ),
    ],
)
def test_sweeps_that_are_refused(arguments, sentence, tmp_path, capfd):
    own = [*arguments[:2], "--output", str(tmp_path / "sweep"), *arguments[2:]]
    assert sweep(*own)[0] == 2
    assert sentence in capfd.readouterr().err.splitlines()[-1]
