"""Fixtures of the tests on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import gpu

# The most telling first, so that little time on a GPU shows most: what reaches every run, then whole runs.
ORDER = (
    "test_experts",
    "test_fused",
    "test_attention",
    "test_permutation",
    "test_native",
    "test_te",
    "test_deterministic",
    "test_gradients",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts tests of files in `ORDER`, and slow ones behind all others; the rest of a session keeps its order."""

    def place(item: pytest.Item) -> tuple[bool, int]:
        name = item.path.stem
        return item.get_closest_marker("slow") is not None, ORDER.index(name) if name in ORDER else len(ORDER)

    here = [number for number, item in enumerate(items) if item.path.parent == Path(__file__).parent]
    for number, item in zip(here, sorted((items[number] for number in here), key=place), strict=True):
        items[number] = item


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
