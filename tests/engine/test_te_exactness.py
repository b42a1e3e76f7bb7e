"""Transformer Engine's layers in every family and layout, over a stand-in for it that computes on the host.

The modules, their groups, marks and keys are megatron-core's and Lathe's own, as on a GPU; only what a kernel computes
is torch's. See `tests/support/stand_in/README.md`.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from engine.checkpointing.directory import FP8, STATE
from engine.checkpointing.store_reader import StoreReader
from tests import gpu
from tests.support.kept import SIZES, has_hooks, kept_bytes
from tests.support.marks import slow
from tests.support.parity import INDEX, LAYOUTS, OPTIM, STEPS, References, errors, layouts_of
from tests.support.te import described, nothing_but_padding, resumed_by, scales_of
from tests.support.tiny import conversations, make_inputs, reference, save_model
from tests.support.training import step_batches, train
from tests.support.world import Pool

TRIED = ("dp1", "tp2", "cp2", "pp2", "tp2 cp2", "pp2 vpp2", "ep2", "ep2 tp2", "ep2 pp2", "etp2", "ep2 etp2 tp2")
SOON = {("llama", "tp2 cp2"), ("gpt_oss", "ep2 pp2"), ("qwen3_moe", "ep2 etp2 tp2")}
FAMILIES = ("llama", "qwen2_tied", "qwen3_tied", "qwen3_windows", "olmo2", "olmo3", "qwen3_moe", "gpt_oss")
CELLS = [
    pytest.param(name, layout, marks=() if (name, layout) in SOON else pytest.mark.slow)
    for name in FAMILIES
    for layout in layouts_of(name)
    if layout in TRIED
]
RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
FP8_SOON = {("gpt_oss", "tensorwise"), ("gpt_oss", "mxfp8"), ("llama", "delayed")}


@pytest.fixture(scope="module")
def stand_in():
    pool = Pool(stand_in=True)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    return References(tmp_path_factory.mktemp("models"))


def fp8_inputs(folder, name: str):
    """A model whose widths FP8 takes, and documents."""
    make_inputs(folder, name, 30)
    shutil.rmtree(folder / "model")
    save_model(name, folder / "model", layers=2, **gpu.SHAPES[name])
    return folder


def te(pool, ranks, *arguments, precision="fp32", recompute="none", extra=None):
    """The first rank's results of `train` by Transformer Engine's layers."""
    return pool.run(train, ranks, *arguments, precision, recompute, None, extra, "te")[0]


@pytest.mark.parametrize(("name", "layout"), CELLS)
def test_layout_matches_plain_model(stand_in, references, name, layout):
    ranks, degrees = layouts_of(name)[layout]
    folder, wanted = references.get(name, {})
    seen = errors(te(stand_in, ranks, folder, degrees, INDEX, STEPS, OPTIM, {}), wanted)
    assert seen.loss < 1e-5 and seen.source < 1e-5 and seen.norm < 1e-4 and seen.gradient < 1e-4, seen


@pytest.mark.parametrize(
    ("name", "layout", "recompute"),
    [
        ("qwen3_moe", "ep2 tp2", "selective"),
        ("llama", "tp2", "selective"),
        ("olmo2", "dp1", "activation mlp"),
        slow("qwen3_moe", "ep2 tp2", "full"),
    ],
)
def test_recomputation_changes_nothing(stand_in, references, name, layout, recompute):
    folder, wanted = references.get(name, {})
    ranks, degrees = layouts_of(name)[layout]
    seen = errors(te(stand_in, ranks, folder, degrees, INDEX, STEPS, OPTIM, {}, recompute=recompute), wanted)
    assert seen.loss < 1e-5 and seen.gradient < 1e-4, seen


@pytest.mark.parametrize("name", ["qwen3_windows", slow("olmo3")])  # their attention is Lathe's, as the count needs it
def test_a_dense_layer_keeps_no_activation_that_is_computed_again(stand_in, tmp_path, name):
    """In bytes a token and layer: the product's input, and what the host's unfused activation keeps in two tensors."""
    folders = [save_model(name, tmp_path / f"{layers}", layers=layers, **SIZES) for layers in (4, 8)]
    few, many, less_few, less_many = (
        stand_in.run(kept_bytes, 1, folder, recompute, "te")[0]
        for recompute in ("none", "selective")
        for folder in folders
    )
    assert ((many - few) - (less_many - less_few)) / 4 == 2 * 3 * SIZES["intermediate_size"]


def test_no_hooks_stand_around_layers_of_transformer_engine(stand_in, references):
    """They would take a weight's marks from it, by which gradients are added up."""
    found = {
        name: stand_in.run(has_hooks, 1, references.get(name, {})[0], "selective", "te")[0]
        for name in ("llama", "qwen3_moe")
    }
    assert found == {"llama": False, "qwen3_moe": False}


@pytest.mark.parametrize("name", ["llama", "olmo2", "qwen3_tied", "gpt_oss"])
def test_keys_and_shapes_are_those_of_native_layers(stand_in, references, name):
    folder, _ = references.get(name, {})
    te_keys, native_keys = (stand_in.run(described, 1, folder, backend)[0] for backend in ("te", "native"))
    assert te_keys == native_keys and len(te_keys) > 20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_tied", "gpt_oss"])
def test_what_one_backend_saves_the_other_continues(stand_in, tmp_path, name):
    """Two ranks, small buckets; te's steps 1 to 3 and native's 4 to 6 are native's 1 to 6, and the other way round."""
    inputs = make_inputs(tmp_path, name, 30)
    fp32 = ("--precision", "fp32")
    whole = stand_in.run(resumed_by, 2, inputs, tmp_path / "whole", ("native",), *fp32)[0]
    for order in (("te", "native"), ("native", "te")):
        found = stand_in.run(resumed_by, 2, inputs, tmp_path / "-".join(order), order, *fp32)[0]
        assert [line["step"] for line in found] == list(range(1, 7))
        for key in ("loss", "grad_norm"):
            ours, theirs = ([line[key] for line in lines] for lines in (found, whole))
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "layout"),
    [
        ("delayed", ("--ep", "2")),
        slow("delayed", ()),
        slow("tensorwise", ("--tp", "2")),
    ],
)
def test_fp8_resumes_bit_for_bit(stand_in, tmp_path, recipe, layout):
    """The delayed recipe's scales, which come from earlier steps, go on as they were."""
    inputs = fp8_inputs(tmp_path, "qwen3_moe" if "--ep" in layout else "qwen3_tied")
    flags = ("--precision", "fp8", "--fp8", recipe, "--seq-len", "256", *layout)
    whole, cut = (
        stand_in.run(resumed_by, 2, inputs, tmp_path / str(len(backends)), backends, *flags)[0]
        for backends in (("te",), ("te", "te"))
    )
    for key in ("step", "loss", "grad_norm", "lr"):
        assert [line[key] for line in cut] == [line[key] for line in whole]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "layout"), [(4, ("--pp", "2")), (2, ("--tp", "2")), (1, ())])
def test_delayed_scales_are_found_by_any_layout(stand_in, tmp_path, ranks, layout):
    """Saved by two stages; each rank takes up those of the layers that it has then."""
    inputs = fp8_inputs(tmp_path, "qwen3_tied")
    shape = ("--seq-len", "256", "--precision", "fp8", "--fp8", "delayed", "--pp", "2")
    stand_in.run(resumed_by, 2, inputs, tmp_path / "run", ("te",), *shape)
    store = StoreReader(tmp_path / "run" / "checkpoints" / "step_000006" / STATE)
    saved = {key: store.read(key).tolist() for key in store.keys() if key.startswith(FP8)}  # noqa: SIM118
    assert len(saved) == 2 * 4 and len({tuple(one) for one in saved.values()}) == len(saved)
    found = stand_in.run(scales_of, ranks, inputs, tmp_path / "run", "--seq-len", "256", *layout)
    assert {key for rank in found for key in rank} == saved.keys()
    assert all(rank[key] == saved[key] for rank in found for key in rank)


@pytest.mark.parametrize(
    ("name", "layout", "recipe"),
    [
        pytest.param(name, layout, recipe, marks=() if (name, recipe) in FP8_SOON else pytest.mark.slow)
        for name, layout in (("llama", "dp1"), ("olmo2", "tp2"), ("qwen3_moe", "ep2 tp2"), ("gpt_oss", "ep2 tp2"))
        for recipe in RECIPES
    ],
)
def test_fp8_follows_fp32(stand_in, tmp_path, name, layout, recipe):
    """Emulated: numbers rounded to FP8 with the recipe's scales, each expert's rows padded for it."""
    steps, options, index = 4, {"seq_len": 256}, conversations(40)
    folder = save_model(name, tmp_path / name, layers=2, **gpu.SHAPES.get(name, gpu.SHAPE))
    wanted = reference(folder, index, step_batches(index, steps, options), OPTIM)
    ranks, degrees = (LAYOUTS | layouts_of(name))[layout]
    found = te(
        stand_in, ranks, folder, degrees, index, steps, OPTIM, options, precision="fp8", extra={"fp8_recipe": recipe}
    )
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=5e-2)
    assert max(abs(a / b - 1) for a, b in zip(found.losses, wanted.losses, strict=True)) > 1e-4  # it was FP8


def test_experts_without_a_token(stand_in, references):
    """A microbatch of nothing but padding has no gradient, and no division by nothing."""
    folder, _ = references.get("gpt_oss", {})
    assert stand_in.run(nothing_but_padding, 1, folder)[0] == 0.0
