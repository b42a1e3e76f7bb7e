"""Documents that do not fit a packed sequence: refused, dropped, truncated or cut, and each counted."""

import dataclasses

import numpy as np
import pytest

from tests.support.loading import in_memory, small_loader

# 3, 20 and 17 tokens; the last one has nothing supervised
LONG = in_memory([[1, 2, 3], list(range(1, 21)), list(range(1, 18))], [[(1, 3)], [(4, 6), (12, 18)], []])


def epoch_ids(loader):
    steps = [loader.step(0, number) for number in range(loader.steps_in_epoch(0))]
    return sorted(sample for step in steps for microbatch in step for sample in microbatch.sample_ids)


def counted(loader) -> dict:
    """All counts that are not 0."""
    return {name: count for name, count in dataclasses.asdict(loader.counts).items() if count}


def test_too_long_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError) as error:
        small_loader(LONG)
    assert str(error.value) == (
        "2 of 3 documents are longer than --seq-len 16 (the longest has 20 tokens): raise --seq-len, "
        "or choose --too-long drop, truncate or cut."
    )


def test_too_long_dropped_is_counted():
    loader = small_loader(LONG, in_memory([[5] * 30, [5], [5] * 17, [5]], name="more"), too_long="drop")
    assert counted(loader) == {"documents": 7, "dropped": 4, "dropped_tokens": 84}
    assert str(loader.counts) == "7 documents, dropped 4, truncated 0"
    assert epoch_ids(loader) == [(0, 0), (1, 1), (1, 3)]


def test_too_long_truncated_keeps_its_end_token():
    loader = small_loader(LONG, too_long="truncate", shuffle=False, allow_unsupervised=True)
    assert counted(loader) == {"documents": 3, "truncated": 2, "truncated_tokens": 5, "unsupervised": 1}
    by_id = {microbatch.sample_ids[0]: microbatch for microbatch in loader.next_step()}
    cut = by_id[0, 1]  # cut within the span that ends with token 18
    assert cut.tokens.tolist() == [*range(1, 16), 18]
    assert np.flatnonzero(cut.loss_mask).tolist() == [3, 4, 11, 12, 13, 14] and cut.labels[14] == 18
    assert cut.real_tokens == 16 and cut.padding_tokens == 0
    unsupervised = by_id[0, 2]  # without a span its own last token ends it
    assert unsupervised.tokens.tolist() == [*range(1, 16), 17] and not unsupervised.loss_mask.any()


def test_truncation_outside_a_supervised_span_adds_no_supervision():
    index = in_memory([list(range(1, 31))], [[(2, 5), (20, 25)]])
    (microbatch,) = small_loader(index, too_long="truncate").next_step()
    assert microbatch.tokens.tolist() == [*range(1, 16), 25]
    assert np.flatnonzero(microbatch.loss_mask).tolist() == [1, 2, 3]


def test_truncation_to_nothing_supervised_is_refused_unless_allowed():
    # Of 16 tokens the last becomes the end token. What is supervised begins behind it, with it alone, one before it,
    # never, and in the first token, which nothing predicts; the last document is as long as a packed sequence.
    spans = [[(17, 20)], [(15, 20)], [(14, 20)], [], [(0, 1), (18, 19)], [(15, 16)]]
    index = in_memory([list(range(1, 21))] * 5 + [list(range(1, 17))], spans)
    with pytest.raises(ValueError) as error:
        small_loader(index, too_long="truncate")
    assert str(error.value) == (
        "--too-long truncate leaves 4 of 6 documents without a supervised token: raise --seq-len above 16, choose "
        "--too-long drop or cut, or give --allow-unsupervised to keep them."
    )
    loader = small_loader(index, too_long="truncate", allow_unsupervised=True, global_batch_size=6)
    assert counted(loader) == {"documents": 6, "truncated": 5, "truncated_tokens": 20, "unsupervised": 4}
    assert str(loader.counts) == "6 documents, dropped 0, truncated 5 (4 to nothing supervised)"
    found = {microbatch.sample_ids[0][1]: microbatch.supervised_tokens for microbatch in loader.next_step()}
    assert found == {0: 0, 1: 0, 2: 2, 3: 0, 4: 0, 5: 1}


def test_too_long_cut_is_counted_and_plain_text_is_always_cut():
    # 40 tokens, the middle one of three pieces has nothing supervised
    chat = in_memory([list(range(1, 41)), [1, 2]], [[(3, 9), (35, 40)], [(1, 2)]])
    loader = small_loader(chat, too_long="cut")
    expected = {"documents": 2, "cut": 1, "pieces": 2, "dropped_pieces": 1, "lost_tokens": 14}
    assert counted(loader) == expected
    assert str(loader.counts) == (
        "2 documents, dropped 0, truncated 0, cut 1 into 2 pieces (1 more dropped with nothing supervised)"
    )
    assert epoch_ids(loader) == [(0, 0), (0, 1), (0, 2)]

    text = in_memory([list(range(1, 41))], [[(1, 40)]], name="text")
    text.may_be_cut, text.meta = True, {"empty_sequences": 3}
    for too_long in ("error", "drop", "truncate", "cut"):
        loader = small_loader(text, too_long=too_long)
        assert counted(loader) == {"documents": 1, "empty": 3, "cut": 1, "pieces": 3, "repeated_tokens": 2}
        (microbatches,) = [loader.step(0, number) for number in range(loader.steps_in_epoch(0))]
        pairs = [np.stack((m.tokens, m.labels))[:, m.loss_mask] for m in microbatches]
        assert sorted(np.concatenate(pairs, axis=1).T.tolist()) == [[token, token + 1] for token in range(1, 40)]
    with pytest.raises(ValueError, match="1 of 3 documents are longer than --seq-len 16"):
        small_loader(text, chat)
    loader = small_loader(text, chat, too_long="drop")
    assert counted(loader) == {
        "documents": 3, "empty": 3, "cut": 1, "pieces": 3, "repeated_tokens": 2, "dropped": 1, "dropped_tokens": 40,
    }  # fmt: skip
    assert epoch_ids(loader) == [(0, 0), (0, 1), (0, 2), (1, 1)]


def test_nothing_left_and_nothing_to_predict():
    with pytest.raises(ValueError, match="it has 1 documents, of which 0 are dropped .* and 1 are cut into pieces wi"):
        small_loader(in_memory([[1] * 20], [[]]), too_long="cut")
    with pytest.raises(ValueError, match="--seq-len 1 leaves nothing to predict"):
        small_loader(in_memory([[1] * 20]), too_long="cut", seq_len=1, pad_documents_to=1)


def test_a_resumed_run_sees_another_cut():
    text = in_memory([list(range(1, 41)), [1, 2, 3]], [[(1, 40)], [(1, 3)]])
    state = small_loader(text, too_long="cut").state_dict()
    with pytest.raises(
        ValueError, match=r"--data \(was \['of-data, cut at 16'\], is \['of-data'\]\), --too-long \(was c"
    ):
        small_loader(text, too_long="truncate").load_state_dict(state)
    truncated = small_loader(text, too_long="truncate").state_dict()
    text.may_be_cut = True  # the same flags now mean something else
    with pytest.raises(ValueError, match=r"--data \(was \['of-data'\], is \['of-data, cut at 16'\]\): put it back"):
        small_loader(text, too_long="truncate").load_state_dict(truncated)
    small_loader(text, too_long="cut").load_state_dict(state)
