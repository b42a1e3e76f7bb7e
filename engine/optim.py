"""AdamW that shards and resumes, its learning-rate schedules, and one checked update."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from megatron.core.optimizer import _get_param_groups_and_buffers
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig, ParamKey, ParamPredicate

from engine.config import OptimConfig
from engine.mesh import Mesh


class AdamW(torch.optim.AdamW):
    """Decoupled weight decay (Loshchilov and Hutter, 2019, arXiv:1711.05101), on torch's fused kernel.

    One step count a parameter group, and a state of `exp_avg` and `exp_avg_sq` alone: what megatron-core's
    distributed optimizer needs in order to reshard (torch's own keeps a step a parameter).
    """

    def __init__(self, params, lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        # Past torch's AdamW, whose class is there for megatron-core's type check alone.
        torch.optim.Optimizer.__init__(self, params, defaults)

    def initialize(self) -> None:
        """Creates zero moments for parameters that have none."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # it takes no closure
        """Updates every parameter that has a gradient; `lr` and `weight_decay` are read from its group."""
        self.initialize()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            states = [self.state[parameter] for parameter in parameters]
            step = torch.tensor(float(group["step"]), device=parameters[0].device)
            torch._fused_adamw_(
                parameters,
                [parameter.grad for parameter in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
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

    def state_dict(self) -> dict:
        """Returns the step and the groups' settings; tensors are `sharded_state_dict`'s business."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        return {"optimizer": {"param_groups": groups}}

    def load_state_dict(self, state: dict) -> None:
        """Takes over the step and, where there are any, the tensors that `sharded_state_dict` described."""
        self.optimizer.initialize()
        steps = {group["step"] for group in state["optimizer"]["param_groups"] if "step" in group}
        assert len(steps) <= 1, f"parameter groups disagree on the step: {steps}"
        for group in self.optimizer.param_groups:
            if steps:
                group["step"] = next(iter(steps))
        if "param_state" in state:
            self.load_parameter_state_from_fully_reshardable(state["param_state"])


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """The rate of `step` (from 1): the schedule's value after step - 1 updates, as Megatron and transformers.

    Warmup runs linearly from `warmup_init`; "cosine" and "linear" then decay to `min_lr` at `total_steps`;
    "wsd" stays at `lr` and decays linearly over the last `decay_steps`.
    """
    done = step - 1
    if done < optim.warmup_steps:
        return optim.warmup_init + (optim.lr - optim.warmup_init) * done / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    start = total_steps - optim.decay_steps if optim.schedule == "wsd" else optim.warmup_steps
    progress = min(max((done - start) / max(1, total_steps - start), 0.0), 1.0)
    share = 0.5 * (1 + math.cos(math.pi * progress)) if optim.schedule == "cosine" else 1 - progress
    return optim.min_lr + (optim.lr - optim.min_lr) * share


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
    one_dimensional = ParamKey(predicate=ParamPredicate(name="one_dimensional", fn=lambda p: p.dim() == 1))
    overrides = {} if optim.decay_one_dimensional else {one_dimensional: {"wd_mult": 0.0}}
    groups = mesh.groups
    kinds = (
        (False, "buffers", groups.intra_dp_cp, mesh.host_groups.dp_cp, groups.mp),
        (True, "expert_parallel_buffers", groups.intra_expt_dp, mesh.host_groups.expert_dp, groups.tp_ep_pp),
    )
    optimizers = []
    for expert, buffer_name, dp_group, host_group, mp_group in kinds:
        param_groups, buffers = _get_param_groups_and_buffers(
            chunks, 0, config, overrides, lambda group, e=expert: group["is_expert_parallel"] == e, buffer_name
        )
        if expert and not param_groups:
            continue
        for group in param_groups:
            group["weight_decay"] = optim.weight_decay * group["wd_mult"]
        adam = AdamW(param_groups, optim.lr, (optim.beta1, optim.beta2), optim.eps, optim.weight_decay)
        optimizer = ShardedAdamW(
            adam,
            config,
            None,
            lambda adam, config=None: adam.initialize(),
            model_chunks=chunks,
            per_model_buffers=buffers,
            data_parallel_group=dp_group,
            data_parallel_group_gloo=host_group,
            data_parallel_group_idx=mp_group.rank(),
            distributed_optimizer_instance_id=0,
        )
        optimizer.grad_stats_parallel_group = groups.intra_dist_opt
        optimizer.tp_group = groups.tp
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
