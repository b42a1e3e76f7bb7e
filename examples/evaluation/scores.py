"""Scores over several samples a question."""

import math
from collections.abc import Sequence


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that of `k` samples, drawn from `samples` of which `correct` are right, one is right.

    The unbiased estimate 1 - C(n-c, k) / C(n, k) of Chen et al. 2021 (arXiv:2107.03374), in whole numbers.
    Raises `ValueError` where k exceeds the samples.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{k} is not defined for {correct} right of {samples} samples")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def ks(samples: int) -> list[int]:
    """1, 2, 4, ... up to the number of samples, and that number itself."""
    powers = [2**exponent for exponent in range(samples.bit_length()) if 2**exponent <= samples]
    return powers if powers[-1] == samples else [*powers, samples]


def score_table(samples: int, correct: Sequence[int], majority_correct: Sequence[bool]) -> dict[str, float]:
    """`pass@k` for the ks and, with several samples, `maj@K`: fractions of the questions.

    `correct` counts each question's right samples, `majority_correct` says whether its majority is right.
    """
    table = {
        f"pass@{k}": math.fsum(pass_at_k(samples, count, k) for count in correct) / len(correct) for k in ks(samples)
    }
    if samples > 1:
        table[f"maj@{samples}"] = sum(majority_correct) / len(majority_correct)
    return table
