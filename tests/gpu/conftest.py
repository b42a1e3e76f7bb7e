"""Fixtures of the tests on a GPU."""

from __future__ import annotations

import pytest

from tests import gpu


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model directories by name, made when first asked for."""
    from tests.support.tiny import save_model

    made = {}

    def get(name: str):
        if name not in made:
            made[name] = save_model(name, tmp_path_factory.mktemp(name), **gpu.SHAPES.get(name, gpu.SHAPE))
        return made[name]

    return get


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return gpu.make_inputs(tmp_path_factory.mktemp("inputs"))
