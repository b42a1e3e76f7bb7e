"""AdamW's bf16 moments: unbiased, alike on all ranks, exact through checkpoints; and experts in the gradient's norm."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import distributed

from data.index import write_index
from engine import optim
from engine.checkpointing.checkpoint import sharding_metadata
from engine.checkpointing.shards import own_shards
from engine.config import OptimConfig
from engine.layout import Layout
from engine.mesh import build_mesh
from engine.optim import AdamW, ShardRange, build_optimizer, round_stochastically, update
from engine.step import run_microbatches, wrap_chunks
from tests.engine.checkpointing.test_resume import interrupt, metrics, run, tensors
from tests.support.tiny import VOCABULARY, conversations, save_model
from tests.support.training import make_loader, start


def noise(*shape: int) -> torch.Tensor:
    """The 16 random bits a value that a rounding takes."""
    return torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16)


def adam(parameter: torch.Tensor, moments: torch.dtype, **changes) -> AdamW:
    """An optimizer of one parameter."""
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, **changes}
    return AdamW([parameter], moments=moments, **settings)


def test_roundings_have_the_value_as_their_mean():
    torch.manual_seed(1)
    # Both signs, from far below the least normal number to near the largest one.
    values = torch.randn(500) * 10.0 ** torch.linspace(-41, 37, 500)
    many = 4096
    rounded = round_stochastically(values.repeat(many, 1), noise(many, 500))
    assert torch.equal(rounded, rounded.bfloat16().float())
    cut = (values.view(torch.int32) & -(1 << 16)).view(torch.float32)
    unit = (cut.view(torch.int32) + (1 << 16)).view(torch.float32) - cut  # to the next number away from zero
    assert (((rounded == cut) | (rounded == cut + unit)).all(0)).all()
    # A mean of `many` draws of one of two neighbours lies within half a unit / sqrt(many) of its expectation, in
    # one standard deviation; five of them leave one value in a million outside.
    error = (rounded.double().mean(0) - values.double()) / unit.double()
    assert error.abs().max() < 5 * 0.5 / many**0.5
    known = values.bfloat16().float()
    assert torch.equal(round_stochastically(known.repeat(16, 1), noise(16, 500)), known.expand(16, 500))


def test_the_second_moment_decays_where_rounding_to_the_nearest_would_stop_it():
    torch.manual_seed(2)
    parameter = torch.zeros(4096, requires_grad=True)
    optimizer = adam(parameter, torch.bfloat16, betas=(0.9, 0.999))
    parameter.grad = torch.rand(4096) + 0.5
    optimizer.step()
    first = optimizer.state[parameter]["exp_avg_sq"].float()
    parameter.grad.zero_()
    for _ in range(1000):
        optimizer.step()
    ratio = optimizer.state[parameter]["exp_avg_sq"].double() / first
    # Of one element, roundings add up to a standard deviation of at most 2**-8 / sqrt(1 - 0.999**2) = 9%.
    assert ratio.mean().item() == pytest.approx(0.999**1000, rel=5 * 0.09 / 4096**0.5)
    assert ratio.std() < 0.09
    assert torch.equal((first * 0.999).bfloat16().float(), first), "the nearest bf16 number is where it was"


def test_parameters_move_as_with_fp32_moments():
    torch.manual_seed(3)
    gradients = 0.5 * torch.randn(64) + torch.randn(300, 64)
    moved = []
    for moments in (torch.float32, torch.bfloat16):
        parameter = torch.zeros(64, requires_grad=True)
        optimizer = adam(parameter, moments)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        moved.append(parameter.detach().double())
        state = optimizer.state[parameter]
        assert {name: tensor.dtype for name, tensor in state.items()} == {"exp_avg": moments, "exp_avg_sq": moments}
        assert sum(tensor.nbytes for tensor in state.values()) == 2 * 64 * moments.itemsize
    # A rounding is off by at most 2**-8 in one standard deviation; what decay keeps of earlier ones makes that
    # 0.9% of the first moment and 1.3% of the second, together 1.1% of an update. Over 300 updates it averages out.
    distance = (moved[1] - moved[0]).norm() / moved[0].norm()
    assert 0 < distance < 0.011


@pytest.mark.parametrize("cuts", [(0, 304), (0, 16, 64, 80, 304), (0, 144, 304)])
def test_roundings_do_not_depend_on_how_a_parameter_is_cut(monkeypatch, cuts):
    monkeypatch.setattr(optim, "BLOCK", 64)
    torch.manual_seed(4)
    # Cut at multiples of 16: on the host, torch's kernel gives what fills no vector another last bit.
    start, gradients = torch.randn(19, 16), torch.randn(5, 304)
    whole = start.clone().requires_grad_()
    shards = [start.view(-1)[low:high].clone().requires_grad_() for low, high in pairwise(cuts)]
    optimizers = [adam(part, torch.bfloat16) for part in (whole, *shards)]
    for optimizer, part, low in zip(optimizers, (whole, *shards), (0, *cuts), strict=False):
        optimizer.shard_ranges[part] = ShardRange("weight", low, 304)
    for gradient in gradients:
        whole.grad = gradient.view(19, 16).clone()
        for shard, low in zip(shards, cuts, strict=False):
            shard.grad = gradient[low : low + len(shard)].clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(torch.cat([shard.detach() for shard in shards]), whole.detach().view(-1))
    for name in ("exp_avg", "exp_avg_sq"):
        found = torch.cat([one.state[part][name] for one, part in zip(optimizers[1:], shards, strict=True)])
        assert torch.equal(found, optimizers[0].state[whole][name].view(-1))
    other = adam(whole, torch.bfloat16)
    other.shard_ranges[whole] = ShardRange("another weight", 0, 304)
    other.step()
    again = adam(whole, torch.bfloat16)
    again.shard_ranges[whole] = ShardRange("weight", 0, 304)
    again.step()
    assert not torch.equal(other.state[whole]["exp_avg"], again.state[whole]["exp_avg"])


def replicas(folder: Path, layout: Layout) -> dict[str, torch.Tensor]:
    """Trains three steps with bf16 moments; returns this rank's one-dimensional weights and the tied embedding."""
    part = start(folder, layout)
    wrapped = wrap_chunks(part.chunks, part.mesh)
    settings = OptimConfig(lr=1e-2, moments="bf16")
    optimizer = build_optimizer(settings, wrapped, part.mesh, bf16=False)
    loader = make_loader(conversations(16), part.mesh, {})
    for _ in range(3):
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        run_microbatches(wrapped, loader.next_step(), part.mesh, kernel="padded")
        update(optimizer, lr=1e-2, clip_grad=1.0)
    found = {}
    for chunk in part.chunks:
        for name, parameter in chunk.named_parameters():
            if getattr(parameter, "shared_embedding", False):
                found["tied"] = parameter.detach().clone()
            elif not getattr(parameter, "tensor_model_parallel", False):
                found[f"{part.mesh.pp_rank} {name}"] = parameter.detach().clone()
    return found


@pytest.mark.parametrize(("ranks", "layout"), [(4, Layout(pp=2)), (2, Layout(tp=2, sp=True))])
def test_copies_of_a_weight_stay_equal(pool, tmp_path, ranks, layout):
    save_model("qwen2_tied", tmp_path / "model", layers=2)
    found = pool.run(replicas, ranks, tmp_path / "model", layout)
    assert all("tied" in weights for weights in found) == (layout.pp == 2)
    compared = 0
    for weights in found[1:]:
        for name in weights.keys() & found[0].keys():
            assert torch.equal(weights[name], found[0][name]), name
            compared += 1
    assert compared >= 3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model and a data directory."""
    folder = tmp_path_factory.mktemp("inputs")
    save_model("qwen2_tied", folder / "model", layers=2)
    write_index(folder / "data", conversations(14, 1).documents, vocab_size=VOCABULARY)
    return folder


@pytest.mark.parametrize("layout", ["--tp 2", "--pp 2", ""])
def test_resume_is_bitwise_with_bf16_moments(pool, inputs, tmp_path, layout):
    def arguments(output: Path, *extra: str) -> list[str]:
        paths = ["--model", inputs / "model", "--data", inputs / "data", "--output", output]
        shape = "--seq-len 96 --global-batch-size 4 --steps 4 --checkpoint.every 2 --precision bf16"
        optimizer = "--optim.lr 1e-2 --optim.beta2 0.999 --optim.moments bf16"
        return [*map(str, paths), *shape.split(), *optimizer.split(), *layout.split(), *extra]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    pool.run(run, 2, arguments(whole))
    interrupt(whole, cut, 2)
    pool.run(run, 2, arguments(cut))
    assert metrics(cut) == metrics(whole)
    found, wanted = tensors(cut, 4), tensors(whole, 4)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key
    moments = {key: tensor for key, tensor in wanted.items() if key.startswith("optimizer.state.exp_avg")}
    assert len(moments) > 20
    for key, tensor in moments.items():
        assert tensor.dtype == torch.bfloat16, key
    # A run may go on with the other kind of moments, if it is told to: bf16 numbers are fp32 numbers, too.
    shutil.rmtree(cut)
    interrupt(whole, cut, 2)
    pool.run(run, 2, arguments(cut, "--optim.moments", "fp32", "--checkpoint.allow-change", "optim.moments"))
    assert metrics(cut)[:3] == metrics(whole)[:3]
    assert not all(torch.equal(tensors(cut, 4)[key], tensor.float()) for key, tensor in moments.items())


class Experts(MegatronModule):
    """A weight and a norm, and beside them a frozen router, stacked experts and their output biases."""

    def __init__(self, config: TransformerConfig, *, split: bool):
        super().__init__(config)
        shapes = {"weight": (5, 3), "norm": (7,), "router": (4, 3), "experts": (4, 3, 5), "biases": (4, 3)}
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.ones(shape)))
        self.router.requires_grad_(False)
        self.weight.tensor_model_parallel = True
        self.experts.tensor_model_parallel = split
        self.experts.allreduce = self.biases.allreduce = False


def norm_with_experts(etp: int) -> tuple[float, float, list[str]]:
    """Gives every parameter known gradients; returns (the norm, the right one, what the optimizer's state names)."""
    mesh = build_mesh(Layout(tp=2, etp=etp))
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "num_moe_experts": 4}
    config = TransformerConfig(**sizes, moe_ffn_hidden_size=8, add_bias_linear=False, calculate_per_token_loss=True)
    chunk = Experts(config, split=etp > 1)
    (wrapped,) = wrap_chunks([chunk], mesh)
    optimizer = build_optimizer(OptimConfig(moments="bf16"), [wrapped], mesh, bf16=False)
    assert len(optimizer.chained_optimizers) == 2
    squares = 0.0
    for number, (name, parameter) in enumerate(chunk.named_parameters(), start=1):
        if name == "router":
            continue
        split = name == "weight" or (name == "experts" and etp > 1)
        both = [torch.arange(parameter.numel()) + 10.0 * number * (1 + rank * split) for rank in range(2)]
        parameter.main_grad.copy_(both[mesh.rank].view_as(parameter))
        squares += sum(float(gradient.square().sum()) for gradient in both[: 1 + split])
    norm = update(optimizer, lr=0.5, clip_grad=0.0).grad_norm
    assert (chunk.router == 1).all() and not any((p == 1).any() for p in chunk.parameters() if p.requires_grad)
    shards = own_shards([wrapped], optimizer, sharding_metadata(mesh))
    keys = [shard.key for shard in shards if shard.states]
    distributed.barrier()
    return norm, squares**0.5, keys


@pytest.mark.parametrize("etp", [1, 2])
def test_every_expert_counts_once_in_the_norm_and_a_frozen_router_not_at_all(pool, etp):
    results = pool.run(norm_with_experts, 2, etp)
    for norm, expected, _ in results:
        assert norm == pytest.approx(expected, rel=1e-6)
    kept = {key.split(".")[-1] for _, _, keys in results for key in keys}
    assert kept == {"weight", "norm", "experts", "biases"}
