"""Fixtures that all tests share."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


@pytest.fixture(scope="session")
def pool():
    """Processes for distributed cases, started at the first use and shared by the whole session."""
    from tests.support.world import Pool  # imports torch, before which tests/gpu sets the environment

    shared = Pool()
    yield shared
    shared.close()
