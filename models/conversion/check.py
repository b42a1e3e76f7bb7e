"""Every tensor of a directory belongs to one rule, and every rule finds its tensors: else a refusal by name."""

import fnmatch
from collections.abc import Iterable

import torch

from models.conversion.rules import Rule, TensorReader


def check_tensors(
    rules: Iterable[Rule],
    reader: TensorReader,
    family: str,
    buffers: Iterable[str] = (),
    tied_copy: tuple[str, str] | None = None,
) -> tuple[str, ...]:
    """Check that every tensor of a directory belongs to one rule, and every rule finds its tensors.

    buffers: patterns of tensors that are computed, not learned; tied_copy: (copy, original) of a tied model.
    Returns the names that are rightly left out: computed buffers, and a tied model's second copy of its
    embeddings. Raises ValueError naming missing, extra or misshapen tensors and how many there are.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for rule in rules:
        for name, shape in rule.hf_shapes().items():
            assert name not in expected, f"two rules take {name}"
            expected[name] = shape
    present = set(reader.names())
    extra = present - expected.keys()
    left_out = {n for n in extra if any(fnmatch.fnmatchcase(n, pattern) for pattern in buffers)}
    if tied_copy and tied_copy[0] in extra and tied_copy[1] in present:
        _check_tied_copy(reader, *tied_copy)
        left_out.add(tied_copy[0])
    _refuse("lacks", sorted(expected.keys() - present), family)
    _refuse("has", sorted(extra - left_out), family)
    wrong = [
        f"{name} {list(reader.shape(name))} instead of {list(shape)}"
        for name, shape in expected.items()
        if tuple(reader.shape(name)) != shape
    ]
    _refuse("has misshapen", wrong, family)
    return tuple(sorted(left_out))


def _refuse(verb: str, names: list[str], family: str) -> None:
    if names:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        tail = f" that no rule of {family} matches" if verb == "has" else ""
        raise ValueError(f"the model directory {verb} {len(names)} tensor(s){tail}: {shown}")


def _check_tied_copy(reader: TensorReader, copy: str, original: str, block_rows: int = 8192) -> None:
    """A tied model whose files hold both tensors must hold them equal: one of them would be lost."""
    same = reader.shape(copy) == reader.shape(original) and reader.dtype(copy) == reader.dtype(original)
    for start in range(0, reader.shape(copy)[0] if same else 0, block_rows):
        rows = slice(start, start + block_rows)
        same = same and torch.equal(reader.read(copy, (rows,)), reader.read(original, (rows,)))
    if not same:
        raise ValueError(
            f"config.json says tie_word_embeddings, but {copy} differs from {original}: "
            "set tie_word_embeddings to false or remove the tensor"
        )
