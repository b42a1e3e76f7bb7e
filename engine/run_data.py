"""The data of a run: what --data and --valid name, opened, held against the model, and audited."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.audit import lost_rows, unsupervised
from data.documents import Documents
from data.index import open_index
from data.order import GlobalOrder
from data.prefix import prefix_of
from engine.cli import split_weight


def open_data(arguments: tuple[str, ...], flag: str = "--data") -> tuple[tuple[Documents, float], ...]:
    """Opens DATA or DATA:WEIGHT arguments; ValueError in one sentence for a path or weight that is wrong."""
    return tuple(_open(argument, flag) for argument in arguments)


def open_valid(arguments: tuple[str, ...]) -> dict[str, tuple[Documents, float]]:
    """Opens the arguments of --valid, each DATA or NAME=DATA, by name; ValueError for two of one name.

    One without a name bears that of its directory, or its whole path where that name is another's, too.
    """
    opened = []
    for argument in arguments:
        name, equals, place = argument.partition("=")
        named = bool(equals) and "/" not in name and not _is_data(argument)
        if named and not (name and place):
            raise ValueError(f"--valid {argument}: give NAME=DATA, or DATA alone")
        opened.append((name if named else "", *_open(place if named else argument, "--valid")))
    short = [name or index.path.absolute().name for name, index, _ in opened]
    sets: dict[str, tuple[Documents, float]] = {}
    for (given, index, weight), name in zip(opened, short, strict=True):
        if not given and short.count(name) > 1:
            name = str(index.path)
        if name in sets:
            raise ValueError(f"--valid names two sets {name}: give each a name of its own, as NAME=DATA")
        sets[name] = (index, weight)
    return sets


def _open(argument: str, flag: str) -> tuple[Documents, float]:
    path, factor = (argument, 1.0) if _is_data(argument) else split_weight(argument)
    if factor <= 0:
        raise ValueError(f"{flag} {argument}: the weight must be above 0")
    return open_index(path), factor


def _is_data(path: str) -> bool:
    return Path(path).is_dir() or prefix_of(path) is not None


def check_data(indexes: list[Documents], vocab_size: int) -> None:
    """Refuses tokens that the model does not have, and data directories whose conversations end differently."""
    for index in indexes:
        if (tokens := index.meta.get("vocab_size", 0)) > vocab_size:
            raise ValueError(
                f"{index.path} was prepared with a vocabulary of {tokens:,} tokens and the model has {vocab_size:,}; "
                "prepare the data with the model's own tokenizer, or give the model rows for the new tokens with "
                "--override.resize-embeddings"
            )
    # Text that no template made, rendered elsewhere or plain, mixes with anything.
    templated = [index for index in indexes if index.meta.get("chat_template")]
    for index in templated:
        for name in ("chat_template", "end_token_ids"):
            if index.meta.get(name) != templated[0].meta.get(name):
                raise ValueError(
                    f"{index.path} and {templated[0].path} were prepared with different chat templates, of which the "
                    "export can carry one; prepare both with the same --chat-template"
                )


def check_held_out(trained: Sequence[Documents], held_out: Mapping[str, Documents]) -> None:
    """Refuses a held-out set that is training data, by its place or by what it holds."""
    places: dict[object, Documents] = {index.path.resolve(): index for index in trained}
    places |= {index.fingerprint: index for index in trained}
    for index in held_out.values():
        if same := places.get(index.path.resolve()) or places.get(index.fingerprint):
            raise ValueError(
                f"--valid {index.path} holds the same documents as --data {same.path}, so its loss would not be "
                "held out; give documents that are not trained on, e.g. what --hold-out of prepare_data.py sets apart"
            )


def check_batch(order: GlobalOrder, global_batch_size: int, batch_unit: str) -> None:
    """Refuses a batch that no epoch can fill: every step would be smaller than it says."""
    size = order.size_of_epoch(0)
    if global_batch_size > size:
        unit = "packed sequences" if batch_unit == "sequences" else batch_unit
        raise ValueError(
            f"--global-batch-size {global_batch_size:,} is more than the {size:,} {unit} of an epoch of --data, and a "
            f"step never holds more than an epoch; give --global-batch-size {size} or less"
        )


def model_data(trained: list[Documents], held_out: list[Documents]) -> dict[str, Any]:
    """What an export takes from the data: `tokenizer`, a directory or None, `chat_template` and `end_token_ids`.

    The tokenizer is the one with most tokens. Every token that ends a turn in any of the training data counts.
    """
    directories = [(index.meta.get("vocab_size", 0), index.path / "tokenizer") for index in trained + held_out]
    present = [pair for pair in directories if pair[1].is_dir()]
    templates = (index.meta.get("chat_template") for index in trained)
    ends = (token for index in trained for token in index.meta.get("end_token_ids") or ())
    return {
        "tokenizer": max(present, key=lambda pair: pair[0])[1] if present else None,
        "chat_template": next(filter(None, templates), None),
        "end_token_ids": list(dict.fromkeys(ends)),
    }


def audit(indexes: Iterable[Documents], *, max_dropped: float, allow_unsupervised: bool) -> None:
    """Refuses data whose preparation lost more rows than wanted, or trains nothing of a source or kind of row.

    Reads what meta.json says; data of which it says nothing passes. Raises ValueError in one sentence.
    """
    for index in indexes:
        lost = lost_rows(index.meta)
        if lost and lost.share > max_dropped:
            enough = math.ceil(1000 * lost.count / lost.rows) / 1000
            raise ValueError(
                f"--data {index.path}: its preparation dropped {lost}; look at {index.path / 'dropped.jsonl'} and "
                f"prepare the data again, or allow it with --max-dropped {enough:g}"
            )
        silent = unsupervised(index.meta)
        if silent and not allow_unsupervised:
            raise ValueError(
                f"--data {index.path}: no token is supervised in {' and '.join(silent)}; prepare the data again "
                "without them or with --train-on, or allow it with --allow-unsupervised"
            )
