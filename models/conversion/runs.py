"""Which slices of a megatron tensor are whole runs of bytes of Hugging Face files, and need no more than a copy."""

import math

from models.conversion.rules import Index, Rule

# (name of a file tensor, or None for zeros; its first element; number of elements)
Run = tuple[str | None, int, int]


def runs_of(rule: Rule, index: Index = ()) -> list[Run] | None:
    """The runs that one after the other make up a slice; None where it is more than a copy of whole rows."""
    bounds, depth = rule.bounds(index), 2 if rule.stacked else 1
    uncut = all(bound == (0, size) for bound, size in zip(bounds[depth:], rule.shape[depth:], strict=True))
    if rule.transposed or not uncut or any(row_range.step != 1 for row_range in rule.row_ranges):
        return None
    (first, last), per_row = bounds[0], math.prod(rule.shape[depth:])
    if rule.stacked:
        top, bottom = bounds[1]
        if last - first != 1 and (top, bottom) != (0, rule.shape[1]):
            return None
        first, last = first * rule.shape[1] + top, (last - 1) * rule.shape[1] + bottom
    sizes = dict(rule.files)
    found: list[Run] = []
    for row_range, skip, count in rule.walk(first, last - first):
        if row_range is None:
            found.append((None, 0, count * per_row))
            continue
        start = row_range.start + skip
        if row_range.expert is not None:
            start += row_range.expert * sizes[row_range.name][1]
        found.append((row_range.name, start * per_row, count * per_row))
    return found
