"""Process groups: the only file that touches megatron-core's `parallel_state`."""

from __future__ import annotations

import contextlib
import datetime
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from engine.layout import Layout, world_from_environment


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """This process in the grid of ranks; `groups` is what megatron-core's modules take."""

    layout: Layout
    world_size: int
    rank: int
    dp_size: int
    dp_rank: int
    tp_rank: int
    cp_rank: int
    pp_rank: int
    device: torch.device
    groups: Any  # megatron.core.process_groups_config.ProcessGroupCollection

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pp_rank == self.layout.pp - 1

    @property
    def is_first_of_stage(self) -> bool:
        """Whether this rank speaks for its pipeline stage."""
        return self.dp_rank == self.tp_rank == self.cp_rank == 0

    @property
    def is_logger(self) -> bool:
        """Whether this rank writes what the run prints and logs: the first of the last stage, who knows losses."""
        return self.is_last_stage and self.is_first_of_stage


def join_world(*, timeout_minutes: int = 30) -> tuple[int, int, torch.device]:
    """Joins the group of all ranks, once; this one's rank, their number and its device."""
    rank, world_size, local_rank = world_from_environment()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if distributed.is_initialized():
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
    else:
        options = world_options(device, timeout_minutes)
        if world_size == 1 and "MASTER_ADDR" not in os.environ:
            options["store"] = distributed.HashStore()
        distributed.init_process_group(rank=rank, world_size=world_size, **options)
    return rank, world_size, device


def world_options(device: torch.device, timeout_minutes: int) -> dict[str, Any]:
    """How the group of all ranks is made, from which megatron-core's groups take their backend.

    On CUDA it is NCCL alone, also for the few objects that ranks tell each other: gloo would connect every rank of
    every group with every other, and pass a number around all of them one by one after each step. Given its device, a
    rank's communicator is there at once, and no rank guesses a device.
    """
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if device.type == "cpu":
        return {"backend": "gloo", "timeout": timeout}
    return {"backend": "nccl", "timeout": timeout, "device_id": device}


@contextlib.contextmanager
def _made_by_their_members() -> Iterator[None]:
    """Lets the ranks of a group alone make its communicator, when they first use it.

    Where the world is bound to a device, torch splits every group off the world instead, and each of thousands of
    groups then waits for all ranks, one after another (torch 2.13, `distributed_c10d._new_process_group_helper`).
    """
    world: Any = distributed.group.WORLD
    bound = world.bound_device_id
    if bound is None:
        yield
        return
    world.bound_device_id = None
    try:
        yield
    finally:
        world.bound_device_id = bound


def build_mesh(layout: Layout, *, timeout_minutes: int = 30) -> Mesh:
    """Joins the world and creates every process group.

    The layout must have passed `check_layout` and be the same on all ranks: others wait for each other in vain.
    """
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    rank, world_size, device = join_world(timeout_minutes=timeout_minutes)
    with _made_by_their_members():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=timeout_minutes,
        )
    # Nothing is drawn at random in training, but sequence parallelism forks these generators.
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return Mesh(
        layout=layout,
        world_size=world_size,
        rank=rank,
        dp_size=groups.dp.size(),
        dp_rank=groups.dp.rank(),
        tp_rank=groups.tp.rank(),
        cp_rank=groups.cp.rank(),
        pp_rank=groups.pp.rank(),
        device=device,
        groups=groups,
    )


def outcomes(work: Callable[[], Any] | None) -> list[tuple[Any, str | None]]:
    """Runs each rank's work, if it has any; of every rank what came of it, and the text of what went wrong.

    No failure is let through on one rank alone, where the others would wait for it.
    """
    result, failure = None, None
    try:
        result = work() if work else None
    except (OSError, ValueError) as error:
        failure = str(error)
    except Exception as error:  # none that a user can mend: where it comes from is said by the rank itself
        failure = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, (result, failure))
    return found


def gather_samples(own: set[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Collects samples over all ranks, which all call it, in order."""
    gathered: list[set[tuple[int, int]]] = [set()] * distributed.get_world_size()
    distributed.all_gather_object(gathered, own)
    return tuple(sorted(set().union(*gathered)))


def destroy_mesh() -> None:
    """Forgets the groups (a process may then build another mesh) and leaves the world's group standing."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
