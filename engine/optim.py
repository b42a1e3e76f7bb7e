"""AdamW that shards and resumes, and one checked update."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from megatron.core.optimizer import _get_param_groups_and_buffers
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig, ParamKey, ParamPredicate
from torch import Tensor

from engine.config import OptimConfig
from engine.mesh import Mesh

# Elements that an update with bf16 moments widens at once: 16 bytes each, 16 MiB, however large the parameter is.
BLOCK = 1 << 20


@dataclass(frozen=True)
class ShardRange:
    """Where a parameter of the optimizer, often a shard, lies in a whole parameter of the model's rank."""

    name: str
    start: int  # the shard's first element
    numel: int  # of the whole


def round_stochastically(values: Tensor, noise: Tensor) -> Tensor:
    """Rounds fp32 `values` in place to neighbours that bf16 knows, so that the expected result is the value.

    `noise` is 16 random bits a value, int16. Added to the bits that bf16 lacks, they carry into those that bf16
    has as often as the value is far along to the next (Croci et al., 2022, doi:10.1098/rsos.211631).
    """
    values.view(torch.int32).add_(noise.int() & 0xFFFF).bitwise_and_(-(1 << 16))
    return values


class AdamW(torch.optim.AdamW):
    """Decoupled weight decay (Loshchilov and Hutter, 2019, arXiv:1711.05101), on torch's fused kernel.

    One step count a parameter group, and a state of `exp_avg` and `exp_avg_sq` alone: what megatron-core's
    distributed optimizer needs in order to reshard (torch's own keeps a step a parameter). `moments` is the
    state's dtype. In bf16 it is rounded stochastically: with beta2 = 0.999 a step moves `exp_avg_sq` by a thousandth,
    which rounding to the nearest, 1 in 256 apart, would undo every time. The update itself is always fp32.
    """

    def __init__(
        self,
        params,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        moments: torch.dtype = torch.float32,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        # Past torch's AdamW, whose class is there for megatron-core's type check alone.
        torch.optim.Optimizer.__init__(self, params, defaults)
        self.moments = moments
        self.shard_ranges: dict[Tensor, ShardRange] = {}

    def initialize(self) -> None:
        """Creates zero moments for parameters that have none."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in enumerate(parameters):
            state = self.state[parameter]
            if not state:
                state["exp_avg"] = torch.zeros_like(parameter, dtype=self.moments)
                state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=self.moments)
            self.shard_ranges.setdefault(parameter, ShardRange(str(number), 0, parameter.numel()))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # it takes no closure
        """Updates every parameter that has a gradient; `lr` and `weight_decay` are read from its group."""
        self.initialize()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if self.moments != torch.float32:
                for parameter in parameters:
                    self._update_in_blocks(group, parameter)
            elif parameters:
                states = [self.state[parameter] for parameter in parameters]
                averages, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
                _update(group, parameters, [parameter.grad for parameter in parameters], averages, squares)

    def _update_in_blocks(self, group: dict, parameter: Tensor) -> None:
        """Updates one parameter whose moments are narrow, a block of its fp32 moments at a time.

        The noise of an element is a function of the step and of where it lies in the whole parameter: a resumed run
        repeats it, and ranks that hold the same parameter, cut up as they may, round it alike.
        """
        shard, state = self.shard_ranges[parameter], self.state[parameter]
        assert parameter.grad is not None
        tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        weights, gradients, *stored = (tensor.view(-1) for tensor in tensors)
        generator = torch.Generator(parameter.device)
        end = shard.start + parameter.numel()
        for first in range(shard.start // BLOCK * BLOCK, end, BLOCK):
            last = min(first + BLOCK, shard.numel)
            own = slice(max(first, shard.start), min(last, end))
            local = slice(own.start - shard.start, own.stop - shard.start)
            moments = [moment[local].float() for moment in stored]
            _update(group, [weights[local]], [gradients[local]], [moments[0]], [moments[1]])
            # Drawn for the whole block, wherever it is cut: 16 bits an element and moment.
            digest = hashlib.sha256(f"{group['step']} {shard.name} {first}".encode()).digest()
            generator.manual_seed(int.from_bytes(digest[:8], "big"))
            drawn = torch.empty((last - first + 1) // 2, dtype=torch.int64, device=parameter.device)
            bits = drawn.random_(-(1 << 63), None, generator=generator).view(torch.int16).view(2, -1)
            for narrow, moment, noise in zip(stored, moments, bits, strict=True):
                narrow[local].copy_(round_stochastically(moment, noise[own.start - first : own.stop - first]))


def _update(
    group: dict, parameters: list[Tensor], gradients: list[Tensor], averages: list[Tensor], squares: list[Tensor]
) -> None:
    """One AdamW step of a group's parameters with their moments, all in place."""
    step = torch.full((), float(group["step"]), device=parameters[0].device)
    torch._fused_adamw_(
        parameters,
        gradients,
        averages,
        squares,
        [],
        [step] * len(parameters),
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )


class ShardedAdamW(DistributedOptimizer):
    """megatron-core's distributed optimizer around `AdamW`, whose step count lives in its groups.

    megatron-core 0.16.1 reads the step from a parameter's state unless Transformer Engine's or Apex's Adam
    is installed; here it is one number, the same for every parameter, with or without them.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for number, chunk in enumerate(self.model_chunks):
            for name, parameter in chunk.named_parameters():
                if parameter not in self.model_param_group_index_map:
                    continue  # frozen, another optimizer's, or wholly another rank's
                # The first and the last pipeline stage each train a copy of a tied embedding.
                name = "tied embedding" if getattr(parameter, "shared_embedding", False) else f"{number} {name}"
                start = self._get_model_param_range_map(parameter)["param"].start
                group, order = self.model_param_group_index_map[parameter]
                shard = self.optimizer.param_groups[group]["params"][order]
                self.optimizer.shard_ranges[shard] = ShardRange(name, start, parameter.numel())


def steps_taken(optimizer: ChainedOptimizer) -> int:
    """How many updates the optimizer has made; all that a resume needs of it beside its tensors."""
    steps = {group.get("step", 0) for group in optimizer.param_groups}
    assert len(steps) == 1, f"parameter groups disagree on the step: {steps}"
    return steps.pop()


def set_steps_taken(optimizer: ChainedOptimizer, steps: int) -> None:
    """Lets the optimizer go on as if it had made so many updates."""
    for group in optimizer.param_groups:
        group["step"] = steps


def _is_one_dimensional(parameter: torch.nn.Parameter) -> bool:
    """Norms, biases and sinks; also biases of several experts in one tensor."""
    return parameter.dim() == 1 or getattr(parameter, "is_bias", False)


def build_optimizer(optim: OptimConfig, chunks: list, mesh: Mesh, *, bf16: bool) -> ChainedOptimizer:
    """One sharded optimizer for dense and, where there are any, one for expert parameters."""
    overlap = chunks[0].ddp_config.overlap_param_gather
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=overlap,
        clip_grad=optim.clip_grad,
    )
    one_dimensional = ParamKey(predicate=ParamPredicate(name="one_dimensional", fn=_is_one_dimensional))
    overrides = {} if optim.decay_one_dimensional else {one_dimensional: {"wd_mult": 0.0}}
    groups = mesh.groups
    kinds = (
        (False, "buffers", groups.intra_dp_cp, groups.mp, groups.tp),
        (True, "expert_parallel_buffers", groups.intra_expt_dp, groups.tp_ep_pp, groups.expt_tp),
    )
    optimizers = []
    for expert, buffer_name, dp_group, mp_group, tp_group in kinds:
        param_groups, buffers = _get_param_groups_and_buffers(
            chunks, 0, config, overrides, lambda group, e=expert: group["is_expert_parallel"] == e, buffer_name
        )
        if expert and not param_groups:
            continue
        for group in param_groups:
            group["weight_decay"] = optim.weight_decay * group["wd_mult"]
        moments = torch.bfloat16 if optim.moments == "bf16" else torch.float32
        adam = AdamW(param_groups, optim.lr, (optim.beta1, optim.beta2), optim.eps, optim.weight_decay, moments)
        optimizer = ShardedAdamW(
            adam,
            config,
            None,
            lambda adam, config=None: adam.initialize(),
            model_chunks=chunks,
            per_model_buffers=buffers,
            data_parallel_group=dp_group,
            data_parallel_group_gloo=None,  # over which it would gather its state, which stays where it lies
            data_parallel_group_idx=mp_group.rank(),
            distributed_optimizer_instance_id=0,
        )
        optimizer.grad_stats_parallel_group = groups.intra_dist_opt
        # Whose first rank counts what its ranks all hold in the gradient's norm.
        optimizer.tp_group = tp_group
        optimizers.append(optimizer)
    return ChainedOptimizer(optimizers)


@dataclass(frozen=True)
class Update:
    """What an update did: the gradient's norm before clipping, and whether weights moved."""

    grad_norm: float
    applied: bool


def update(optimizer: ChainedOptimizer, *, lr: float, clip_grad: float) -> Update:
    """Clips and applies the reduced gradients at rate `lr`; a norm that is not finite leaves weights alone."""
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        return Update(norm, applied=False)
    if 0 < clip_grad < norm:
        for single in optimizer.chained_optimizers:
            clip_grad_by_total_norm_fp32(single.get_parameters(), max_norm=clip_grad, total_norm=norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step_with_ready_grads()
    return Update(norm, applied=True)
