"""A run that is killed again and again ends as one that was left alone; `benchmarks/kills.py` does it 100 times."""

from __future__ import annotations

import pytest

from benchmarks.kills import trial
from tests.support.tiny import make_inputs


@pytest.mark.slow
def test_eight_kills_change_nothing_and_leave_nothing(tmp_path):
    assert trial(make_inputs(tmp_path, "qwen2_tied", 30), kills=8, steps=500, seed=3, longest=14.0) == []
