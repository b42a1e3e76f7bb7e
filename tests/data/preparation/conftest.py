"""A model directory with a tokenizer, and chunks so small that few rows fill several."""

from pathlib import Path

import pytest

import data.preparation.rows
from tests.support.chatting import small_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    small_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(data.preparation.rows, "_BYTES", (1000, 1000))
    monkeypatch.setattr(data.preparation.rows, "_ROWS", (7, 7))
