"""The demo's model: a small transformer with random weights and a tokenizer trained on the problems.

Its shape stands in `model.json` and suits every layout up to eight ways of tensor parallelism: eight
attention heads, eight key-value heads, and widths that divide by eight.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from examples.demo.problems import make_problems

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer over `texts` in which every digit is a token of its own.

    It has at most `vocab_size` tokens; the model's embedding may be larger than the tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def build_demo_model(directory: str | Path, seed: int = 0) -> Path:
    """Write a Hugging Face directory with random weights, tokenizer and chat template; return its path.

    The same seed gives the same weights; the tokenizer is always trained on the same problems. The random
    state of the caller is left as it was.
    """
    directory = Path(directory)
    fields = json.loads(Path(__file__).with_name("model.json").read_text(encoding="utf-8"))
    rows, _ = make_problems(train=2_000, heldout=0)
    texts = (f"{message['role']}\n{message['content']}" for row in rows for message in row["messages"])
    tokenizer = train_tokenizer(texts, fields["vocab_size"])
    return write_model(directory, fields, tokenizer, seed)


def write_model(directory: Path, fields: dict, tokenizer: PreTrainedTokenizerFast, seed: int) -> Path:
    """Write a Hugging Face directory with random weights of the shape in `fields`; return its path."""
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(**fields, **ends)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
