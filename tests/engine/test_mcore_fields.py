"""Every field of megatron-core's TransformerConfig is served, set by a flag, or refused with a reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from megatron.core.transformer.transformer_config import TransformerConfig

from engine import mcore_fields
from engine.check_model import check_settings, present
from engine.cli import check_mcore, flag_name, parse_run
from engine.config import RunConfig
from engine.layout import Layout
from engine.mcore_fields import FIELDS, NEEDS, SERVED, SET_BY_FLAG, check_needs, refusal
from models.hf_config import describe
from tests.support.parity import INDEX, OPTIM
from tests.support.tiny import MODELS, save_model
from tests.support.training import train


def test_every_field_of_megatron_core_is_in_exactly_one_place():
    """A new field of megatron-core fails here until someone has read what reads it."""
    assert [name for name, count in Counter(FIELDS).items() if count > 1] == []
    assert sorted(FIELDS) == sorted(field.name for field in fields(TransformerConfig))


def test_each_group_names_its_fields_once():
    """A field in two groups would take the later one's reason."""
    for groups in (mcore_fields._BY_FLAG, mcore_fields._REFUSED):
        names = [name for group in groups.values() for name in group.split()]
        assert len(names) == len(set(names))


def test_flags_that_refusals_name_exist():
    known = {f"--{flag_name(name)}" for name in RunConfig.__dataclass_fields__} | {"--moe.dispatcher", "--moe.aux-loss"}
    assert set(SET_BY_FLAG.values()) <= known
    words = [word.strip(";:,") for sentence in (*mcore_fields._REFUSED, *NEEDS.values()) for word in sentence.split()]
    fields_named = {f"--mcore.{name}" for name in SERVED}
    assert {word for word in words if word.startswith("--")} - {"--mcore"} <= known | fields_named


def test_no_served_field_takes_a_number_with_a_fraction():
    """PyYAML reads 1e-6 as text: such a field would need a conversion."""
    types = {field.name: str(field.type) for field in fields(TransformerConfig)}
    assert [name for name in SERVED if "float" in types[name]] == []


def test_whole_numbers_and_truth_values_are_told_apart():
    assert {
        name: refusal(name, True) for name, one in SERVED.items() if one.takes is bool and refusal(name, True)
    } == {}
    assert check_mcore("fp8_margin", 0) == 0 and check_mcore("cp_comm_type", "a2a") == "a2a"
    for name, value, wrong in [
        ("fp8_margin", True, "give a whole number"),
        ("fp8_margin", "two", "give a whole number"),
        ("fp8_margin", -1, "it must be at least 0"),
        ("recompute_num_layers", 0, "it must be at least 1"),
        ("fp8_amax_history_len", 0, "it must be at least 1"),
        ("first_last_layers_bf16", 1, "give true or false"),
        ("cp_comm_type", "all_gather", "choose one of p2p, a2a"),
        ("cp_comm_type", "a2a+p2p", "choose one of p2p, a2a"),
    ]:
        with pytest.raises(ValueError, match=rf"^--mcore\.{name} {value}: {wrong}".replace("+", r"\+")):
            check_mcore(name, value)


@pytest.mark.parametrize("name", MODELS)
def test_no_flag_changes_what_the_description_of_a_model_sets(name):
    for field in describe(MODELS[name]).transformer:
        with pytest.raises(
            ValueError, match=rf"^--mcore\.{field} (is set by|has no effect|changes how weights are drawn)"
        ):
            check_mcore(field, None)


@pytest.mark.parametrize(
    ("field", "sentence"),
    [
        ("activation_func", "is set by the model's config.json"),
        ("moe_shared_expert_gate", "is set by the model's config.json"),
        ("mtp_num_layers", "is set by the model's config.json"),
        ("softmax_scale", "is set by the model's config.json"),
        ("moe_expert_capacity_factor", "has no effect on Lathe's own router and experts, or a wrong one"),
        ("moe_input_jitter_eps", "has no effect on Lathe's own router and experts, or a wrong one"),
        ("grad_scale_func", "is set by Lathe itself"),
        ("moe_token_dispatcher_type", "is set by Lathe's own flag --moe.dispatcher"),
        ("moe_aux_loss_coeff", "is set by Lathe's own flag --moe.aux-loss"),
        ("recompute_granularity", "is set by Lathe's own flag --recompute"),
        ("cuda_graph_impl", "would capture steps as CUDA graphs"),
        ("cpu_offloading", "moves activations to the host"),
        ("fine_grained_activation_offloading", "moves activations to the host"),
        ("recompute_modules", "is set by Lathe's own flag --recompute-modules"),
        ("tp_comm_overlap", "needs Transformer Engine's userbuffers"),
        ("fp8_param", "would keep weights in FP8"),
    ],
)
def test_a_field_that_is_not_to_be_given_is_refused_with_its_reason(field, sentence):
    with pytest.raises(ValueError, match=f"^--mcore.{field} {sentence}"):
        parse_run([f"--mcore.{field.replace('_', '-')}=1"])


@pytest.fixture(scope="module")
def descriptions(tmp_path_factory):
    """A dense model and one with experts."""
    folder = tmp_path_factory.mktemp("models")
    return {name: describe(save_model(name, folder / name)) for name in ("llama", "gpt_oss")}


@pytest.mark.parametrize(
    ("needs", "changes", "model", "backend"),
    [
        ("te", {}, "llama", "te"),
        ("te and cp", {"cp": 2}, "llama", "te"),
        ("not delayed", {"precision": "fp8"}, "llama", "te"),
        ("bf16 layers", {"precision": "fp8", "mcore": {"first_last_layers_bf16": True}}, "llama", "te"),
        ("delayed", {"precision": "fp8", "fp8": "delayed"}, "llama", "te"),
        ("full", {"recompute": "full"}, "llama", "native"),
        ("batched p2p", {"pp": 2}, "llama", "native"),
        ("vpp", {"pp": 2, "vpp": 2}, "llama", "native"),
        ("sp", {"tp": 2}, "llama", "native"),
        ("experts", {}, "gpt_oss", "native"),
    ],
)
def test_a_field_that_nothing_in_the_run_reads_is_refused(descriptions, needs, changes, model, backend):
    name, value = next((name, one) for name, one in SERVED.items() if one.needs == needs)
    plain = RunConfig(precision="fp32")
    with pytest.raises(ValueError, match=f"^--mcore.{name} has an effect with .* alone: leave it out, or give that"):
        check_needs({name: value}, present(plain, descriptions["llama"], "native"))
    check_needs({name: value}, present(replace(plain, **changes), descriptions[model], backend))


@pytest.mark.parametrize(
    ("field", "changes", "model"),
    [
        ("cp_comm_type", {"cp": 2}, "gpt_oss"),  # windows and sinks: Lathe's own attention
        ("first_last_layers_bf16", {"precision": "fp8", "fp8": "delayed"}, "llama"),
        ("num_layers_at_end_in_bf16", {"precision": "fp8", "mcore": {"first_last_layers_bf16": False}}, "llama"),
        ("fp8_margin", {"precision": "fp8"}, "llama"),
    ],
)
def test_what_comes_near_a_need_is_not_taken_for_it(descriptions, field, changes, model):
    with pytest.raises(ValueError, match=f"^--mcore.{field} has an effect with"):
        check_needs({field: 1}, present(RunConfig(**changes), descriptions[model], "te"))


@pytest.mark.parametrize(
    ("changes", "mcore", "sentence"),
    [
        ({}, {"recompute_num_layers": 3}, r"recompute_num_layers 3 does not divide .*\(4\): choose among 1, 2, 4"),
        ({"pp": 2, "vpp": 2}, {"recompute_num_layers": 2}, r"recompute_num_layers 2 .*\(1\): choose among 1, or give"),
        (
            {"pp": 2, "pp_layout": "3,1"},
            {"recompute_num_layers": 3},
            r"recompute_num_layers 3 .*\(3, 1\): choose among 1,",
        ),
        ({"tp": 2, "cp": 4}, {"cp_comm_type": "a2a"}, r"cp_comm_type a2a .* 4 attention heads and 2 key-value heads"),
    ],
)
def test_numbers_that_the_layers_cannot_be_split_by_are_refused(descriptions, changes, mcore, sentence):
    with pytest.raises(ValueError, match=rf"^--mcore\.{sentence}"):
        check_settings(RunConfig(**changes, mcore=mcore), descriptions["llama"], "te")


def test_numbers_that_the_layers_can_be_split_by_pass(descriptions):
    for changes, mcore in [
        ({"pp": 2}, {"recompute_num_layers": 2}),
        ({"pp": 2, "pp_layout": "1,3"}, {"recompute_num_layers": 3, "recompute_method": "block"}),
        ({"cp": 4}, {"cp_comm_type": "a2a"}),
    ]:
        check_settings(RunConfig(**changes, mcore=mcore), descriptions["llama"], "te")


def test_the_page_lists_the_fields_that_are_served():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    table = page.split("the fields that it serves:\n\n")[1].split("\n\n")[0]
    assert sorted(name for line in table.splitlines()[2:] for name in line.split("|")[1].split("`")[1::2]) == sorted(
        SERVED
    )


def test_every_need_is_of_some_field():
    assert {one.needs for one in SERVED.values()} - {None} == set(NEEDS)


@pytest.mark.parametrize(
    ("layout", "extra"),
    [
        (Layout(pp=2), {"deallocate_pipeline_outputs": True, "batch_p2p_sync": False}),
        (Layout(pp=2, vpp=2), {"overlap_p2p_comm_warmup_flush": True}),
        (Layout(tp=2, sp=True), {"clone_scatter_output_in_embedding": False}),
    ],
)
def test_served_fields_of_the_schedule_change_no_number(pool, tmp_path, layout, extra):
    save_model("llama", tmp_path / "model")
    plain, changed = (
        pool.run(train, 2, tmp_path / "model", layout, INDEX, 2, OPTIM, {}, "fp32", "none", None, given)[0]
        for given in (None, extra)
    )
    assert changed.losses == plain.losses and changed.norms == pytest.approx(plain.norms, rel=1e-6)
    for name, gradient in plain.gradients.items():
        np.testing.assert_allclose(changed.gradients[name], gradient, rtol=1e-5, atol=1e-7, err_msg=name)
