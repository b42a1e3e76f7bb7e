"""Parameter rules: layouts against hand-made expectations, slices against whole tensors, what is refused."""

import json

import pytest
import torch

from models.conversion.hf_reader import HFReader
from models.conversion.rules import RowRange, Rule
from models.hf_config import apply_overrides, describe
from models.model_directory import check_directory, read_shard
from tests.support.tiny import VOCABULARY, Memory, save_model

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 3,
    "vocab_size": 131,
    "max_position_embeddings": 64,
    "rope_theta": 5e5,
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True}
SLIDING, FULL = "sliding_attention", "full_attention"
OLMO3 = {name: value for name, value in LLAMA.items() if name not in ("rope_theta", "head_dim")}
OLMO3 |= {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "layer_types": [SLIDING, FULL]}
EXPERTS = LLAMA | {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "rope_theta": 1e4},
}
LAYER = "decoder.layers.1."


def random_tensors(description):
    shapes = {name: shape for rule in description.rules for name, shape in rule.hf_shapes().items()}
    return Memory({name: torch.randn(shape) for name, shape in shapes.items()})


def test_qkv_holds_for_each_group_its_queries_then_its_key_then_its_value():
    rule = describe(LLAMA).rule[LAYER + "self_attention.linear_qkv.weight"]
    assert rule.shape == (2 * (2 + 2) * 3, 8)
    base = "model.layers.1.self_attn."
    # Every row says which projection and which of its rows it is: 100 for q, 200 for k, 300 for v.
    tensors = Memory(
        {
            f"{base}{name}_proj.weight": torch.arange(rows).add(start)[:, None].expand(rows, 8).float()
            for name, rows, start in (("q", 12, 100), ("k", 6, 200), ("v", 6, 300))
        }
    )
    first = [100, 101, 102, 103, 104, 105, 200, 201, 202, 300, 301, 302]
    second = [106, 107, 108, 109, 110, 111, 203, 204, 205, 303, 304, 305]
    assert rule.read(tensors)[:, 0].tolist() == first + second


def test_qwen2_biases_follow_the_same_order_and_llama_has_none():
    rule = describe(QWEN2).rule[LAYER + "self_attention.linear_qkv.bias"]
    base = "model.layers.1.self_attn."
    tensors = Memory(
        {
            base + "q_proj.bias": torch.arange(12.0),
            base + "k_proj.bias": torch.arange(6.0) + 20,
            base + "v_proj.bias": torch.arange(6.0) + 30,
        }
    )
    first = [0, 1, 2, 3, 4, 5, 20, 21, 22, 30, 31, 32]
    assert rule.read(tensors).tolist() == [*first, 6, 7, 8, 9, 10, 11, 23, 24, 25, 33, 34, 35]
    assert not any(rule.key.endswith("bias") for rule in describe(LLAMA).rules)


def test_gate_stands_above_up_and_the_vocabulary_ends_in_zeros():
    description = describe(LLAMA)
    tensors = random_tensors(description)
    fc1 = description.rule[LAYER + "mlp.linear_fc1.weight"].read(tensors)
    assert torch.equal(fc1[:6], tensors["model.layers.1.mlp.gate_proj.weight"])
    assert torch.equal(fc1[6:], tensors["model.layers.1.mlp.up_proj.weight"])
    embedding = description.rule["embedding.word_embeddings.weight"].read(tensors)
    assert embedding.shape == (256, 8)
    assert torch.equal(embedding[:131], tensors["model.embed_tokens.weight"])
    assert not embedding[131:].any()


@pytest.mark.parametrize("config", [LLAMA, QWEN2], ids=["llama", "qwen2"])
def test_any_slice_is_that_slice_of_the_whole_and_split_is_the_inverse(config):
    description = describe(config)
    tensors = random_tensors(description)
    found = {}
    for rule in description.rules:
        whole = rule.read(tensors)
        assert tuple(whole.shape) == rule.shape
        rows = rule.shape[0]
        for start, stop in ((0, rows), (1, rows - 1), (rows // 2, rows), (rows - 1, rows), (3, 3)):
            index = (slice(start, stop), slice(2, 5)) if len(rule.shape) == 2 else (slice(start, stop),)
            assert torch.equal(rule.read(tensors, index), whole[index]), rule.key
        found.update(rule.split(whole))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_rule_refuses_parts_of_different_dtypes_and_a_wrong_shape():
    files = (("a", (2, 2)), ("b", (2, 2)))
    rule = Rule("key", (4, 2), (RowRange("a", 0, 2), RowRange("b", 0, 2)), files)
    mixed = Memory({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2, dtype=torch.bfloat16)})
    with pytest.raises(ValueError, match="key have different dtypes"):
        rule.dtype(mixed)
    with pytest.raises(ValueError, match=r"shape \[3, 2\], expected \[4, 2\]"):
        list(rule.split(torch.zeros(3, 2)))


def test_description_of_llama_and_of_a_tied_qwen2():
    llama, qwen2 = describe(LLAMA), describe(QWEN2)
    assert (llama.vocab_size, llama.padded_vocab_size, llama.tied) == (131, 256, False)
    assert describe(LLAMA | {"vocab_size": 128}).padded_vocab_size == 128
    assert (llama.transformer["kv_channels"], llama.transformer["num_query_groups"]) == (3, 2)
    assert (llama.transformer["add_qkv_bias"], qwen2.transformer["add_qkv_bias"]) == (False, True)
    assert llama.rope == ({"rope_type": "default", "rope_theta": 5e5},) * 2
    assert "output_layer.weight" in llama.rule
    assert "output_layer.weight" not in qwen2.rule
    assert describe(llama.hf_config) == llama
    assert describe(QWEN2 | {"head_dim": None}).transformer["kv_channels"] == 2


def test_old_and_new_rope_fields_mean_the_same():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 32
    old = LLAMA | {"rope_scaling": scaling | {"rope_type": "llama3"}}
    new = {name: value for name, value in LLAMA.items() if name != "rope_theta"}
    new["rope_parameters"] = scaling | {"rope_type": "llama3", "rope_theta": 5e5}
    assert describe(old).rope == describe(new).rope == (new["rope_parameters"],) * 2
    for config in (old, new):
        changed = apply_overrides(config, {"rope_theta": 1e6, "max_position_embeddings": 4096})
        assert changed["max_position_embeddings"] == 4096
        assert describe(changed).rope[0]["rope_theta"] == 1e6
        assert describe(config, overrides={"rope_theta": 1e6}).rope == describe(changed).rope
        assert describe(config, overrides={"rope_theta": None}).rope == describe(config).rope
    assert "rope_theta" not in apply_overrides(new, {"rope_theta": 1e6})
    with pytest.raises(ValueError, match="unknown override 'theta'"):
        describe(LLAMA, overrides={"theta": 1})


def test_an_override_of_theta_reaches_every_table_or_is_refused():
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    without = {name: value for name, value in LLAMA.items() if name != "rope_theta"}
    in_scaling = without | {"rope_scaling": scaling}
    assert describe(in_scaling).rope[1]["rope_theta"] == 5e5
    for config in (in_scaling, in_scaling | {"rope_theta": 1e4}, in_scaling | {"rope_parameters": scaling}):
        assert [rope["rope_theta"] for rope in describe(config, overrides={"rope_theta": 1e6}).rope] == [1e6, 1e6]
    assert in_scaling["rope_scaling"]["rope_theta"] == 5e5
    by_kind = {kind: scaling for kind in ("full_attention", "sliding_attention")}
    found = describe(OLMO3 | {"rope_parameters": by_kind}, overrides={"rope_theta": 1e6})
    assert [rope["rope_theta"] for rope in found.rope] == [1e6, 1e6]
    # transformers reads a flat table for neither kind of layer, and a theta at the top for full attention alone.
    for partly in ({"rope_parameters": scaling}, {"rope_theta": 1e4}):
        with pytest.raises(ValueError, match="rope_theta = 1000000.0 does not reach layer 0, which keeps 500000.0"):
            describe(OLMO3 | partly, overrides={"rope_theta": 1e6})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["BertModel"]}, "BertModel: supported are GptOssForCausalLM, LlamaForCausalLM, "),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"mlp_bias": True}, "mlp_bias = True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"residual_scale": 0.22}, "residual_scale = 0.22 is not understood"),
        ({"num_key_value_heads": 3}, "num_attention_heads .4. does not divide by num_key_value_heads .3."),
        ({"num_attention_heads": 3}, "not a multiple"),
    ],
)
def test_a_field_that_could_change_the_mathematics_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        describe(LLAMA | changes)


def test_sliding_windows_are_read_where_the_family_has_them():
    inactive = {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 1}
    assert describe(QWEN2 | inactive | {"use_mrope": False, "_note": 1}).rules == describe(QWEN2).rules
    assert "window_size" not in describe(QWEN2 | inactive).transformer
    found = describe(QWEN2 | inactive | {"use_sliding_window": True}).transformer
    assert found["window_size"] == (131071, 0)  # the tokens to the left of the token itself
    assert found["window_attn_skip_freq"] == [0, 1]
    with pytest.raises(ValueError, match="sliding_window = 4096 is not understood"):
        describe(LLAMA | {"sliding_window": 4096})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layer_types": [SLIDING, "chunked_attention"]},
            "'chunked_attention' is not supported: one of full_attention",
        ),
        ({"sliding_window": None}, "sliding_window = None must be 1 or more"),
        ({"sliding_window": 0}, "sliding_window = 0 must be 1 or more"),
        ({"sliding_window": -3}, "sliding_window = -3 must be 1 or more"),
        ({"num_experts_per_tok": 0}, r"num_experts_per_tok \(0\) must lie between 1 and the 8 experts"),
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok \(9\) must lie between 1 and the 8 experts"),
        ({"experts_per_token": 7}, r"experts_per_token \(7\) contradicts num_experts_per_tok \(3\)"),
        ({"initial_context_length": 64}, r"initial_context_length \(64\) contradicts original_max_\w+ \(32\)"),
    ],
)
def test_windows_experts_and_repeated_fields_must_make_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        describe(EXPERTS | changes)


def test_sensible_windows_and_repeated_fields_are_accepted():
    agreeing = {"experts_per_token": 3, "initial_context_length": 32}
    assert describe(EXPERTS | agreeing).transformer == describe(EXPERTS).transformer
    assert describe(EXPERTS | {"num_experts_per_tok": 8}).transformer["moe_router_topk"] == 8
    assert describe(EXPERTS | {"sliding_window": 1}).transformer["window_size"] == (0, 0)
    full = describe(EXPERTS | {"sliding_window": None, "layer_types": [FULL, FULL]})
    assert "window_size" not in full.transformer


@pytest.mark.parametrize(
    ("kind", "architectures"),
    [
        ("mistral", ["LlamaForCausalLM"]),
        ("qwen2", ["LlamaForCausalLM"]),
        ("llama", ["MistralForCausalLM", "LlamaForCausalLM"]),
        ("llama", ["LlamaForCausalLM", "Qwen2ForCausalLM"]),
    ],
)
def test_architectures_that_contradict_the_model_type_are_refused(kind, architectures):
    message = rf"architectures \({', '.join(architectures)}\) contradict model_type \({kind}\)"
    with pytest.raises(ValueError, match=message):
        describe(LLAMA | {"model_type": kind, "architectures": architectures})


@pytest.mark.parametrize("missing", ["model_type", "architectures"])
def test_either_of_model_type_and_architectures_is_enough(missing):
    assert describe({name: value for name, value in QWEN2.items() if name != missing}).family == "qwen2"


def test_missing_extra_and_misshapen_tensors_are_named_and_counted():
    description = describe(LLAMA)
    tensors = random_tensors(description)
    assert check_directory(description, tensors) == ()
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    assert check_directory(description, Memory(tensors | buffer)) == tuple(buffer)
    with pytest.raises(ValueError, match=r"has 1 tensor\(s\) that no rule of llama matches: model.norm.bias"):
        check_directory(description, Memory(tensors | {"model.norm.bias": torch.ones(8)}))
    short = Memory(list(tensors.items())[:-2])
    with pytest.raises(ValueError, match=r"lacks 2 tensor\(s\): lm_head.weight, model.norm.weight"):
        check_directory(description, short)
    wrong = Memory(tensors | {"model.norm.weight": torch.ones(9)})
    with pytest.raises(ValueError, match=r"model.norm.weight \[9\] instead of \[8\]"):
        check_directory(description, wrong)


def test_a_tied_directory_may_hold_a_second_copy_only_if_it_is_equal():
    description = describe(QWEN2)
    tensors = random_tensors(description)
    copy = Memory(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert check_directory(description, copy) == ("lm_head.weight",)
    copy["lm_head.weight"][130, 7] += 1
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        check_directory(description, copy)


def test_read_shard_gives_every_tensor_parallel_rank_its_part(tmp_path):
    save_model("llama", tmp_path, layers=1, head_dim=12)
    description, reader = describe(tmp_path), HFReader(tmp_path)
    assert description.vocab_size == VOCABULARY
    key = "decoder.layers.0.self_attention.linear_proj.weight"
    whole = description.rule[key].read(reader)
    assert whole.shape == (64, 96)
    parts = [read_shard(description, reader, key, (0, 24 * rank), (64, 24)) for rank in range(4)]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    key = "embedding.word_embeddings.weight"
    parts = [read_shard(description, reader, key, (64 * rank, 0), (64, 64)) for rank in range(4)]
    assert torch.equal(torch.cat(parts), description.rule[key].read(reader))
    assert not parts[3].any()
    assert parts[2][:3].any(dim=1).all()
    assert not parts[2][3:].any()
    with pytest.raises(ValueError, match="has no part"):
        read_shard(description, reader, key, (224, 0), (64, 64))
    with pytest.raises(ValueError, match="no rule of llama makes the tensor decoder.bias"):
        read_shard(description, reader, "decoder.bias", (0,), (1,))


def test_a_directory_without_a_readable_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        describe(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        describe(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="JSON object"):
        describe(tmp_path)
