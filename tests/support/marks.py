"""Cases of a parametrized test that `make test` leaves to `make test-slow`."""

import pytest


def slow(*values):
    """A case of a parametrized test that is one of many."""
    return pytest.param(*values, marks=pytest.mark.slow)
