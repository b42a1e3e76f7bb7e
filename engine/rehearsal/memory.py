"""What each rank of a run will hold in memory, found by building it on the meta device in a world of fakes.

Counted are parameters, gradients and the optimizer's state, as the engine itself allocates them. Activations,
the copies that FP8 layers keep of their weights, and what a checkpoint gathers while it is written are not.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from engine import host
from engine.check_model import check_model, check_settings, megatron_config, present
from engine.check_values import check_values
from engine.config import RunConfig
from engine.mcore_fields import check_needs
from engine.mesh import build_mesh
from engine.optim import build_optimizer
from engine.rehearsal.fake_world import fake_world
from engine.step import wrap_chunks
from models.backend import choose_backend
from models.build import build_chunks
from models.description import ModelDescription
from models.layers.router import set_routers


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """What one rank of a pipeline stage holds from the first step to the last, in bytes unless said otherwise."""

    stage: int
    layers: int  # of all interleaved stages that the rank holds
    num_parameters: int
    parameters: int
    gradients: int  # buffers, and of narrow ones this rank's share in fp32 while weights are updated
    optimizer: int  # fp32 master weights, where parameters are narrower, and two moments: this rank's share

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def check_plan(config: RunConfig, description: ModelDescription, world_size: int) -> None:
    """Every check of Lathe's own that needs neither data, weights nor the run's machines; ValueError in one sentence.

    Those may have Transformer Engine. Under --backend auto they may not, so what one of both backends serves passes.
    """
    assert config.model is not None
    check_values(dataclasses.replace(config, data=config.data or ("DATA",)))
    check_model(config, description, world_size, pad_multiple=config.pad_multiple)
    backend, _ = choose_backend(config.backend, cuda=True, precision=config.precision, missing=None)
    check_needs(config.mcore, present(config, description, backend))
    either = config.backend == "auto" and config.precision != "fp8"
    check_settings(config, description, "native" if either else backend)  # the native layers' parts are the most


def plan_memory(config: RunConfig, description: ModelDescription, world_size: int) -> tuple[StageMemory, ...]:
    """The memory of the first rank of each pipeline stage of a run on `world_size` ranks.

    Ranks of a stage differ by the padding of their shards only. The layers are the native ones, whose parameters
    are Transformer Engine's. Nothing may have joined a process group in this process, nor may it see a GPU.
    """
    check_plan(config, description, world_size)
    ranks_per_stage = world_size // config.pp
    return tuple(
        _stage_memory(config, description, stage, stage * ranks_per_stage, world_size) for stage in range(config.pp)
    )


def _stage_memory(
    config: RunConfig, description: ModelDescription, stage: int, rank: int, world_size: int
) -> StageMemory:
    narrow = config.precision != "fp32"
    # Dispatchers hold nothing, and some cannot be built here; nor does any field of --mcore change what is counted.
    moe = dataclasses.replace(config.moe, dispatcher="alltoall")
    native = dataclasses.replace(config, precision="bf16" if narrow else "fp32", moe=moe, recompute="none", mcore={})
    host.enable()
    with fake_world(rank, world_size):
        mesh = build_mesh(config.layout)
        assert mesh.pp_rank == stage
        with host.on_meta():
            transformer = megatron_config(native, description)
            chunks = build_chunks(description, transformer, backend="native", groups=mesh.groups)
            set_routers(chunks, aux_loss=config.moe.aux_loss, frozen=config.moe.freeze_router)
            wrapped = wrap_chunks(chunks, mesh, gradients=config.optim.gradients)
            optimizer = build_optimizer(config.optim, wrapped, mesh, bf16=narrow)
            return measure(stage, chunks, wrapped, optimizer)


def measure(stage: int, chunks: list, wrapped: list, optimizer: Any) -> StageMemory:
    """What this rank's model chunks, their gradient buffers and their optimizer hold; creates zero moments."""
    weights = [parameter for chunk in chunks for parameter in chunk.parameters()]
    buffers = [buffer for chunk in wrapped for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    gradients = sum(buffer.grad_data.nbytes for buffer in buffers)
    state: list[torch.Tensor] = []
    for sharded in optimizer.chained_optimizers:
        sharded.optimizer.initialize()
        gradients += sum(_widened(sharded, parameter) for parameter in sharded.model_param_group_index_map)
        state += [tensor for group in sharded.shard_fp32_from_float16_groups for tensor in group]
        state += [tensor for moments in sharded.optimizer.state.values() for tensor in moments.values()]
    return StageMemory(
        stage=stage,
        layers=sum(len(chunk.decoder.layers) for chunk in chunks),
        num_parameters=sum(parameter.numel() for parameter in weights),
        parameters=sum(parameter.nbytes for parameter in weights),
        gradients=gradients,
        optimizer=sum(tensor.nbytes for tensor in state),
    )


def _widened(optimizer: Any, parameter: torch.Tensor) -> int:
    """Bytes of a narrow gradient's fp32 copy, which an update takes of this rank's share."""
    if parameter.main_grad.dtype == torch.float32:  # type: ignore[attr-defined]  # megatron-core's
        return 0
    return 4 * optimizer._get_model_param_range_map(parameter)["param"].size
