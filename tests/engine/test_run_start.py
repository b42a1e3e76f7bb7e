"""How ranks come to own RUN together: what one of them finds wrong is refused on all, and nothing is left behind."""

from __future__ import annotations

import dataclasses
import os

import pytest

from engine import run_start
from engine.cli import parse_run
from engine.layout import world_from_environment
from engine.prepare import find_start, prepare_run
from engine.run_folder import RunFolder
from engine.run_status import Refused
from engine.train import train
from tests.engine.test_failures import arguments, outcome
from tests.support.tiny import make_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def start_late(given: list[str], late: int) -> str:
    """The refusal of a start in which one rank has prepared itself from the checkpoint before the newest."""
    rank, world_size, _ = world_from_environment()
    config = parse_run(given)
    prepared = prepare_run(config, world_size=world_size, cuda=False)
    if rank == late:
        before = dataclasses.replace(config.checkpoint, resume_from=1)
        prepared = dataclasses.replace(prepared, resume=find_start(prepared.run, before))
    try:
        train(prepared)
    except Refused as error:
        return str(error)
    return ""


def test_a_run_that_went_on_is_refused_on_all_ranks(pool, inputs, tmp_path):
    run = RunFolder(tmp_path / "run")
    given = arguments(inputs, run.path, "--checkpoint.every", "1", "--optim.schedule", "constant")
    assert pool.run(outcome, 1, given) == [""]
    for late in (0, 1):
        found = pool.run(start_late, 2, [*given, "--steps", "3"], late)
        assert found == [f"the run in {run.path} went on while this one was starting: start it again"] * 2
        assert sorted(path.name for path in run.checkpoints.iterdir()) == ["latest", "step_000001", "step_000002"]
        assert not run.lock.exists()


def test_one_rank_that_is_done_waits_for_none_that_is_not(pool, inputs, tmp_path):
    """Ranks that stand at different last steps are told so, and do not wait for each other in different places."""
    given = arguments(inputs, tmp_path / "run", "--optim.schedule", "constant")
    assert pool.run(outcome, 1, given) == [""]
    found = pool.run(outcome_of, 2, [given, [*given, "--steps", "3"]])
    assert found[0] == found[1] and "the configuration, steps, is 2 on rank 0 (" in found[0]


def outcome_of(own: list[list[str]]) -> str:
    return outcome(own[world_from_environment()[0]])


@pytest.mark.parametrize(("flags", "said"), [("--tp 2", "tp, is 1"), ("--pp 2", "pp, is 1"), ("--cp 2", "cp, is 1")])
def test_layouts_that_differ_are_told_before_groups_are_built(pool, inputs, tmp_path, flags, said):
    given = arguments(inputs, tmp_path / "run")
    found = pool.run(outcome_of, 2, [given, [*given, *flags.split()]])
    assert found[0] == found[1]
    assert found[0].startswith(f"Refused: the ranks do not agree: the layout, {said} on rank 0 (")
    assert ", 2 on rank 1 (" in found[0] and not (tmp_path / "run").exists()


def test_a_file_of_another_node_may_appear_late(tmp_path, monkeypatch):
    """As NFS shows it: not there until the directory is listed."""
    path = tmp_path / "run" / "checkpoints" / "trial_0.tmp"
    path.parent.mkdir(parents=True)
    monkeypatch.setattr(run_start, "CACHED", 0.0)
    assert not run_start._appears(path)
    monkeypatch.setattr(run_start, "CACHED", 20.0)
    monkeypatch.setattr(os, "listdir", lambda folder: path.touch() if folder == path.parent else None)
    assert run_start._appears(path)
