"""The memory plan: against arithmetic, against what real ranks hold, and as a user asks for it."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

from engine import host
from engine.config import MoeConfig, OptimConfig, RunConfig
from engine.optim import build_optimizer
from engine.rehearsal.memory import measure, plan_memory
from engine.step import wrap_chunks
from examples import plan_run
from models.hf_config import describe
from tests.support.full_size import CONFIGS
from tests.support.tiny import save_model
from tests.support.training import start

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a plan is made where no GPU is visible")
GIB = 2**30


def run(**options) -> RunConfig:
    return RunConfig(model="MODEL", **options)


def sizes(name: str) -> SimpleNamespace:
    """Parameters of a published model by what shards them; its vocabulary padded to a multiple of 128."""
    description = describe(CONFIGS[name])
    count = {rule.key: torch.Size(rule.shape).numel() for rule in description.rules}
    experts = sum(numel for key, numel in count.items() if ".mlp.experts." in key)
    norms = sum(
        n for k, n in count.items() if k.endswith(("layernorm.weight", "layer_norm_weight", "linear_proj.bias"))
    )
    table = count["embedding.word_embeddings.weight"]
    total = sum(count.values())
    return SimpleNamespace(
        description=description, total=total, dense=total - experts, experts=experts, norms=norms, table=table
    )


def test_data_parallel_ranks_share_the_optimizer_alone():
    model = sizes("Llama-3.1-8B")
    assert model.total == 8_030_261_248
    (stage,) = plan_memory(run(), model.description, 8)
    assert (stage.layers, stage.num_parameters, stage.parameters) == (32, model.total, 2 * model.total)
    assert stage.gradients == pytest.approx(4 * model.total, rel=1e-6)  # buffers are padded
    assert stage.optimizer == pytest.approx(12 * model.total / 8, rel=1e-6)
    assert stage.total == stage.parameters + stage.gradients + stage.optimizer


def test_context_parallel_ranks_share_the_optimizer_too():
    model = sizes("Qwen2.5-14B")
    (stage,) = plan_memory(run(tp=8, cp=2, seq_len=32768), model.description, 32)
    own = (model.total - model.norms) / 8 + model.norms
    assert stage.num_parameters == own
    assert stage.optimizer == pytest.approx(12 * own / 4, rel=1e-5)  # dp 2 x cp 2


@pytest.mark.parametrize(("precision", "moments", "bytes_each"), [("fp32", "fp32", 8), ("bf16", "bf16", 8)])
def test_moments_and_master_weights_are_counted_once(precision, moments, bytes_each):
    model = sizes("Llama-3.2-1B")
    config = run(precision=precision, optim=OptimConfig(moments=moments))
    (stage,) = plan_memory(config, model.description, 2)
    assert stage.parameters == model.total * (4 if precision == "fp32" else 2)
    assert stage.optimizer == pytest.approx(bytes_each * model.total / 2, rel=1e-6)


@pytest.mark.parametrize(("gradients", "bytes_each", "widened"), [("fp32", 4, 0), ("bf16", 2, 4)])
def test_gradients_take_their_own_bytes_and_narrow_ones_are_widened_share_by_share(gradients, bytes_each, widened):
    model = sizes("Llama-3.2-1B")
    (stage,) = plan_memory(run(optim=OptimConfig(gradients=gradients)), model.description, 8)
    assert stage.gradients == pytest.approx((bytes_each + widened / 8) * model.total, rel=1e-6)


def test_both_ends_of_a_pipeline_hold_a_tied_embedding():
    model = sizes("Llama-3.2-1B")
    first, last = plan_memory(run(pp=2), model.description, 2)
    assert first.num_parameters + last.num_parameters == model.total + model.table
    assert last.num_parameters - first.num_parameters == 2048  # the final norm


def test_layers_are_where_the_layout_puts_them():
    model = sizes("Llama-3.2-1B")
    uneven = plan_memory(run(pp=4, pp_layout="3,5,5,3"), model.description, 8)
    assert [stage.layers for stage in uneven] == [3, 5, 5, 3]
    interleaved = plan_memory(run(pp=2, vpp=2), model.description, 8)
    assert [stage.layers for stage in interleaved] == [8, 8]


def test_experts_are_split_over_expert_parallel_ranks_and_their_optimizer_over_the_rest():
    model = sizes("Qwen3-30B-A3B")
    (stage,) = plan_memory(run(ep=8), model.description, 32)
    own = model.dense + model.experts // 8
    assert (stage.num_parameters, stage.parameters) == (own, 2 * own)
    assert stage.gradients == pytest.approx(4 * own, rel=1e-6)
    assert stage.optimizer == pytest.approx(12 * (model.dense / 32 + model.experts / 8 / 4), rel=1e-5)
    (split,) = plan_memory(run(ep=8, etp=2), model.description, 32)
    assert split.num_parameters == model.dense + model.experts // 16
    # Planned where DeepEP is not.
    assert plan_memory(run(ep=8, moe=MoeConfig(dispatcher="flex")), model.description, 32) == (stage,)


def test_frozen_routers_have_neither_gradients_nor_an_optimizer():
    model = sizes("Qwen3-30B-A3B")
    (trained,) = plan_memory(run(ep=8), model.description, 8)
    (frozen,) = plan_memory(run(ep=8, moe=MoeConfig(freeze_router=True)), model.description, 8)
    routers = 48 * 128 * 2048
    assert frozen.parameters == trained.parameters
    assert trained.gradients - frozen.gradients == pytest.approx(4 * routers, rel=1e-3)
    assert trained.optimizer - frozen.optimizer == pytest.approx(12 * routers / 8, rel=1e-3)


def hold(folder, config: RunConfig):
    """What this rank of a real world holds."""
    part = start(folder, config.layout, precision=config.precision)
    wrapped = wrap_chunks(part.chunks, part.mesh)
    optimizer = build_optimizer(config.optim, wrapped, part.mesh, bf16=True)
    return measure(part.mesh.pp_rank, part.chunks, wrapped, optimizer)


def test_real_ranks_hold_what_was_planned(pool, tmp_path):
    folder = save_model("qwen3_moe", tmp_path, dtype=torch.bfloat16)
    config = run(tp=2, ep=2, pp=2, pp_layout="1,3", seq_len=256)
    held = pool.run(hold, 4, folder, config)
    assert (held[0], held[2]) == plan_memory(config, describe(folder), 4)
    assert held[0].layers, held[2].layers == (1, 3)


def test_a_plan_leaves_no_trace():
    before = dict(os.environ)
    description = describe(CONFIGS["Llama-3.2-1B"])
    first = plan_memory(run(tp=2), description, 1024)
    assert plan_memory(run(tp=2), description, 1024) == first
    assert dict(os.environ) == before
    assert not distributed.is_initialized()
    assert torch.empty(1, device="cuda").device.type == "cpu"  # on the host again


def test_nothing_is_allocated_on_the_meta_device():
    host.enable()
    with host.on_meta():
        assert torch.empty(2**50).is_meta
        assert torch.empty(2**50, device="cuda").is_meta
        assert torch.empty(2**50, device=torch.cuda.current_device()).is_meta
        assert torch.arange(2).to(device="cpu", dtype=torch.float).is_meta
    assert torch.arange(2).to("cuda").device.type == "cpu"


@pytest.mark.parametrize(
    ("options", "ranks", "message"),
    [
        ({"tp": 3}, 6, "--tp 3 does not divide the attention heads"),
        ({"tp": 8}, 12, "12 ranks cannot be split"),
        ({"seq_len": 4095, "cp": 2}, 2, "--seq-len 4095 does not divide"),
        ({"seq_len": 262144}, 1, "--seq-len 262144 exceeds the model's max_position_embeddings 131072"),
        ({"ep": 2}, 2, "this model has no experts"),
        ({"moe": MoeConfig(freeze_router=True)}, 1, "--moe.freeze-router: this model has no experts"),
        ({"backend": "te", "precision": "fp32"}, 1, "--backend te cannot run here"),
        ({"mcore": {"fp8_margin": 1}}, 1, "--mcore.fp8_margin has an effect with --precision fp8 --fp8 delayed alone"),
        ({"recompute": "selective", "recompute_modules": ("experts",)}, 1, "--recompute-modules experts has no effect"),
        (
            {"recompute": "selective", "recompute_modules": ("norm",), "backend": "te"},
            1,
            "--recompute-modules norm has no effect: Transformer Engine",
        ),
        (
            {"recompute": "full", "mcore": {"recompute_num_layers": 3}, "pp": 2},
            2,
            r"--mcore.recompute_num_layers 3 does not divide the layers of each pipeline stage \(8\)",
        ),
    ],
)
def test_what_cannot_run_cannot_be_planned(options, ranks, message):
    with pytest.raises(ValueError, match=message):
        plan_memory(run(**options), describe(CONFIGS["Llama-3.2-1B"]), ranks)


def test_what_one_of_both_backends_serves_can_be_planned():
    """Under --backend auto: whether Transformer Engine is there only the run will see."""
    description = describe(CONFIGS["Llama-3.2-1B"])
    plain = plan_memory(run(), description, 1)
    norms = {"recompute": "selective", "recompute_modules": ("norm",)}
    assert plan_memory(run(**norms, mcore={"disable_parameter_transpose_cache": True}), description, 1) == plain


def test_the_table_needs_a_config_alone(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["Llama-3.1-8B"]))
    plan_run.main(["--ranks", "16", "--model", str(tmp_path), "--tp", "2", "--pp", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}: tp 2 x cp 1 x pp 2 x dp 4 = 16 ranks, GiB per rank"
    assert [line.split()[:2] for line in lines[2:4]] == [["0", "16"], ["1", "16"]]
    parameters, gradients, optimizer, total = map(float, lines[2].split()[2:])
    own = (8_030_261_248 - 4096) / 4  # a quarter; norms are whole on both tensor-parallel ranks
    assert (parameters, gradients) == pytest.approx((2 * own / GIB, 4 * own / GIB), abs=0.006)
    assert total == pytest.approx(parameters + gradients + optimizer, abs=0.02)


@pytest.mark.parametrize("arguments", [["--tp", "2"], ["--ranks"], ["--ranks", "none"], ["--ranks=0"]])
def test_ranks_must_be_said(arguments):
    with pytest.raises(ValueError, match="give how many processes the run will have"):
        plan_run.plan(arguments)


def test_a_model_must_be_said():
    with pytest.raises(ValueError, match="--model is missing"):
        plan_run.plan(["--ranks=2"])
    with pytest.raises(ValueError, match="no local directory and could not be downloaded from the hub"):
        plan_run.plan(["--ranks=2", "--model", "nobody/nothing"])
