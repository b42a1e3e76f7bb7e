"""What --recompute-modules leaves out: fewer bytes kept, and not a bit of a loss or a gradient changed."""

from __future__ import annotations

import pytest
import torch

from engine.layout import Layout
from models.build import recomputed_parts, transformer_config
from models.hf_config import describe
from models.layers.recompute import again, marked_are_not_kept
from tests.support.kept import EXPERTS as SPARSE
from tests.support.kept import SIZES, has_hooks, kept_bytes
from tests.support.marks import slow
from tests.support.parity import INDEX, OPTIM
from tests.support.tiny import save_model
from tests.support.training import train

DENSE, EXPERTS = "llama", "gpt_oss"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: save_model(name, tmp_path_factory.mktemp(name)) for name in (DENSE, EXPERTS, "qwen3_moe", "olmo2")}


def same(found, wanted) -> None:
    assert found.losses == wanted.losses and found.norms == wanted.norms
    assert found.gradients.keys() == wanted.gradients.keys()
    assert [name for name, one in found.gradients.items() if not torch.equal(one, wanted.gradients[name])] == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (DENSE, ("norm", "activation", "mlp", "selective")),
        (EXPERTS, ("norm", "activation", "experts", "norm activation experts")),
        ("olmo2", ("selective",)),
    ],
)
def test_no_bit_changes(pool, folders, name, parts, precision):
    wanted, *found = (
        pool.run(train, 1, folders[name], Layout(), INDEX, 2, OPTIM, {}, precision, recompute)[0]
        for recompute in ("none", *parts)
    )
    for one in found:
        same(one, wanted)


@pytest.mark.parametrize(
    ("name", "layout", "everything"),
    [
        (DENSE, Layout(tp=2, sp=True), "norm activation mlp"),
        (DENSE, Layout(pp=2, vpp=2), "norm activation mlp"),
        ("qwen3_moe", Layout(tp=2, ep=2, sp=True), "norm activation experts"),
    ],
)
def test_no_bit_changes_on_two_ranks(pool, folders, name, layout, everything):
    wanted, *found = (
        pool.run(train, 2, folders[name], layout, INDEX, 2, OPTIM, {}, "fp32", recompute)[0]
        for recompute in ("none", "selective", everything)
    )
    for one in found:
        same(one, wanted)


HIDDEN, FFN = SIZES["hidden_size"], SIZES["intermediate_size"]
CHOSEN = SPARSE["num_experts_per_tok"]


@pytest.mark.parametrize(
    ("name", "parts", "left_out"),
    [
        # Both norms' outputs, which the products behind them would keep.
        slow(DENSE, "norm", 2 * 2 * HIDDEN),
        # The product's input, and silu(gate) and a copy of the ups, which the host's unfused activation keeps.
        slow(DENSE, "activation", 2 * 3 * FFN),
        (DENSE, "selective", 2 * 2 * HIDDEN + 2 * 3 * FFN),
        # All but the input of the MLP: gates and ups as well.
        (DENSE, "mlp", 2 * 5 * FFN),
        slow(EXPERTS, "norm", 2 * 2 * HIDDEN),
        slow(EXPERTS, "activation", 2 * CHOSEN * SPARSE["intermediate_size"]),
        # Everything inside, beside the tokens that go there.
        (EXPERTS, "experts", CHOSEN * (6 * SPARSE["intermediate_size"] + 2 * HIDDEN)),
        (EXPERTS, "selective", 2 * 2 * HIDDEN + 2 * CHOSEN * SPARSE["intermediate_size"]),
    ],
)
def test_a_layer_keeps_less(pool, tmp_path, name, parts, left_out):
    """In bytes a token and layer; what the router keeps of a norm's output is the same tensor, and left out with it."""
    changes = SIZES | (SPARSE if name == EXPERTS else {})
    folders = [save_model(name, tmp_path / f"{layers}", layers=layers, **changes) for layers in (1, 3)]
    one, three, less_one, less_three = (
        pool.run(kept_bytes, 1, folder, recompute)[0] for recompute in ("none", parts) for folder in folders
    )
    assert ((three - one) - (less_three - less_one)) / 2 == left_out


def test_views_of_what_was_marked_are_computed_again_and_other_tensors_kept():
    torch.manual_seed(0)
    start, weight = torch.randn(6, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    calls = []

    def double(states):
        calls.append(len(states))
        return states * 2

    outputs = []
    for marked in (False, True):
        start.grad = weight.grad = None
        with marked_are_not_kept():
            middle = double(start)
            if marked:
                again(middle, lambda: double(start.detach()))
            output = middle[1:5] @ weight  # keeps a view of what was marked, and the weight
        del middle
        calls.clear()
        output.square().sum().backward()
        assert calls == ([6] if marked else [])
        outputs += [output.detach(), start.grad, weight.grad]
    assert all(torch.equal(plain, other) for plain, other in zip(outputs[:3], outputs[3:], strict=True))


def test_nothing_is_marked_where_no_gradient_is_asked_for():
    with torch.no_grad():
        assert not hasattr(again(torch.ones(2), lambda: torch.ones(2)), "again")


@pytest.mark.parametrize(
    ("name", "backend", "asked", "parts"),
    [
        (DENSE, "native", (), ("norm", "activation")),
        (DENSE, "native", ("mlp",), ("mlp",)),
        (DENSE, "te", (), ("activation",)),
        (DENSE, "te", ("mlp", "activation"), ("mlp", "activation")),
        ("olmo2", "te", (), ("activation",)),
        (EXPERTS, "native", (), ("norm", "activation")),
        (EXPERTS, "native", ("experts", "norm"), ("experts", "norm")),
        (EXPERTS, "te", (), ("norm", "activation")),
        ("olmo2", "native", (), ("activation",)),
    ],
)
def test_parts_that_a_model_has(folders, name, backend, asked, parts):
    description = describe(folders[name])
    assert recomputed_parts(asked, description, backend) == parts
    config = transformer_config(
        description, layout=Layout(), precision="bf16", recompute="selective", recompute_modules=asked, backend=backend
    )
    assert config.recompute_granularity == "selective"
    theirs = {"norm": "layernorm", "activation": "moe_act"} if backend == "te" else {}
    assert config.recompute_modules == [theirs.get(part, part) for part in parts]


@pytest.mark.parametrize(
    ("name", "backend", "asked", "sentence"),
    [
        (
            DENSE,
            "native",
            ("experts",),
            "--recompute-modules experts has no effect: this model has no experts; give mlp",
        ),
        (DENSE, "te", ("norm",), "--recompute-modules norm has no effect: Transformer Engine computes norms as one"),
        ("olmo2", "te", ("norm",), "--recompute-modules norm has no effect: this model's norms stand behind"),
        (EXPERTS, "native", ("mlp",), "--recompute-modules mlp has no effect: this model has experts"),
        (EXPERTS, "te", ("experts",), "--recompute-modules experts has no effect: Transformer Engine's experts"),
        ("olmo2", "native", ("norm",), "--recompute-modules norm has no effect: this model's norms stand behind"),
    ],
)
def test_parts_that_a_model_has_not_are_refused(folders, name, backend, asked, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        recomputed_parts(asked, describe(folders[name]), backend)


def test_activations_that_are_kept_in_fp8_are_not_computed_again(folders):
    description = describe(folders[DENSE])
    with pytest.raises(ValueError, match="^--recompute-modules activation has no effect: the product behind it keeps"):
        recomputed_parts(("activation",), description, "te", "fp8")
    with pytest.raises(ValueError, match="^--recompute selective finds nothing under --precision fp8"):
        recomputed_parts((), description, "te", "fp8")
    assert recomputed_parts(("activation",), describe(folders[EXPERTS]), "te", "fp8") == ("activation",)


@pytest.mark.parametrize(("parts", "hooks"), [("norm", True), ("activation", True), ("mlp", False), ("mlp norm", True)])
def test_hooks_stand_where_a_module_marks_something(pool, folders, parts, hooks):
    assert pool.run(has_hooks, 1, folders[DENSE], parts, "native")[0] is hooks
