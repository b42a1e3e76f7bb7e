"""Experts: padding has no part in them, what each gets is counted exactly, and their auxiliary loss is a token sum."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.config import MoeConfig, OptimConfig
from engine.layout import Layout
from engine.optim import build_optimizer
from engine.step import wrap_chunks
from tests.support.marks import slow
from tests.support.parity import EXPERT_LAYOUTS, LAYOUTS
from tests.support.tiny import EXPERTS, conversations, in_files, save_model
from tests.support.training import relative, start, step_batches, train

OPTIM = OptimConfig(lr=1e-3, schedule="constant")
INDEX = conversations(16)
ALL = LAYOUTS | EXPERT_LAYOUTS
COEFFICIENT = 0.05


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("experts")
    return {name: save_model(name, root / name) for name in EXPERTS}


def plain_model(folder):
    """The transformers model, and a list that its routers append their logits [tokens, experts] to."""
    from transformers import AutoModelForCausalLM

    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **eager)
    logits: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if name.endswith(("mlp.router", "mlp.gate")):
            module.register_forward_hook(lambda _module, _inputs, output: logits.append(output[0]))
    return model, logits


def document(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels (-100 where nothing is supervised) of a conversation."""
    tokens, spans = INDEX.documents[number]
    labels = np.full(len(tokens), -100)
    for first, last in spans:
        labels[first:last] = tokens[first:last]
    return torch.from_numpy(tokens), torch.from_numpy(labels)


def plain_step(folder, batch: list[int], coefficient: float):
    """One step of the plain model: gradients by file name, tokens per layer and expert, auxiliary loss."""
    model, logits = plain_model(folder)
    topk, experts = model.config.num_experts_per_tok, model.config.num_local_experts
    counts, balance, supervised = 0, 0.0, 0
    for number in batch:
        tokens, labels = document(number)
        logits.clear()
        output = model(input_ids=tokens[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(output, labels[1:], ignore_index=-100, reduction="sum")
        own = int((labels[1:] >= 0).sum())
        chosen = [torch.nn.functional.one_hot(x.topk(topk, -1).indices, experts).sum(1).float() for x in logits]
        # experts * sum over experts of (share of choices) * (mean probability), per document and layer
        auxiliary = [
            experts * (c.mean(0) / topk * x.softmax(-1).mean(0)).sum() for c, x in zip(chosen, logits, strict=True)
        ]
        (loss + coefficient * own * sum(auxiliary)).backward()
        counts = counts + torch.stack([c.sum(0) for c in chosen])
        balance += own * sum(auxiliary).item() / len(auxiliary)
        supervised += own
    gradients = {
        name: part / supervised
        for key, parameter in model.named_parameters()
        for name, part in in_files(model.config, key, parameter.grad)
    }
    return gradients, counts, balance


@pytest.mark.parametrize(
    "layout", ["dp1", "ep2 cp2", "ep2 etp2 tp2", *map(slow, ("tp2", "cp2", "pp2 vpp2", "dp2", "ep2"))]
)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_auxiliary_loss_and_statistics_are_those_of_the_plain_model(pool, folders, name, layout):
    """Document by document, so that neither packing nor the layout nor microbatches have a part in it."""
    options = {"global_batch_size": 12, "seq_len": 192}
    batch = step_batches(INDEX, 1, options)[0]
    gradients, counts, balance = plain_step(folders[name], batch, COEFFICIENT)
    ranks, degrees = ALL[layout]
    moe = MoeConfig(aux_loss=COEFFICIENT)
    arguments = (folders[name], degrees, INDEX, 1, OPTIM, options, "fp32", "none", moe)
    results = pool.run(train, ranks, *arguments)
    found = results[0]
    assert all(result.routers == found.routers for result in results)
    seen = found.routers[0]
    assert seen.tokens_per_expert == tuple(counts.sum(0).int().tolist())
    np.testing.assert_allclose(seen.expert_imbalance, counts.amax(1) / counts.mean(1), rtol=1e-6)
    assert seen.aux_loss == pytest.approx(balance, rel=1e-5)
    worst = max(relative(found.gradients[key], gradient) for key, gradient in gradients.items())
    assert worst < 1e-4


def test_auxiliary_loss_changes_router_gradients(pool, folders):
    """The test above would pass without it if its gradient were too small to see."""
    batch = step_batches(INDEX, 1, {"global_batch_size": 12, "seq_len": 192})[0]
    with_loss, _, _ = plain_step(folders["qwen3_moe"], batch, COEFFICIENT)
    without, _, _ = plain_step(folders["qwen3_moe"], batch, 0.0)
    key = "model.layers.2.mlp.gate.weight"
    assert relative(with_loss[key], without[key]) > 1e-2


@pytest.mark.parametrize("layout", ["dp1", "ep2", "ep2 tp2"])
def test_padding_has_no_part_in_experts(pool, folders, layout):
    """Nor has it in the auxiliary loss or in the statistics."""
    ranks, degrees = ALL[layout]
    moe = MoeConfig(aux_loss=COEFFICIENT)
    fixed = (folders["gpt_oss"], degrees, INDEX, 2, OPTIM)
    tight = pool.run(train, ranks, *fixed, {"pad_documents_to": 2}, "fp32", "none", moe)[0]
    wide = {"pad_documents_to": 32, "seq_len": 320, "micro_batch_size": 3}
    loose = pool.run(train, ranks, *fixed, wide, "fp32", "none", moe)[0]
    assert [r.tokens_per_expert for r in loose.routers] == [r.tokens_per_expert for r in tight.routers]
    assert [r.expert_imbalance for r in loose.routers] == [r.expert_imbalance for r in tight.routers]
    np.testing.assert_allclose([r.aux_loss for r in loose.routers], [r.aux_loss for r in tight.routers], rtol=1e-6)
    np.testing.assert_allclose(loose.losses, tight.losses, rtol=1e-6)
    np.testing.assert_allclose(loose.norms, tight.norms, rtol=1e-5)
    assert max(relative(loose.gradients[k], g) for k, g in tight.gradients.items()) < 1e-5


def test_experts_do_not_depend_on_the_layout(pool, folders):
    """Gradients and their norm for every split of experts, against one rank; much padding on some."""
    wide = {"pad_documents_to": 16, "seq_len": 192}
    for name in ("qwen3_moe", "gpt_oss"):
        alone = pool.run(train, 1, folders[name], Layout(), INDEX, 1, OPTIM, {})[0]
        for layout, options in (("ep2", wide), ("etp2", {}), ("dp4 ep2", wide), ("ep2 etp2 tp2", wide)):
            ranks, degrees = ALL[layout]
            found = pool.run(train, ranks, folders[name], degrees, INDEX, 1, OPTIM, options)[0]
            np.testing.assert_allclose(found.norms, alone.norms, rtol=1e-4)
            worst = max(relative(found.gradients[k], g) for k, g in alone.gradients.items())
            assert worst < 1e-4, (name, layout, worst)


@pytest.mark.parametrize("layout", ["ep2", "ep2 tp2", "ep2 etp2 tp2"])
def test_dispatchers_do_the_same(pool, folders, layout):
    ranks, degrees = ALL[layout]
    runs = [
        pool.run(
            train, ranks, folders["qwen3_moe"], degrees, INDEX, 2, OPTIM, {}, "fp32", "none", MoeConfig(dispatcher=kind)
        )[0]
        for kind in ("alltoall", "allgather")
    ]
    np.testing.assert_allclose(runs[0].losses, runs[1].losses, rtol=1e-6)
    assert max(relative(runs[0].gradients[k], g) for k, g in runs[1].gradients.items()) < 1e-5


def test_recomputed_layers_are_counted_once(pool, folders):
    moe = MoeConfig(aux_loss=COEFFICIENT)
    runs = [
        pool.run(train, 1, folders["gpt_oss"], Layout(), INDEX, 1, OPTIM, {}, "fp32", recompute, moe)[0]
        for recompute in ("none", "full")
    ]
    assert runs[0].routers == runs[1].routers


def test_frozen_routers_have_no_gradient(pool, folders):
    frozen = MoeConfig(freeze_router=True)
    arguments = (folders["gpt_oss"], ALL["ep2 pp2"][1], INDEX, 1, OPTIM, {}, "fp32", "none")
    free = pool.run(train, 4, *arguments)[0].gradients
    stuck = pool.run(train, 4, *arguments, frozen)[0].gradients
    routers = [key for key in free if ".router." in key]
    assert len(routers) == 8 and all(free[key].any() and not stuck[key].any() for key in routers)
    assert all(relative(stuck[key], free[key]) < 1e-5 for key in free if key not in routers)


def decay_by_name(folder) -> dict[str, float]:
    """The weight decay that the optimizer gives each parameter, on one rank."""
    part = start(folder, Layout())
    wrapped = wrap_chunks(part.chunks, part.mesh)
    optimizer = build_optimizer(OptimConfig(weight_decay=0.1), wrapped, part.mesh, bf16=False)
    names = {parameter: name for name, parameter in part.chunks[0].named_parameters()}
    return {
        names[parameter]: single.optimizer.param_groups[group]["weight_decay"]
        for single in optimizer.chained_optimizers
        for parameter, (group, _) in single.model_param_group_index_map.items()
    }


def test_weight_decay_leaves_norms_biases_and_sinks_alone(pool, folders):
    """Also the biases of experts, which are matrices of several experts' biases."""
    found = pool.run(decay_by_name, 1, folders["gpt_oss"])[0]
    left_alone = ("bias", "layernorm.weight", "softmax_offset")
    assert {name for name, decay in found.items() if decay == 0} == {n for n in found if n.endswith(left_alone)}
    assert {decay for decay in found.values()} == {0, 0.1}
    assert len([name for name in found if name.endswith("linear_fc1.bias")]) == 4
