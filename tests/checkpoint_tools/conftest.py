"""A stand-in of the hub for the tests of this folder."""

from __future__ import annotations

import pytest

from tests.support.hub import StandInHub


@pytest.fixture
def hub(monkeypatch):
    """The hub that huggingface_hub finds in this process."""
    with StandInHub() as hub:
        hub.serve_library(monkeypatch)
        yield hub
