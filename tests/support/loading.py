"""A loader from one set of keyword arguments, those of its order included."""

from __future__ import annotations

from collections.abc import Sequence

from data.loader import Loader
from data.order import GlobalOrder

LOADER = ("micro_batch_size", "dp_rank", "dp_size", "microbatch_multiple", "pad_token")


def make_loader(blend: Sequence, **settings) -> Loader:
    """The loader of one rank over (index, weight) pairs."""
    own = {name: settings.pop(name) for name in LOADER if name in settings}
    return Loader(GlobalOrder(blend, **settings), **own)
