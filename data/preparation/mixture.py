"""The keys of a mixture file, or of a recipe's section, and flags -> options; flags win."""

import dataclasses
import difflib
import sys
import types
import typing
from pathlib import Path
from typing import Any

import tyro

from data.preparation.formats import Fields
from data.preparation.options import PrepareOptions
from data.preparation.prompt import Prompt, load_prompt
from data.preparation.sources import Source, parse_amount


def options_from(mapping: dict[str, Any], flags: list[str], where: str = "prepare") -> PrepareOptions:
    """The options that a mapping's keys and flags give; `where` begins what is said about a wrong key.

    Raises ValueError, also where something is missing. A wrong flag ends the process with tyro's message, which names
    the nearest flags.
    """
    return _parse(read_values(mapping, PrepareOptions, where), flags)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Unchecked(PrepareOptions):
    __doc__ = PrepareOptions.__doc__

    def __post_init__(self) -> None:
        """Checks nothing: what is wrong is said in one sentence when all is parsed, not in a box of tyro's."""


def _parse(values: dict[str, Any], flags: list[str]) -> PrepareOptions:
    parsed = tyro.cli(_Unchecked, args=flags, default=_Unchecked(**values), prog=Path(sys.argv[0]).name)
    options = PrepareOptions(**vars(parsed))
    options.check_complete()
    return options


def read_values(mapping: Any, kind: type, where: str) -> dict[str, Any]:
    """A mapping's values as the fields of the dataclass `kind` take them.

    Raises ValueError, begun with `where`, for a key that it has not (naming the nearest) and for a wrong value.
    """
    if not isinstance(mapping, dict):
        raise ValueError(f"{where}: keys with values are needed, not {mapping!r}")
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in mapping.items():
        name = str(key).replace("-", "_")
        if kind is Source and name not in hints and name in typing.get_type_hints(PrepareOptions):
            raise ValueError(f"{where}: {key} counts for all sources: write it beside `sources`, not inside one")
        if name not in hints:
            nearest = difflib.get_close_matches(name, hints, n=1, cutoff=0.0)[0]
            raise ValueError(f"{where}: unknown key {key}; the nearest is {nearest}")
        values[name] = _convert(value, hints[name], f"{where}: {key}")
    missing = [field.name for field in dataclasses.fields(kind) if _is_required(field) and field.name not in values]
    if missing:
        raise ValueError(f"{where}: {' and '.join(missing)} is missing")
    try:
        kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return values


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(value: Any, hint: Any, where: str) -> Any:
    """A YAML value as a field of type `hint` takes it: as the first of the types in a union that it fits."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = typing.get_args(hint) if union else (hint,)
    if value is None and types.NoneType not in kinds:
        raise ValueError(f"{where} has no value: leave it out for its default")
    for kind in kinds:
        converted = _as(value, kind, where)
        if converted is not None or value is None:
            return converted
    wanted = [_WORDS.get(kind, ", ".join(map(str, typing.get_args(kind)))) for kind in kinds]
    raise ValueError(f"{where} is {value!r}; it takes {' or '.join(dict.fromkeys(filter(None, wanted)))}")


_WORDS = {
    **{bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "text"},
    **{types.NoneType: "", Fields: "keys with values", Prompt: "keys with values", Source: "keys with values"},
}


def _as(value: Any, kind: Any, where: str) -> Any:
    """The value as one type, or None where it is none of this type."""
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_convert(item, inner[0], f"{where}[{number}]") for number, item in enumerate(items))
    if origin is typing.Literal:
        return value if value in inner else None
    if isinstance(value, dict):
        if origin is Prompt:
            return _prompt(value, where)
        if origin in (Fields, Source):
            return origin(**read_values(value, origin, where))
        return value if origin is dict else None
    if origin is bool or isinstance(value, bool):  # PyYAML reads a bare on, off, yes and no as truth values
        return value if origin is bool and isinstance(value, bool) else None
    if origin in (int, float) and isinstance(value, int | float | str):
        try:
            amount = parse_amount(value) if isinstance(value, str) else value
        except ValueError:
            return None
        return origin(amount) if isinstance(amount, origin) or origin is float else None
    return origin(str(value)) if origin in (str, Path) and isinstance(value, str | int | float) else None


def _prompt(value: dict[str, Any], where: str) -> Prompt:
    try:
        return load_prompt(value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
