"""YAML files and flags through one parser: later wins, unknown keys are fatal and name the nearest one."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
import typing
from pathlib import Path
from typing import Any

import tyro
import yaml

from engine.config import RunConfig

# What the layout, the precision and the exactness of losses and resumes rest on.
_OWNED = {
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "sequence_parallel",
    "params_dtype",
    "pipeline_dtype",
    "bf16",
    "fp16",
    "calculate_per_token_loss",
    "hidden_dropout",
    "attention_dropout",
    "pipeline_model_parallel_layout",
    "moe_permute_fusion",  # makes room for every token, and padding is sent to no expert
}


def parse_run(arguments: list[str], defaults: RunConfig | None = None) -> RunConfig:
    """Parses `[recipe.yaml ...] [--flags]`; ValueError for a YAML file or a --mcore field that is wrong.

    A wrong flag ends the process with tyro's message, which names the nearest flags.
    """
    arguments = list(arguments)
    config = defaults or RunConfig()
    while arguments and not arguments[0].startswith("-"):
        config = merge(config, read_recipe(Path(arguments.pop(0))))
    arguments, extra = take_mcore(arguments)
    config = dataclasses.replace(config, mcore={**config.mcore, **extra})
    parsed = tyro.cli(RunConfig, args=arguments, default=config, prog=Path(sys.argv[0]).name)
    return dataclasses.replace(parsed, mcore=config.mcore)


def read_recipe(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Reads a YAML file; its `base: FILE` (beside it) is read first and overlaid."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such recipe file")
    if path.resolve() in seen:
        raise ValueError(f"{path}: recipes name each other as base")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys and values, like the flags without their dashes")
    base = content.pop("base", None)
    if base is None:
        return content
    return _overlay(read_recipe(path.parent / base, (*seen, path.resolve())), content)


def _overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _overlay(result[key], value) if both else value
    return result


def merge(config: Any, values: dict[str, Any], where: str = "") -> Any:
    """Puts a recipe's values over a dataclass; ValueError for a key it has not, naming the nearest."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    hints = typing.get_type_hints(type(config), include_extras=False)
    changes = {}
    for raw, value in values.items():
        name = str(raw).replace("-", "_")
        if name not in fields:
            raise ValueError(_unknown(f"{where}{raw}", [f"{where}{known}" for known in fields], "recipe key"))
        current = getattr(config, name)
        if value is None and not _takes_none(hints[name]):
            raise ValueError(f"recipe key {where}{raw} has no value; leave it out for its default, {current!r}")
        if name == "mcore":
            changes[name] = {**current, **{key: check_mcore(key, item) for key, item in (value or {}).items()}}
        elif dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise ValueError(f"recipe key {where}{raw} takes keys of its own, not {value!r}")
            changes[name] = merge(current, value, f"{where}{raw}.")
        else:
            changes[name] = convert(value, hints[name], f"{where}{raw}")
    return dataclasses.replace(config, **changes)


def convert(value: Any, hint: Any, where: str) -> Any:
    """Checks a YAML value against a field's type; PyYAML reads 2e-5 as text, for one."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return convert(value, next(a for a in arguments if a is not type(None)), where)
    if origin is tuple:
        return tuple(str(item) for item in (value if isinstance(value, list) else [value]))
    if origin is typing.Literal:
        # PyYAML reads a bare on or off as a truth value.
        value = {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
        if value not in arguments:
            raise ValueError(f"recipe key {where} is {value!r}; choose one of {', '.join(map(str, arguments))}")
        return value
    if hint is Path:
        return Path(str(value))
    try:
        if hint is bool and not isinstance(value, bool):
            raise TypeError
        if hint is int and float(value) != int(float(value)):
            raise ValueError
        return hint(float(value)) if hint is int else hint(value)
    except (TypeError, ValueError):
        raise ValueError(f"recipe key {where} is {value!r}, which is no {hint.__name__}") from None


def _takes_none(hint: Any) -> bool:
    return type(None) in typing.get_args(hint) or typing.get_origin(hint) is typing.Annotated


def take_mcore(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Takes --mcore.FIELD=VALUE (or FIELD VALUE) out of the arguments, values read as YAML."""
    rest: list[str] = []
    extra: dict[str, Any] = {}
    pending = iter(arguments)
    for argument in pending:
        if not argument.startswith("--mcore."):
            rest.append(argument)
            continue
        name, equals, text = argument.removeprefix("--mcore.").partition("=")
        if not equals:
            text = next(pending, "")
        name = name.replace("-", "_")
        extra[name] = check_mcore(name, yaml.safe_load(text))
    return rest, extra


def check_mcore(name: str, value: Any) -> Any:
    """Returns the value of a TransformerConfig field; ValueError for a field megatron-core has not."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    known = {field.name: field for field in dataclasses.fields(TransformerConfig)}
    if name not in known:
        raise ValueError(_unknown(f"mcore.{name}", [f"mcore.{field}" for field in known], "flag"))
    if name in _OWNED:
        raise ValueError(f"--mcore.{name} is set by Lathe's own flags and checks; it cannot be given by hand")
    if isinstance(value, str) and "float" in str(known[name].type):
        try:
            return float(value)  # PyYAML reads 1e-6 as text
        except ValueError:
            raise ValueError(f"--mcore.{name} is {value!r}, which is no number") from None
    return value


def _unknown(name: str, known: list[str], kind: str) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"unknown {kind} {name}; the nearest is {nearest[0]}"
