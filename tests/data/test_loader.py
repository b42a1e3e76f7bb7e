"""The global order and its microbatches: exact arrays, nothing lost, the same under every layout."""

import json
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from tests.support.loading import in_memory, small_loader


def _random_index(documents, longest=16, seed=0, name="data"):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, longest + 1, documents)
    return in_memory([draw.integers(1, 100, length) for length in lengths], name=name)


def _flat(lists):
    return list(chain.from_iterable(lists))


def _ids(microbatches):
    return _flat(microbatch.sample_ids for microbatch in microbatches)


def _epoch(loader, epoch=0):
    return [_ids(loader.step(epoch, number)) for number in range(loader.steps_in_epoch(epoch))]


def test_every_array_of_a_hand_made_microbatch():
    # 5 tokens, two supervised stretches; 3 tokens of which the first is supervised in vain; 2 tokens, none.
    index = in_memory([[11, 12, 13, 14, 15], [21, 22, 23], [31, 32]], [[(1, 2), (3, 5)], [(0, 2)], []])
    loader = small_loader(index, seq_len=12, micro_batch_size=2, pad_documents_to=2, pad_token=9, shuffle=False)
    (microbatch,) = loader.next_step()
    assert microbatch.sample_ids == [(0, 0), (0, 1), (0, 2)]
    assert microbatch.tokens.tolist() == [11, 12, 13, 14, 15, 9, 21, 22, 23, 9, 31, 32, *[9] * 12]
    assert microbatch.labels.tolist() == [12, 0, 14, 15, 0, 0, 22, *[0] * 17]
    assert microbatch.loss_mask.tolist() == [*map(bool, [1, 0, 1, 1, 0, 0, 1]), *[False] * 17]
    assert microbatch.positions.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 0, 1, *range(12)]
    assert microbatch.cu_seqlens.tolist() == [0, 6, 10, 12, 24]
    assert (microbatch.max_seqlen, microbatch.real_tokens, microbatch.supervised_tokens) == (12, 10, 4)
    assert microbatch.padding_tokens == 14
    types = [microbatch.tokens, microbatch.labels, microbatch.positions, microbatch.cu_seqlens]
    assert [array.dtype.name for array in types] == ["int64", "int64", "int64", "int32"]


def test_every_document_says_its_source():
    first = in_memory([[1] * 3, [2] * 5, [3] * 3], name="mixed", sources=[1, 0, 1])
    second = in_memory([[4] * 9, [5] * 2], name="single")
    loader = small_loader(first, second, seq_len=12, micro_batch_size=3, global_batch_size=5, shuffle=False)
    assert loader.source_names == ["mixed0", "mixed1", "single"]
    (microbatch,) = loader.next_step()
    assert microbatch.sample_ids == [(1, 0), (0, 1), (0, 0), (0, 2), (1, 1)]
    assert microbatch.document_lengths.tolist() == [9, 5, 3, 3, 2, 0]
    assert microbatch.document_sources.tolist() == [2, 0, 1, 1, 2, -1]
    assert microbatch.document_sources.dtype == np.int32


def test_sources_of_one_name_are_told_apart():
    runs = [in_memory([[1]], name=name) for name in ("a/data", "b/data", "b/data", "c")]
    for index in runs:
        index.source_names = [Path(index.path).name]
    assert small_loader(*runs).source_names == ["a/data: data", "b/data: data", "b/data: data (2)", "c"]


@pytest.mark.parametrize("unit", ["conversations", "sequences"])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_every_token_and_label_of_an_epoch_comes_out_once(unit, micro_batch_size):
    index = _random_index(97)
    loader = small_loader(index, batch_unit=unit, micro_batch_size=micro_batch_size, global_batch_size=5)
    for epoch in range(2):
        microbatches = _flat(loader.next_step() for _ in range(loader.steps_in_epoch(epoch)))
        assert sorted(_ids(microbatches)) == [(0, document) for document in range(97)]
        for microbatch in microbatches:
            assert len(microbatch.tokens) == 16 * micro_batch_size == microbatch.cu_seqlens[-1]
            assert not (microbatch.cu_seqlens % 4).any() and (np.diff(microbatch.cu_seqlens) > 0).all()
            for (_, document), start in zip(microbatch.sample_ids, _starts(microbatch, index), strict=True):
                length, begin = index.lengths[document], index.spans(document)[0, 0]
                assert (microbatch.tokens[start : start + length] == index.tokens(document)).all()
                labelled = np.flatnonzero(microbatch.loss_mask[start : start + length]) + 1
                assert labelled.tolist() == list(range(max(begin, 1), length))
                labels = microbatch.labels[start : start + length][labelled - 1]
                assert (labels == index.tokens(document)[labelled]).all()
    assert (loader.epoch, loader.consumed) == (2, 0)


def _starts(microbatch, index):
    """Where the real documents begin: padding documents are the ones made of token 0 alone."""
    return [start for start in microbatch.cu_seqlens[:-1] if microbatch.tokens[start] != 0]


@pytest.mark.parametrize("unit", ["conversations", "sequences"])
def test_ranks_share_out_the_same_steps_whatever_the_layout(unit):
    index = _random_index(61)
    whole = [sorted(step) for step in _epoch(small_loader(index, batch_unit=unit))]
    for dp_size, micro_batch_size, multiple in [(1, 2, 1), (2, 1, 4), (4, 2, 1), (3, 1, 2)]:
        layout = dict(dp_size=dp_size, micro_batch_size=micro_batch_size, microbatch_multiple=multiple)
        ranks = [small_loader(index, batch_unit=unit, **layout, dp_rank=rank) for rank in range(dp_size)]
        for number, expected in enumerate(whole):
            steps = [loader.next_step() for loader in ranks]
            assert sorted(_flat(map(_ids, steps))) == expected
            (microbatches,) = {len(step) for step in steps}
            bins = len(small_loader(index, batch_unit=unit).step(0, number))
            least = -(-bins // (dp_size * micro_batch_size))
            assert microbatches == -(-least // multiple) * multiple


def test_each_epoch_and_seed_has_an_order_of_its_own():
    index = _random_index(40)
    orders = [_epoch(small_loader(index, seed=seed), epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert len({json.dumps(order) for order in orders}) == 4
    assert orders[0] == _epoch(small_loader(index, seed=1), 0)


def test_the_order_does_not_change_between_versions():
    """Written down once: a changed order would make every resumed run silently repeat data."""
    batches = [[document for _, document in step] for step in _epoch(small_loader(in_memory([[1]] * 10)))]
    assert batches == [[5, 1, 6, 2], [4, 3, 7, 0], [8, 9]]


def test_unshuffled_data_keep_their_order():
    loader = small_loader(in_memory([[1]] * 6), in_memory([[1]] * 5, name="more"), shuffle=False)
    expected = [(0, document) for document in range(6)] + [(1, document) for document in range(5)]
    assert _flat(_epoch(loader)) == _flat(_epoch(loader, 3)) == expected


@pytest.mark.parametrize("unit", ["conversations", "sequences"])
@pytest.mark.parametrize("stop", [3, 10, 17])
def test_a_run_continues_in_the_same_order_under_another_layout(unit, stop):
    sources = (_random_index(33), 0.7), (_random_index(20, seed=1, name="more"), 1.5)
    settings = dict(batch_unit=unit, global_batch_size=4)
    straight = small_loader(*sources, **settings)
    expected = [sorted(_ids(straight.next_step())) for _ in range(24)]

    first = small_loader(*sources, **settings)
    for _ in range(stop):
        first.next_step()
    state = json.loads(json.dumps(first.state_dict()))
    ranks = [small_loader(*sources, **settings, dp_rank=r, dp_size=2, micro_batch_size=2) for r in range(2)]
    for loader in ranks:
        loader.next_step()  # what was prepared ahead must not survive the load
        loader.load_state_dict(state)
    resumed = [sorted(_flat(_ids(loader.next_step()) for loader in ranks)) for _ in range(24 - stop)]
    assert resumed == expected[stop:]


def test_the_state_counts_what_was_handed_out():
    loader = small_loader(_random_index(10))
    seen = []
    for _ in range(4):
        seen.append((loader.state_dict()["epoch"], loader.state_dict()["consumed"]))
        loader.next_step()
    assert seen == [(0, 0), (0, 1), (0, 2), (1, 0)]


@pytest.mark.parametrize(
    ("flag", "change"),
    [
        ("--seq-len", {"seq_len": 32}),
        ("--batch-unit", {"batch_unit": "sequences"}),
        ("--global-batch-size", {"global_batch_size": 8}),
        ("--pad-documents-to", {"pad_documents_to": 2}),
        ("--seed", {"seed": 8}),
    ],
)
def test_a_state_of_another_order_is_refused(flag, change):
    state = small_loader(_random_index(9)).state_dict()
    with pytest.raises(ValueError, match=f"a changed {flag} \\(was .*, is .*\\): put it back"):
        small_loader(_random_index(9), **change).load_state_dict(state)


def test_a_state_of_other_data_or_weights_is_refused():
    state = small_loader(_random_index(9)).state_dict()
    with pytest.raises(ValueError, match=r"--data \(was \['of-data'\], is \['of-other'\]\)"):
        small_loader(_random_index(9, name="other")).load_state_dict(state)
    with pytest.raises(ValueError, match=r"the weights of --data \(was \[1.0\], is \[2.0\]\)"):
        small_loader((_random_index(9), 2)).load_state_dict(state)


def test_weights_are_exact_over_epochs():
    tenths, many = in_memory([[1]] * 10), in_memory([[2]] * 7, name="many")
    loader = small_loader((tenths, 0.3), (many, 2.5))
    seen = Counter()
    for epoch in range(10):
        ids = _flat(_epoch(loader, epoch))
        each = Counter(source for source, _ in ids)
        assert each[0] == 3 and each[1] == int(17.5 * (epoch + 1)) - int(17.5 * epoch)
        assert len(ids) == len({sample for sample in ids if sample[0] == 0}) + each[1]
        seen.update(ids)
        if epoch == 2:  # nine of ten were seen, none of them twice
            assert sum(seen[0, document] for document in range(10)) == 9
            assert max(seen[0, document] for document in range(10)) == 1
    assert [seen[0, document] for document in range(10)] == [3] * 10
    assert [seen[1, document] for document in range(7)] == [25] * 7


def test_an_epoch_that_is_empty_is_passed_over():
    loader = small_loader((in_memory([[1], [2]]), 0.2))
    assert [loader.steps_in_epoch(epoch) for epoch in range(6)] == [0, 0, 1, 0, 1, 0]
    assert len({_ids(loader.next_step())[0] for _ in range(2)}) == 2


def test_filler_bins_make_up_the_count_and_bear_nothing():
    index = in_memory([[1, 2, 3]])
    settings = dict(seq_len=1200, pad_documents_to=6, pad_token=5, dp_size=2, microbatch_multiple=2)
    for rank in range(2):
        step = small_loader(index, **settings, dp_rank=rank).next_step()
        assert [len(microbatch.sample_ids) for microbatch in step] == [1 - rank, 0]
        filler = step[1]
        assert filler.cu_seqlens.tolist() == [0, 516, 1032, 1200] and filler.max_seqlen == 516
        assert (filler.tokens == 5).all() and not filler.loss_mask.any() and not filler.labels.any()
        assert (filler.real_tokens, filler.supervised_tokens, filler.padding_tokens) == (0, 0, 1200)
        assert filler.positions.tolist() == [*range(516), *range(516), *range(168)]


def test_a_batch_without_supervision_has_no_labels():
    (microbatch,) = small_loader(in_memory([[1, 2, 3]], [[]])).next_step()
    assert not microbatch.loss_mask.any() and not microbatch.labels.any()
    assert (microbatch.supervised_tokens, microbatch.real_tokens) == (0, 3)


LONG = in_memory([[1, 2, 3], [4] * 20])


@pytest.mark.parametrize(
    ("sources", "changes", "sentence"),
    [
        ([LONG], {"seq_len": 18}, "--seq-len 18 is not a multiple .* 4; choose --seq-len 16 or 20"),
        ([LONG], {"seq_len": 2, "too_long": "drop"}, "choose --seq-len 4"),
        ([(LONG, 0)], {}, "--data data has weight 0; give one above 0"),
        ([(LONG, float("nan"))], {}, "--data data has weight nan"),
        ([in_memory([[1], []])], {}, "documents without a single token"),
        ([in_memory([[1] * 17])], {"too_long": "drop"}, "nothing to train on: it has 1 documents"),
        ([], {}, "nothing to train on"),
        ([LONG], {"batch_unit": "bins"}, "--batch-unit is 'bins'; choose one of sequences, conversations"),
        ([in_memory([[1]])], {"micro_batch_size": 0}, "--micro-batch-size is 0; it must be at least 1"),
        ([LONG], {"seed": -1}, "--seed is -1; it must be at least 0"),
    ],
)
def test_mistakes_get_one_sentence(sources, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        small_loader(*sources, **changes)


def test_no_token_outside_the_vocabulary_reaches_the_model():
    index, more = in_memory([[98, 98], [98] * 5]), in_memory([[1, 98], [2, 3, 99], [-1, 4]], name="more")
    settings = dict(vocab_size=99, shuffle=False, global_batch_size=3)
    for micro_batch_size in (1, 2):
        loader = small_loader(index, more, micro_batch_size=micro_batch_size, **settings)
        loader.step(0, 0)  # 98 is the last there is
        with pytest.raises(ValueError, match=r"--data more:[12] holds token (99|-1) and the model has 99 tokens"):
            loader.step(0, 1)
    small_loader(index, more, **{**settings, "vocab_size": 100}).step(0, 0)
    more.largest_sampled = 99
    with pytest.raises(ValueError, match="--data more holds token 99 and the model has 99 tokens; tokenise the data w"):
        small_loader(index, more, **settings)
