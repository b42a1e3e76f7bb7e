"""A config.json read strictly: into a `ModelDescription`, or an error that names the field.

transformers' own config classes read the file, so defaults and renamed fields mean here what they mean
there. Every field must be understood: one that could change the mathematics and is not is an error.
"""

import copy
import fnmatch
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from models.conversion.rules import Rule, expand
from models.description import ModelDescription
from models.families import FAMILIES
from models.families.common import IGNORED_FIELDS
from models.families.family import Family

VOCAB_MULTIPLE = 128  # the same whatever tp is, so that a checkpoint's shapes never depend on the layout
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
SLIDING = "sliding_attention"
LAYER_TYPES = ("full_attention", SLIDING)
OVERRIDES = ("rope_theta", "max_position_embeddings", "vocab_size")

# Read by this file for every family.
COMMON_FIELDS = {"vocab_size", "max_position_embeddings", "tie_word_embeddings", "head_dim"}
ROPE_FIELDS = {"rope_parameters", "rope_theta", "rope_scaling"}
WINDOW_FIELDS = {"layer_types", "sliding_window", "use_sliding_window", "max_window_layers"}
# About files, tokens, generation or labels: never about what the model computes from tokens in training.
BOOKKEEPING = {"torch_dtype", "tokenizer_class", "num_labels", "model_max_length", "use_cache"}


def describe(model: str | Path | dict, *, overrides: dict | None = None) -> ModelDescription:
    """Describe the model of a Hugging Face directory, or of the contents of a config.json.

    `overrides` may set what `OVERRIDES` names. Raises ValueError for an architecture
    that is not supported (naming those that are), and for fields not understood or in contradiction (naming them).
    """
    raw = apply_overrides(model if isinstance(model, dict) else read_config(model), overrides)
    family = _family(raw)
    config = _normalised(raw, family)
    _check_fields(config, raw, family)
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    transformer = _transformer(config, family)
    _check_counts(config, transformer)
    ropes = _ropes(config, transformer["num_layers"])
    _check_repeats(config, ropes, family)
    _check_theta(ropes, (overrides or {}).get("rope_theta"))
    vocab_size, tied = config["vocab_size"], bool(config["tie_word_embeddings"])
    padded = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    dims = _dims(config, transformer) | {"vocab": vocab_size, "padded_vocab": padded}
    rules = expand(family.table, dims, transformer["num_layers"], {"tied" if tied else "untied"})
    return ModelDescription(
        family=family.name,
        hf_config=config,
        transformer=transformer,
        vocab_size=vocab_size,
        padded_vocab_size=padded,
        tied=tied,
        max_position_embeddings=config["max_position_embeddings"],
        rope=ropes,
        post_norm=family.post_norm,
        gain_in_fp32=family.gain_in_fp32,
        qk_norm=family.qk_norm,
        mxfp4=_mxfp4_tensors(config, family, rules),
        rules=rules,
        ignored_fields=tuple(name for name in IGNORED_FIELDS if name in raw),
    )


def _transformer(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Fields for megatron's TransformerConfig: the family's, its windows, and what its norms ask for."""
    fields = dict(family.constants)
    for name, given in family.fields.items():
        field, convert = given if isinstance(given, tuple) else (given, None)
        fields[name] = convert(config[field]) if convert else config[field]
    fields["qk_layernorm"] = family.qk_norm == "head"
    return fields | (_windows(config) if family.windows else {})


def _windows(config: Mapping[str, Any]) -> dict[str, Any]:
    """megatron's fields for sliding windows, none where every layer sees everything before it."""
    kinds = config.get("layer_types") or ()
    for kind in kinds:
        if kind not in LAYER_TYPES:
            raise ValueError(f"config.json: layer type {kind!r} is not supported: one of {', '.join(LAYER_TYPES)}")
    if SLIDING not in kinds:
        return {}
    window = config["sliding_window"]
    if not isinstance(window, int) or window < 1:
        raise ValueError(f"config.json: sliding_window = {window!r} must be 1 or more where a layer's attention slides")
    # The window holds a token itself; megatron counts the tokens to its left.
    return {"window_size": (window - 1, 0), "window_attn_skip_freq": [int(kind == SLIDING) for kind in kinds]}


def _check_counts(config: Mapping[str, Any], transformer: Mapping[str, Any]) -> None:
    """Refuse numbers of heads and experts that do not go together."""
    heads, groups = config["num_attention_heads"], transformer["num_query_groups"]
    if heads % groups:
        raise ValueError(
            f"config.json: num_attention_heads ({heads}) does not divide by num_key_value_heads ({groups})"
        )
    experts, chosen = transformer.get("num_moe_experts", 1), transformer.get("moe_router_topk", 1)
    if not 1 <= chosen <= experts:
        raise ValueError(f"config.json: num_experts_per_tok ({chosen}) must lie between 1 and the {experts} experts")


def _dims(config: Mapping[str, Any], transformer: Mapping[str, Any]) -> dict[str, int]:
    """The words in which a family's table gives shapes."""
    heads, groups, width = config["num_attention_heads"], transformer["num_query_groups"], config["head_dim"]
    expert_ffn = transformer.get("moe_ffn_hidden_size", 0)
    return {
        "hidden": config["hidden_size"],
        "heads": heads,
        "groups": groups,
        "head_dim": width,
        "heads*head_dim": heads * width,
        "groups*head_dim": groups * width,
        "ffn": transformer["ffn_hidden_size"],
        "experts": transformer.get("num_moe_experts", 0),
        "expert_ffn": expert_ffn,
        "2*expert_ffn": 2 * expert_ffn,
    }


def read_config(directory: str | Path) -> dict[str, Any]:
    """The contents of a directory's config.json, as they stand; ValueError where there is none."""
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{directory} is not a Hugging Face model directory: it has no config.json") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if isinstance(config, dict):
        return config
    raise ValueError(f"{path} does not hold a JSON object")


def apply_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of config.json's contents with overrides put where this config keeps such fields.

    An override of None leaves the field alone. Raises ValueError for a name that is not in `OVERRIDES`.
    """
    result = copy.deepcopy(dict(config))
    for name, value in (overrides or {}).items():
        if name not in OVERRIDES:
            raise ValueError(f"unknown override {name!r}: known are {', '.join(OVERRIDES)}")
        if value is None:
            continue
        # transformers 5 writes rope_theta into rope_parameters; older files have it at the top or in rope_scaling.
        if name != "rope_theta" or name in result or not result.get("rope_parameters"):
            result[name] = value
        if name == "rope_theta":
            scaling = [table for table in _tables(result.get("rope_scaling")) if name in table]
            for table in _tables(result.get("rope_parameters")) + scaling:
                table[name] = value
    return result


def _tables(rope: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The tables of a rope field: one for each kind of layer, or the field itself."""
    by_kind = [table for table in (rope or {}).values() if isinstance(table, dict)]
    return by_kind or ([rope] if rope else [])


def _family(raw: Mapping[str, Any]) -> Family:
    architectures = raw.get("architectures") or []
    by_type = [f for f in FAMILIES.values() if f.name == raw.get("model_type")]
    found = [FAMILIES[a] for a in architectures if a in FAMILIES] if architectures else by_type
    if not found:
        given = ", ".join(architectures) or raw.get("model_type") or "none"
        raise ValueError(f"unsupported architecture {given}: supported are {', '.join(sorted(FAMILIES))}")
    family, kind = found[0], raw.get("model_type")
    # transformers builds what model_type says and reads architectures for other ends.
    if kind and (kind != family.name or any(name != family.architecture for name in architectures)):
        raise ValueError(f"config.json: architectures ({', '.join(architectures)}) contradict model_type ({kind})")
    return family


def _normalised(raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Every field that transformers knows, with its default where the file does not say."""
    fields = {name: value for name, value in raw.items() if name != "model_type" and name not in IGNORED_FIELDS}
    try:
        found = AutoConfig.for_model(family.name, **copy.deepcopy(fields))
        config = found.to_dict()
        return {alias: config[name] for alias, name in found.attribute_map.items() if name in config} | config
    except (StrictDataclassError, TypeError, KeyError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"config.json is not understood: {type(error).__name__}: {reason}") from None


def _check_fields(config: Mapping[str, Any], raw: Mapping[str, Any], family: Family) -> None:
    """Refuse by name a field whose value this family does not implement, or that nobody knows."""
    for name, wanted in family.requires.items():
        value = config.get(name, wanted)
        for one in value if isinstance(value, list) else [value]:
            if one != wanted:
                raise ValueError(f"config.json: {name} = {one!r} is not supported for {family.name} (only {wanted!r})")
    blank = AutoConfig.for_model(family.name)
    default = blank.to_dict()
    understood = COMMON_FIELDS | ROPE_FIELDS | BOOKKEEPING | {s for s in family.fields.values() if isinstance(s, str)}
    understood |= {given[0] for given in family.fields.values() if isinstance(given, tuple)}
    understood |= {*family.requires, *family.harmless, *family.repeats, *(WINDOW_FIELDS if family.windows else ())}
    understood |= {"quantization_config"} if family.mxfp4 else set()
    for pair in blank.attribute_map.items():  # two names of one field
        understood |= set(pair) if understood & set(pair) else set()
    understood |= set(PreTrainedConfig().to_dict()) | set(GenerationConfig().to_dict())
    for name, value in {**config, **raw}.items():
        if name in understood or name in IGNORED_FIELDS or name.startswith("_"):
            continue
        if value != default.get(name) if name in default else value:
            raise ValueError(
                f"config.json: {name} = {value!r} is not understood and could change the mathematics; "
                "remove the field if it does not"
            )


def _ropes(config: Mapping[str, Any], num_layers: int) -> tuple[dict[str, Any], ...]:
    """transformers' rope_parameters of every layer; some models have one table a kind of layer."""
    parameters = dict(config.get("rope_parameters") or {})
    kinds = list(config.get("layer_types") or ())
    if any(isinstance(table, dict) for table in parameters.values()):
        tables = {kind: _rope(dict(parameters[kind] or {}), config) for kind in set(kinds)}
        return tuple(tables[kind] for kind in kinds)
    return (_rope(parameters, config),) * num_layers


def _rope(rope: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    kind = rope.setdefault("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise ValueError(f"config.json: rope type {kind!r} is not supported: one of {', '.join(ROPE_TYPES)}")
    for holder in (rope, config):
        if (holder.get("partial_rotary_factor") or 1.0) != 1.0:
            raise ValueError("config.json: partial_rotary_factor other than 1 is not supported")
    if "rope_theta" not in rope:
        raise ValueError("config.json has no rope_theta")
    return rope


def _check_repeats(config: Mapping[str, Any], ropes: tuple[dict[str, Any], ...], family: Family) -> None:
    """Refuse a field that says another one again and says something else."""
    for name, repeated in family.repeats.items():
        for holder in (config, *ropes):
            if config.get(name) is not None and holder.get(repeated, config[name]) != config[name]:
                raise ValueError(f"config.json: {name} ({config[name]}) contradicts {repeated} ({holder[repeated]})")


def _check_theta(ropes: tuple[dict[str, Any], ...], theta: float | None) -> None:
    """Refuse an override that transformers' reading of the file keeps from some layers."""
    for layer, rope in enumerate(ropes):
        if theta is not None and rope["rope_theta"] != theta:
            raise ValueError(
                f"the override rope_theta = {theta} does not reach layer {layer}, which keeps {rope['rope_theta']}: "
                "write rope_parameters in config.json with a table and its rope_theta for each kind of layer"
            )


def _mxfp4_tensors(config: Mapping[str, Any], family: Family, rules: tuple[Rule, ...]) -> tuple[str, ...]:
    """The tensors that a quantised model's files hold in MXFP4; ValueError for any other quantisation."""
    quantization = config.get("quantization_config")
    if not quantization:
        return ()
    method = quantization.get("quant_method")
    if method != "mxfp4":
        raise ValueError(f"config.json: quantization_config of {method!r} is not supported for {family.name}")
    names = [name for rule in rules for name, _ in rule.files]
    return tuple(n for n in names if any(fnmatch.fnmatchcase(n, pattern) for pattern in family.mxfp4))
