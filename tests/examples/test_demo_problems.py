"""The demo's data is honest (held-out operands never seen), right, and fit for its tokenizer and model."""

import json
import random
import re

import pytest
import torch

from examples.demo.model import build_demo_model
from examples.demo.problems import draw_problems, make_problems, worked_answer, write_problems


@pytest.fixture(scope="module")
def problems():
    return make_problems()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return build_demo_model(tmp_path_factory.mktemp("demo") / "model", seed=3)


def question(row: dict) -> str:
    """The user's turn."""
    return row["messages"][0]["content"]


def operands(row: dict) -> frozenset[int]:
    """The pair of numbers in a problem, whichever comes first."""
    numbers = [int(number) for number in re.findall(r"\d+", question(row))]
    assert len(numbers) == 2
    return frozenset(numbers)


def test_there_are_enough_distinct_problems_and_held_out_operands_are_never_trained_on(problems):
    train, heldout = problems
    assert (len(train), len(heldout)) == (24_000, 512)
    assert len({question(row) for row in train + heldout}) == 24_512
    assert not {operands(row) for row in train} & {operands(row) for row in heldout}
    assert len({operands(row) for row in train}) == 3_686, "nine tenths of the 4,095 pairs, all of them used"


def test_every_answer_is_right_and_worked_out_in_true_steps(problems):
    signs = {"+": 0, "-": 0}
    for row in problems[0] + problems[1]:
        answer = row["messages"][1]["content"]
        sums = re.findall(r"([\d+-]+)=(\d+)", answer)
        assert len(sums) == 2
        for left, right in sums:
            terms = re.findall(r"[+-]?\d+", left)
            assert sum(map(int, terms)) == int(right), answer
        sign = "+" if "+" in answer else "-"
        signs[sign] += 1
        first, second = (int(number) for number in re.findall(r"\d+", question(row)))
        assert row["expected_answer"] == str(first + second if sign == "+" else first - second)
        assert answer.endswith(f"\\boxed{{{row['expected_answer']}}}")
    assert abs(signs["+"] - signs["-"]) < 100, "drawn in turn; only repeated draws are left out"


def test_worked_answers_spell_carry_and_borrow():
    assert worked_answer(47, 38, "+") == r"7+8=15, carry 1. 4+3+1=8. \boxed{85}"
    assert worked_answer(62, 46, "-") == r"12-6=6, borrow 1. 6-4-1=1. \boxed{16}"
    assert worked_answer(99, 99, "+") == r"9+9=18, carry 1. 9+9+1=19. \boxed{198}"
    assert worked_answer(50, 50, "-") == r"0-0=0. 5-5=0. \boxed{0}"
    for wrong in ((5, 20, "+"), (20, 30, "-"), (20, 30, "*")):
        with pytest.raises(ValueError, match="operands|negative|operation"):
            worked_answer(*wrong)


def test_the_seed_decides(problems, tmp_path):
    assert make_problems() == problems
    assert make_problems(train=100, heldout=10, seed=1)[0] != make_problems(train=100, heldout=10, seed=2)[0]
    train, heldout = write_problems(tmp_path, train=30, heldout=7)
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    assert (len(rows), len(heldout.read_text().splitlines())) == (30, 7)
    assert set(rows[0]) == {"messages", "expected_answer"}


def test_more_problems_than_there_are_is_refused():
    with pytest.raises(ValueError, match="1 pairs of operands hardly give 2500 distinct problems"):
        draw_problems([(10, 11)], 2_500, random.Random(0))
    assert len(draw_problems([(10, 11)], 1_000, random.Random(0))) == 1_000


def test_the_tokenizer_splits_digits_and_conversations_are_short(problems, model_dir):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    plain = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    lengths = []
    for row in problems[0][:1_000]:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        # transformers puts its own pre-tokenizer in the place of the one in the file, by the model's type.
        assert ids == plain.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
        lengths.append(len(ids))
    assert max(lengths) <= 64
    assert 40 < sum(lengths) / len(lengths) < 56
    assert tokenizer.tokenize("4785") == ["4", "7", "8", "5"]
    assert len(tokenizer) <= 512


def test_the_model_suits_every_layout_and_starts_from_random_weights(model_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    state = torch.random.get_rng_state()
    again = build_demo_model(tmp_path / "again", seed=3)
    other = build_demo_model(tmp_path / "other", seed=4)
    assert torch.equal(state, torch.random.get_rng_state())
    weights = [(path / "model.safetensors").read_bytes() for path in (model_dir, again, other)]
    assert weights[0] == weights[1] != weights[2]
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    config = model.config
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_575_552
    assert config.num_attention_heads % 8 == config.num_key_value_heads % 8 == 0
    assert config.hidden_size % 8 == config.intermediate_size % 8 == config.vocab_size % 128 == 0
    assert config.num_hidden_layers % 4 == 0
    assert model.generation_config.eos_token_id == config.eos_token_id == 2
