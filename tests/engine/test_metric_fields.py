"""The fields of metrics.jsonl are those of docs/metrics.md, and what they say of time, memory and sums is true."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from data.index import write_index
from data.loader import Loader
from engine import trainer
from engine.checkpointing.saver import Saver
from engine.costs import TICKS, Stopwatch, cost_fields, peak_memory
from engine.guards.spikes import ENOUGH
from engine.reporting.metrics import FIELDS, MEASURED
from engine.reporting.tracker_names import TrackerNames
from engine.run_folder import RunFolder
from tests.engine.test_failures import outcome
from tests.engine.test_held_out import SHAPE, write_mixed
from tests.support.tiny import VOCABULARY, conversations, save_model

DOCS = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
SKIPPED, SLOW, SAVED = 3, 5, 10  # steps
SPIKE = ENOUGH + 2
STEPS = SPIKE + 2
WAIT = 0.3  # seconds


def tables() -> list[dict[str, str]]:
    """The tables of the page: from each name its unit."""
    sections = DOCS.read_text(encoding="utf-8").split("\n## ")
    found = [dict(re.findall(r"^\| `(\w+)` \|([^|]*)\|", section, re.MULTILINE)) for section in sections]
    return [table for table in found if table]


def eventful(arguments: list[str]) -> str:
    """Trains: a step that is skipped, a loss that jumps, a slow loader of the last rank, a slow save of the first,
    and a signal before the last measurement.
    """
    run, load, save, rank = trainer.run_microbatches, Loader.next_step, Saver.start, int(os.environ["RANK"])
    step = 0

    def computed(*rest, forward_only: bool = False, **options):
        nonlocal step
        totals = run(*rest, forward_only=forward_only, **options)
        if forward_only:
            return totals
        step += 1
        if step == STEPS:  # heard by the measurement that follows
            os.kill(os.getpid(), signal.SIGTERM)
        changes = {SKIPPED: math.nan, SPIKE: 1000 * totals.loss_sum}
        return dataclasses.replace(totals, loss_sum=changes.get(step, totals.loss_sum))

    def loaded(self):
        time.sleep(WAIT * (rank == 1 and step == SLOW - 1))
        return load(self)

    def saved(self, number, manifest):
        time.sleep(WAIT * (rank == 0 and number == SAVED))
        return save(self, number, manifest)

    trainer.run_microbatches, Loader.next_step, Saver.start = computed, loaded, saved
    try:
        return outcome(arguments)
    finally:
        trainer.run_microbatches, Loader.next_step, Saver.start = run, load, save


@pytest.fixture(scope="module")
def run(pool, tmp_path_factory) -> RunFolder:
    """A run on two ranks in which everything happens that a line can speak of, stopped and continued for two steps."""
    folder = tmp_path_factory.mktemp("fields")
    save_model("qwen3_moe", folder / "model", layers=2)
    paths = ["--model", folder / "model", "--data", write_mixed(folder / "data", 1), "--output", folder / "run"]
    held_out = ["--valid", write_mixed(folder / "held", 2), "--valid-every", STEPS // 2, "--valid-at-start"]
    more = f"--on-bad-step skip --checkpoint.every {SAVED} --moe.aux-loss 0.01 --optim.schedule constant"
    more += f" --global-batch-size 4 --steps {STEPS}"
    arguments = [*map(str, paths + held_out), *SHAPE.split(), *more.split()]
    assert pool.run(eventful, 2, arguments) == ["", ""]
    kept = RunFolder(folder / "run")
    (folder / "stopped.jsonl").write_text(kept.metrics.read_text())
    first = next(kept.tensorboard.iterdir())  # event files are named by the second and read in the order of their names
    first.rename(first.with_name(first.name.replace("tfevents.", "tfevents.0")))
    assert pool.run(outcome, 2, [*arguments, "--steps", str(STEPS + 2)]) == ["", ""]
    return kept


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_page_names_what_is_written(pool, run, tmp_path):
    always, sometimes, names = tables()
    save_model("qwen2_untied", tmp_path / "model", layers=2)
    write_index(tmp_path / "data", conversations(9).documents, vocab_size=VOCABULARY)
    paths = ["--model", tmp_path / "model", "--data", tmp_path / "data", "--output", tmp_path / "run"]
    assert pool.run(outcome, 1, [*map(str, paths), *SHAPE.split()]) == [""]
    assert {field for line in lines(RunFolder(tmp_path / "run").metrics) for field in line} == always.keys()
    found = [set(line) for line in (*lines(run.path.parent / "stopped.jsonl"), *lines(run.metrics))]
    assert set.intersection(*found) >= always.keys()
    assert set.union(*found) - always.keys() == sometimes.keys()
    assert tuple(always)[: len(FIELDS)] == FIELDS
    assert names.keys() == TrackerNames([], 1).numbers({"tokens": 1}).keys()
    units = {"s", "tokens/s", "1e12/s", "MiB"}
    assert {name for name, unit in always.items() if unit.strip() in units} | {"mfu"} == MEASURED.keys()


def test_time_is_split_and_the_slowest_rank_counts(run):
    found = {line["step"]: line for line in lines(run.metrics)}
    assert max(found, key=lambda step: found[step]["data_seconds"]) == SLOW and found[SLOW]["data_seconds"] >= WAIT
    assert found[SAVED + 1]["save_seconds"] >= WAIT
    saved = {step for step, line in found.items() if line["save_seconds"] > 0}
    assert {SAVED + 1, 2 * SAVED + 1} <= saved and not saved & {2, 4, 6, 8}
    for line in found.values():
        assert line["data_seconds"] + line["compute_seconds"] == pytest.approx(line["seconds"], abs=2e-4)
        assert line["peak_device_mib"] is None and line["peak_host_mib"] > 100
    assert cost_fields(0.5, TICKS, 0, 7, 9)["compute_seconds"] == 0  # a clock that began before another's


def test_sums_in_tensorboard_go_on_over_a_resume(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = lines(run.metrics)
    events = EventAccumulator(str(run.tensorboard)).Reload()
    logged = {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}
    assert set(tables()[2]) <= set(logged)
    tokens = padding = 0
    for line in found:
        step = line["step"]
        tokens, padding = tokens + line["tokens"], padding + line["padding_tokens"]
        assert (logged["total_tokens"][step], logged["total_tokens_including_padding"][step]) == (
            tokens,
            tokens + padding,
        )
        each = line["tokens_per_second"] / 2
        assert logged["per_device_tps"][step] == pytest.approx(each, rel=1e-6)
        padded = each * (line["tokens"] + line["padding_tokens"]) / line["tokens"]
        assert logged["per_device_tps_including_padding"][step] == pytest.approx(padded, rel=1e-6)
    assert padding > 0 and [line["step"] for line in found] == list(range(1, STEPS + 3))
    assert logged["train_loss"] == logged["loss"]
    assert SKIPPED not in logged["train_loss"] and logged["learning_rate"] == logged["lr"]


def test_memory_is_read_without_waiting_for_the_device(monkeypatch):
    """Of a device that only says its peak, once a call, and would not bear to be waited for."""
    peaks = iter([5 << 20, 3 << 20])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    reset = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("the device was waited for"))
    device = torch.device("cuda", 0)
    assert [peak_memory(device)[0], peak_memory(device)[0]] == [5, 3] and reset == [device, device]
    before = peak_memory(torch.device("cpu"))
    assert before[0] == 0
    held = torch.ones(1 << 27)  # 512 MiB
    assert peak_memory(torch.device("cpu"))[1] > max(before[1], 512) - 1 and held[0] == 1


def test_a_stopwatch_adds_up_until_it_is_asked():
    watch = Stopwatch()
    for _ in range(2):
        with watch:
            time.sleep(0.01)
    assert 0.02 <= watch.take() / TICKS < 1 and watch.take() == 0
