"""A run that is killed again and again ends as one that was left alone; `benchmarks/kills.py` does it 100 times."""

from __future__ import annotations

import pytest

from benchmarks.kills import trial
from data.index import write_index
from tests.support.tiny import VOCABULARY, conversations, save_model


@pytest.mark.slow
def test_eight_kills_change_nothing_and_leave_nothing(tmp_path):
    save_model("qwen2_tied", tmp_path / "model", layers=2)
    write_index(tmp_path / "data", conversations(30).documents, vocab_size=VOCABULARY)
    assert trial(tmp_path, kills=8, steps=500, seed=3, longest=14.0) == []
