"""Which checkpoints are due, and which go."""

from __future__ import annotations

import json

import pytest

from engine.config import CheckpointConfig
from engine.retention import is_due, retain, to_remove
from engine.run_folder import RunFolder


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        ({}, []),
        ({"keep": 2}, [10, 20, 30]),
        ({"keep": 9}, []),
        ({"keep": 1, "keep_every": 20}, [10, 30]),
        ({"keep": 1, "keep_best": 2}, [10, 40]),
        ({"keep": 1, "keep_best": 1, "keep_every": 40}, [10, 30]),
        ({"latest": 30, "keep": 1}, [10, 20]),  # 40 and 50 lie beyond
        ({"latest": None, "keep": 1}, []),
        ({"rescues": [20, 40]}, [20, 40]),
        ({"rescues": [20, 50]}, [20]),  # the newest stays until there is another
        ({"rescues": [20, 50], "keep": 1}, [10, 20, 30]),
        ({"rescues": [20, 40], "keep": 1, "keep_every": 20, "keep_best": 5}, [10, 20, 40]),
    ],
)
def test_which_checkpoints_go(options, gone):
    losses = {20: 2.0, 30: 2.0, 40: None, 10: float("nan"), 50: 2.5}
    assert to_remove([50, 10, 30, 20, 40], **({"latest": 50, "losses": losses} | options)) == gone


def test_when_a_checkpoint_is_due():
    config = CheckpointConfig(every=10, rescue_every=4, rescue_minutes=2)
    found = {step: is_due(step, 0, config) for step in (3, 4, 8, 10, 20, 21)}
    assert found == {3: None, 4: "rescue", 8: "rescue", 10: "kept", 20: "kept", 21: None}
    assert is_due(3, 119, config) is None and is_due(3, 120, config) == "rescue"
    assert is_due(3, 0, config, last=True) == "kept"
    assert is_due(3, 0, config, stopping=True) == "rescue"
    plain = CheckpointConfig(every=10)
    assert is_due(3, 10**6, plain) is None and is_due(3, 0, plain, stopping=True) == "kept"
    assert is_due(3, 0, CheckpointConfig()) is None


def test_a_run_keeps_what_its_settings_name(tmp_path):
    run = RunFolder(tmp_path)
    lines = []
    for step in range(1, 7):
        run.checkpoint(step).mkdir(parents=True)
        run.export(step).mkdir(parents=True)
        (run.checkpoint(step) / "lathe.json").write_text(json.dumps({"rescue": step == 5}))
        lines.append(json.dumps({"step": step, "valid_loss": abs(step - 2.2)}))
    run.metrics.write_text("\n".join(lines) + "\n")
    run.latest.write_text("step_000006\n")
    gone = retain(run, CheckpointConfig(keep=1, keep_best=1, keep_every=3))
    assert gone == [run.checkpoint(step) for step in (1, 4, 5)]
    assert list(run.checkpoint_steps()) == [2, 3, 6]
    assert sorted(path.name for path in run.exports.iterdir()) == ["step_000002", "step_000003", "step_000006"]
