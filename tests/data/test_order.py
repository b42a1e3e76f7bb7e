"""What a step holds depends on data, settings, seed and step alone; blends are exact and no token is lost uncounted."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.loading import in_memory, small_loader


def _index(documents: int, longest: int, name: str, seed: int = 0, sources: int = 1):
    draw = np.random.default_rng(seed)
    tokens = [draw.integers(1, 100, draw.integers(2, longest + 1)) for _ in range(documents)]
    return in_memory(tokens, name=name, sources=draw.integers(0, sources, documents).tolist())


def contents(steps) -> Counter:
    """Every document of a step with all that is trained of it, however it is laid out."""
    found = Counter()
    for microbatch in (microbatch for step in steps for microbatch in step):
        real = np.flatnonzero(microbatch.document_lengths)
        for sample, number in zip(microbatch.sample_ids, real, strict=True):
            start = microbatch.cu_seqlens[number]
            span = slice(start, start + microbatch.document_lengths[number])
            parts = (microbatch.tokens, microbatch.labels, microbatch.loss_mask, microbatch.positions)
            found[
                (sample, int(microbatch.document_sources[number]), *(tuple(part[span].tolist()) for part in parts))
            ] += 1
    return found


@pytest.mark.parametrize("unit", ["conversations", "sequences"])
@pytest.mark.parametrize("too_long", ["cut", "truncate", "drop"])
def test_steps_are_the_same_under_every_layout_and_after_every_restart(unit, too_long):
    text = _index(9, 60, "text", sources=1)
    text.may_be_cut = True
    blend = (_index(37, 24, "chat", seed=1, sources=3), 1.5), (text, 0.5)
    given = dict(batch_unit=unit, too_long=too_long, allow_unsupervised=True)
    alone = small_loader(*blend, **given)
    expected = [contents([alone.next_step()]) for _ in range(20)]
    assert [contents([alone.step(0, number)]) for number in range(3)] == expected[:3]  # not made ahead in a thread

    layouts = [(1, 3, 1), (2, 1, 1), (5, 2, 3), (7, 1, 4)]
    state = small_loader(*blend, **given).state_dict()
    for number in range(20):  # another layout and a new process at every step
        dp_size, micro_batch_size, multiple = layouts[number % 4]
        layout = dict(dp_size=dp_size, micro_batch_size=micro_batch_size, microbatch_multiple=multiple)
        ranks = [small_loader(*blend, **given, **layout, dp_rank=rank) for rank in range(dp_size)]
        for loader in ranks:
            loader.load_state_dict(state)
        assert contents(loader.next_step() for loader in ranks) == expected[number]
        (state, *others) = [loader.state_dict() for loader in ranks]
        assert all(other == state for other in others)


WEIGHTS = st.integers(1, 350).map(lambda hundredths: hundredths / 100)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 12), WEIGHTS), min_size=1, max_size=3), st.integers(1, 6))
def test_blends_are_exact_at_the_end_of_every_epoch(shapes, epochs):
    blend = [(in_memory([[1]] * size, name=f"data{n}"), weight) for n, (size, weight) in enumerate(shapes)]
    loader = small_loader(*blend)
    seen = Counter()
    for epoch in range(epochs):
        for number in range(loader.steps_in_epoch(epoch)):
            seen.update(sample for microbatch in loader.step(epoch, number) for sample in microbatch.sample_ids)
        for dataset, (size, weight) in enumerate(shapes):
            times = [seen[dataset, document] for document in range(size)]
            assert sum(times) == int(Fraction(str(weight)) * size * (epoch + 1))
            assert max(times) - min(times) <= 1  # nothing comes again before all have come


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=12),
    st.sampled_from(["drop", "truncate", "cut"]),
    st.sampled_from(["conversations", "sequences"]),
    st.integers(1, 3),
)
def test_tokens_in_are_trained_masked_padded_or_counted(lengths, too_long, unit, dp_size):
    index = in_memory([range(1, length + 1) for length in lengths])
    given = dict(too_long=too_long, batch_unit=unit, allow_unsupervised=True, dp_size=dp_size)
    try:
        ranks = [small_loader(index, **given, dp_rank=rank) for rank in range(dp_size)]
    except ValueError as error:
        assert "leaves nothing to train on" in str(error)
        assert too_long == "drop" and min(lengths) > 16
        return
    steps = [loader.step(0, number) for loader in ranks for number in range(loader.steps_in_epoch(0))]
    microbatches = [microbatch for step in steps for microbatch in step]
    counts = ranks[0].counts
    real = sum(microbatch.real_tokens for microbatch in microbatches)
    counted = counts.dropped_tokens + counts.truncated_tokens + counts.lost_tokens
    assert sum(lengths) == real + counted - counts.repeated_tokens
    assert sum(len(microbatch.tokens) for microbatch in microbatches) == real + sum(
        microbatch.padding_tokens for microbatch in microbatches
    )
    documents = sum(len(microbatch.sample_ids) for microbatch in microbatches)
    assert documents == counts.documents - counts.dropped - counts.cut + counts.pieces
    supervised = sum(microbatch.supervised_tokens for microbatch in microbatches)
    assert supervised == sum(int(microbatch.loss_mask.sum()) for microbatch in microbatches)
    if too_long == "cut":  # all that can be predicted is, whatever the pieces
        assert supervised == sum(length - max(length // 2, 1) for length in lengths)
