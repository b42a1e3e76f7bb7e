"""The record of a run: one JSON line a step, rewound on resume, mirrored, shown without flooding a log."""

import io
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from engine.reporting.metrics import FIELDS, MetricsLog, read_metrics, rewind
from engine.reporting.progress import clock


def write_steps(log: MetricsLog, first: int, last: int, **changes) -> None:
    """Steps `first` to `last` with a loss of 1/step and half a second each."""
    for step in range(first, last + 1):
        values = {
            "loss": 1 / step,
            "grad_norm": 2.0,
            "lr": 1e-3,
            "tokens": 900,
            "supervised_tokens": 300,
            "padding_tokens": 100,
            "seconds": 0.5,
        }
        log.write(step, **{**values, **changes})


def quiet(run_dir, **options) -> MetricsLog:
    """A log without TensorBoard that prints into memory."""
    return MetricsLog(run_dir, **{"total_steps": 10, "tensorboard": False, "stream": io.StringIO(), **options})


def test_a_line_holds_the_contract_in_order_and_computes_rates(tmp_path):
    with quiet(tmp_path) as log:
        write_steps(log, 1, 1, loss=1 / 3, tflops=123.45678, mfu=0.412345, valid_loss=0.25, bins=7)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert tuple(line)[: len(FIELDS)] == FIELDS
    assert (line["tokens_per_second"], line["supervised_tokens_per_second"]) == (1800.0, 600.0)
    assert (line["tflops"], line["mfu"]) == (123.457, 0.4123)
    assert line["loss"] == 1 / 3
    assert (line["valid_loss"], line["bins"]) == (0.25, 7)


def test_each_line_is_on_disk_before_the_next_step(tmp_path):
    with quiet(tmp_path) as log:
        for step in (1, 2, 3):
            write_steps(log, step, step)
            assert [line["step"] for line in read_metrics(log.path)] == list(range(1, step + 1))


def test_what_is_not_finite_becomes_null_and_tensors_become_numbers(tmp_path):
    with quiet(tmp_path) as log:
        write_steps(
            log,
            1,
            1,
            loss=math.nan,
            grad_norm=torch.tensor(math.inf),
            valid_loss=torch.tensor(0.5),
            seconds=0.0,
        )

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    line = json.loads(log.path.read_text(), parse_constant=refuse)
    assert (line["loss"], line["grad_norm"], line["tokens_per_second"]) == (None, None, None)
    assert (line["tflops"], line["mfu"], line["valid_loss"]) == (None, None, 0.5)


def test_steps_follow_one_another(tmp_path):
    with quiet(tmp_path, start_step=4) as log:
        with pytest.raises(ValueError, match="step 6 does not follow step 4"):
            write_steps(log, 6, 6)
        write_steps(log, 5, 5)
        with pytest.raises(ValueError, match="step 5 does not follow step 5"):
            write_steps(log, 5, 5)


def test_a_resumed_file_reads_like_an_uninterrupted_one(tmp_path):
    with quiet(tmp_path / "whole") as log:
        write_steps(log, 1, 8)
    with quiet(tmp_path / "cut") as log:
        write_steps(log, 1, 6, loss=9.0)
    path = tmp_path / "cut" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"loss": 9.0', '"loss": 1.0'))
    with path.open("a") as file:
        file.write('{"step": 7, "loss": 0.1')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    with quiet(tmp_path / "cut", start_step=1) as log:
        write_steps(log, 2, 8)
    assert path.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_rewinding(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert rewind(path, 5) == 0
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}')
    assert rewind(path, 2) == 2
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert rewind(path, 0) == 0
    assert path.read_text() == ""
    path.write_text('{"step": 1}\nhello\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not a step's JSON object"):
        rewind(path, 2)
    assert path.read_text().count("\n") == 3


def test_tensorboard_shows_the_resumed_steps_only_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with quiet(tmp_path, tensorboard=True) as log:
        write_steps(log, 1, 5, loss=9.0)
    # Event files are named by the second and read in the order of their names.
    first = next((tmp_path / "tensorboard").iterdir())
    first.rename(first.with_name(first.name.replace("tfevents.", "tfevents.0")))
    routing = {"tokens_per_expert": [3, 0, 9], "expert_imbalance": [1.5, None, 2.0]}
    with quiet(tmp_path, tensorboard=True, start_step=3) as log:
        write_steps(log, 4, 6, loss=0.5, **routing)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("loss")]
    assert scalars == [(1, 9.0), (2, 9.0), (3, 9.0), (4, 0.5), (5, 0.5), (6, 0.5)]
    tags = events.Tags()["scalars"]
    assert "mfu" not in tags
    assert [tag for tag in tags if "expert" in tag] == ["expert_imbalance/mean", "expert_imbalance/max"]
    means = [(event.step, event.value) for event in events.Scalars("expert_imbalance/mean")]
    assert means == [(4, 1.75), (5, 1.75), (6, 1.75)]
    assert events.Scalars("expert_imbalance/max")[-1].value == 2.0
    assert read_metrics(log.path)[-1]["tokens_per_expert"] == routing["tokens_per_expert"]


def test_fields_by_names_are_mirrored_one_by_one(tmp_path):
    """And what was measured before the first step lies at the step before it, whatever a set is called."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fields = {"valid_loss": 2.0, "valid_losses": {"math": 1.5, "silent": None, "odd_at_start": 2.5}}
    before = {f"{name}_at_start": value for name, value in fields.items()}
    sources = {"source_losses": {"a": 0.5, "b": None}, "source_tokens": {"a": 300, "b": 0}}
    with quiet(tmp_path, tensorboard=True) as log:
        write_steps(log, 1, 1, valid_loss_at_start=9.0)
    # Event files are named by the second and read in the order of their names.
    abandoned = next((tmp_path / "tensorboard").iterdir())
    abandoned.rename(abandoned.with_name(abandoned.name.replace("tfevents.", "tfevents.0")))
    with quiet(tmp_path, tensorboard=True) as log:
        write_steps(log, 1, 1, **before, **sources)
        write_steps(log, 2, 2, **fields)
    first, second = read_metrics(log.path)
    assert first["valid_losses_at_start"] == second["valid_losses"] == fields["valid_losses"]
    assert first["source_losses"] == sources["source_losses"] and "valid_loss" not in first
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found["valid_loss"] == [(0, 2.0), (2, 2.0)]
    assert found["valid_losses/math"] == [(0, 1.5), (2, 1.5)]
    assert found["valid_losses/odd_at_start"] == [(0, 2.5), (2, 2.5)]
    assert found["source_losses/a"] == [(1, 0.5)] and found["source_tokens/b"] == [(1, 0.0)]
    assert not {"valid_losses/silent", "source_losses/b", "valid_loss_at_start"} & found.keys()


def test_held_out_losses_are_shown_by_set(tmp_path):
    stream = io.StringIO()
    with quiet(tmp_path, stream=stream, progress_every=1) as log:
        write_steps(log, 1, 1, valid_loss=1.25, valid_losses={"one": 1.25})
        write_steps(log, 2, 2, valid_loss=1.25, valid_losses={"one": 1.0, "two": 1.5, "silent": None})
        write_steps(log, 3, 3, valid_loss=None, valid_losses={"silent": None})
    shown = [line.split("held-out loss ")[1].split("  ")[0] for line in stream.getvalue().splitlines()]
    assert shown == ["1.2500", "1.2500 (one 1.0000, two 1.5000, silent unknown)", "unknown"]


def test_wandb_is_imported_only_when_chosen_and_goes_on_in_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with quiet(tmp_path) as log:
        write_steps(log, 1, 2)
    with pytest.raises(ValueError, match="is not installed: run `pip install wandb`"):
        quiet(tmp_path, wandb="lathe")

    logged, started = [], []
    run = SimpleNamespace(id="abc", log=logged.append, define_metric=lambda *_, **__: None, finish=lambda: None)

    def init(**options):
        started.append(options)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for start_step in (0, 1):
        with quiet(tmp_path, wandb="lathe", start_step=start_step) as log:
            write_steps(log, start_step + 1, start_step + 1, expert_imbalance=[1.0, 2.0])
    assert [options["id"] for options in started] == [None, "abc"]
    assert [line["step"] for line in logged] == [1, 2]
    assert "mfu" not in logged[0] and "expert_imbalance" not in logged[0]
    assert (logged[1]["expert_imbalance/mean"], logged[1]["expert_imbalance/max"]) == (1.5, 2.0)


def test_a_log_file_gets_few_plain_lines_with_an_eta(tmp_path):
    stream = io.StringIO()
    with quiet(tmp_path, total_steps=1000, stream=stream, progress_every=100) as log:
        write_steps(log, 1, 1, seconds=60.0)
        write_steps(log, 2, 500)
    text = stream.getvalue()
    lines = text.splitlines()
    assert [line.split()[1] for line in lines] == [
        "1/1000",
        *(f"{step}/1000" for step in range(100, 501, 100)),
    ]
    assert all(character.isprintable() or character == "\n" for character in text)
    assert "ETA 4:10" in lines[-1], "500 steps of half a second; the slow first step does not count"
    assert "1,800 tokens/s" in lines[-1]


def test_a_terminal_gets_one_live_line(tmp_path):
    stream = io.StringIO()
    stream.isatty = lambda: True
    with quiet(tmp_path, stream=stream) as log:
        write_steps(log, 1, 10)
    assert "step 10/10" in stream.getvalue()
    assert "loss 0.1000" in stream.getvalue()
    assert stream.getvalue().count("\n") <= 2


def test_times_are_written_for_people():
    assert [clock(value) for value in (0.4, 42, 725, 12_000)] == ["0:00", "0:42", "12:05", "3:20:00"]
