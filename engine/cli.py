"""YAML files and flags through one parser: later wins, unknown keys are fatal and name the nearest one."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
import yaml

from engine.config import RunConfig
from engine.mcore_fields import FIELDS, refusal

_FIELD = {"async": "asynchronous"}  # recipe keys that are words of Python's own, and so no names of fields
_LENGTH = (
    "steps",
    "epochs",
)  # either sets the length of a run: the later place in which one stands wins over the other
SECTIONS = (
    "submit",
    "prepare",
    "average",
    "to_hf",
    "evaluate",
    "publish",
)  # of a recipe, for those commands; other keys are the run's


def parse_run(arguments: list[str], defaults: RunConfig | None = None) -> RunConfig:
    """Parses `[recipe.yaml ...] [--flags]`; ValueError for a YAML file or a --mcore field that is wrong.

    A wrong flag ends the process with tyro's message, which names the nearest flags.
    """
    config = defaults or RunConfig()
    files, arguments = take_files(arguments)
    for file in files:
        config = merge(config, read_recipe(file))
    arguments, extra = take_mcore(arguments)
    config = dataclasses.replace(config, mcore={**config.mcore, **extra})
    parsed = tyro.cli(RunConfig, args=arguments, default=config, prog=Path(sys.argv[0]).name)
    # A length among the flags wins over that of the files; of two among the flags the first that is reached counts.
    steps, epochs = parsed.steps, parsed.epochs
    if is_given("steps", arguments) != is_given("epochs", arguments) and None not in (steps, epochs):
        steps, epochs = (steps, None) if is_given("steps", arguments) else (None, epochs)
    return dataclasses.replace(parsed, mcore=config.mcore, steps=steps, epochs=epochs)


def take_files(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The YAML files that stand before the first flag, and the rest of the arguments."""
    count = next((place for place, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    return [Path(word) for word in arguments[:count]], list(arguments[count:])


def is_given(name: str, arguments: Sequence[str]) -> bool:
    """Whether a setting stands among the flags, as `--name VALUE` or `--name=VALUE`."""
    return any(word.partition("=")[0].replace("_", "-") == f"--{flag_name(name)}" for word in arguments)


def flag_name(name: str) -> str:
    """The flag of a field, without its dashes."""
    return {field: key for key, field in _FIELD.items()}.get(name, name).replace("_", "-")


def dump_run(config: RunConfig) -> str:
    """The YAML that starts the same run again."""
    plain = dataclasses.asdict(config)
    plain["output"] = str(config.output)
    plain["data"], plain["valid"] = list(config.data), list(config.valid)
    for key, name in _FIELD.items():
        plain["checkpoint"][key] = plain["checkpoint"].pop(name)
    return yaml.safe_dump(plain, sort_keys=False)


def read_recipe(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Reads a YAML file; its `base: FILE`, or list of files beside it, is read first and overlaid."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    if path.resolve() in seen:
        raise ValueError(f"{path}: recipes name each other as base")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys and values, like the flags without their dashes")
    content = _underscored(content)
    if any(content.get(name) is not None for name in _LENGTH):
        content = dict.fromkeys(_LENGTH) | content  # no other length from the files below
    content |= {name: _underscored(content[name]) for name in SECTIONS if isinstance(content.get(name), dict)}
    bases = content.pop("base", None) or []
    below: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        below = overlay(below, read_recipe(path.parent / str(base), (*seen, path.resolve())))
    return overlay(below, content)


def read_files(files: Sequence[Path]) -> dict[str, Any]:
    """The keys of several recipes, of which the later wins."""
    content: dict[str, Any] = {}
    for file in files:
        content = overlay(content, read_recipe(file))
    return content


def _underscored(keys: dict[str, Any]) -> dict[str, Any]:
    return {str(key).replace("-", "_"): value for key, value in keys.items()}


def read_section(files: Sequence[Path], name: str) -> dict[str, Any]:
    """A section of a recipe (of several files the later wins), over what the run's own keys say of its paths.

    Data are prepared for `model` into `data`; checkpoints of `output` are averaged into its folder `average`, or the
    latest exported into `final`; what came of that is evaluated into `evaluation`, and published. Raises ValueError
    where the recipe has no such section.
    """
    recipe = read_files(files)
    if not isinstance(recipe.get(name), dict):
        there = ", ".join(one for one in SECTIONS if isinstance(recipe.get(one), dict)) or "none"
        raise ValueError(f"{files[-1]} has no section `{name}:` with keys of its own; its sections: {there}")
    return _implied(recipe, name) | recipe[name]


def split_weight(argument: str) -> tuple[str, float]:
    """DATA or DATA:WEIGHT as a path and a weight; what is no number behind a colon belongs to the path."""
    path, colon, weight = argument.rpartition(":")
    try:
        return (path, float(weight)) if colon else (argument, 1.0)
    except ValueError:
        return argument, 1.0


def _implied(recipe: dict[str, Any], name: str) -> dict[str, Any]:
    run, data = recipe.get("output"), recipe.get("data") or []
    if name == "prepare":
        data = data if isinstance(data, list) else [data]
        return {"model": recipe.get("model")} | ({"output": split_weight(str(data[0]))[0]} if len(data) == 1 else {})
    if run is None:
        return {}
    if name in ("evaluate", "publish"):
        made = "average" if isinstance(recipe.get("average"), dict) else "to_hf"
        model = (_implied(recipe, made) | (recipe.get(made) or {}))["output"]
        results = (recipe.get("evaluate") or {}).get("output") or f"{run}/evaluation"
        if name == "evaluate":
            return {"model": model, "output": results}
        # Not the run: a model says itself what it was made of, and the run may have been trained anew since.
        return {"hf": model} | ({"evaluation": [results]} if "evaluate" in recipe else {})
    flag, folder = ("run", "average") if name == "average" else ("checkpoint", "final")
    return {flag: run, "output": f"{run}/{folder}"}


def overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """One mapping over another, key by key."""
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = overlay(result[key], value) if both else value
    return result


def merge(config: Any, values: dict[str, Any], where: str = "") -> Any:
    """Puts a recipe's values over a dataclass; ValueError for a key it has not, naming the nearest.

    Where no prefix `where` is given the values are a whole recipe's, and its sections are left alone.
    """
    sections = () if where else SECTIONS
    fields = {field.name: field for field in dataclasses.fields(config)}
    hints = typing.get_type_hints(type(config), include_extras=False)
    changes = {}
    for raw, value in values.items():
        name = str(raw).replace("-", "_")
        name = _FIELD.get(name, name)
        if name in sections:
            continue
        if name not in fields:
            known = [f"{where}{one}" for one in (*fields, *sections)]
            raise ValueError(unknown(f"{where}{raw}", known, "recipe key"))
        current = getattr(config, name)
        if value is None and not _takes_none(hints[name]):
            raise ValueError(f"recipe key {where}{raw} has no value; leave it out for its default, {current!r}")
        if ((name == "mcore" and value) or dataclasses.is_dataclass(current)) and not isinstance(value, dict):
            raise ValueError(f"recipe key {where}{raw} takes keys of its own, not {value!r}")
        if name == "mcore":
            changes[name] = {**current, **{key: check_mcore(key, item) for key, item in (value or {}).items()}}
        elif dataclasses.is_dataclass(current):
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
        items = value if isinstance(value, list) else [value]
        if any(item is None or isinstance(item, dict | list) for item in items):
            raise ValueError(f"recipe key {where} is {value!r}; give a list of texts, as its flag takes them")
        return tuple(str(convert(item, arguments[0], where)) for item in items)
    if origin is typing.Literal:
        # PyYAML reads a bare on or off as a truth value.
        value = {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
        if value not in arguments:
            raise ValueError(f"recipe key {where} is {value!r}; choose one of {', '.join(map(str, arguments))}")
        return value
    if hint is Path:
        return Path(str(value))
    try:
        if hint is not str and isinstance(value, bool) != (hint is bool):
            raise TypeError
        if hint is int and float(value) != int(float(value)):
            raise ValueError
        return hint(float(value)) if hint is int else hint(value)
    except (TypeError, ValueError, OverflowError):
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
    """Returns the value of a TransformerConfig field; ValueError for one that does not exist or is not to be given."""
    if name not in FIELDS:
        raise ValueError(unknown(f"mcore.{name}", [f"mcore.{field}" for field in FIELDS], "flag"))
    if (sentence := refusal(name, value)) is not None:
        raise ValueError(sentence)
    return value


def unknown(name: str, known: list[str], kind: str) -> str:
    """The sentence about a name that is not known."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"unknown {kind} {name}; the nearest is {nearest[0]}"
