"""A world of ranks of which this process is the only real one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from engine.mesh import destroy_mesh


@contextlib.contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """A world whose other ranks do not exist and whose collectives do nothing; this process is `rank` in it."""
    assert not torch.cuda.is_available(), "a plan is made where no GPU is visible"
    assert not distributed.is_initialized(), "a plan is made outside of any run"
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        destroy_mesh()
        distributed.destroy_process_group()
