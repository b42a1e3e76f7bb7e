"""The chat templates and prompts that go by their names: masks, end tokens, texts, and the tables that list them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from data.preparation.conversation import RowError
from data.preparation.encoder import ChatEncoder
from data.preparation.formats import to_conversation
from data.preparation.prompt import load_prompt
from tests.data.preparation.test_golden_masks import expected_spans, refusal, row_of
from tests.support.golden import CONVERSATIONS, Golden, golden_tokenizer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TEMPLATES, PROMPTS = EXAMPLES / "chat_templates", EXAMPLES / "prompts"
IM, EOS = "<|im_end|>", "<|endoftext|>"
HEADER = {"im": "<|im_start|>assistant\n", "llama": "<|start_header_id|>assistant<|end_header_id|>\n\n"}
# the header and the ends of an assistant's turn, the tokenizer's eos, and how many calls a turn may have
TRAITS = {
    "chatml": (HEADER["im"], (IM,), IM, 0),
    "qwen": (HEADER["im"], (IM,), IM, 9),
    "llama3": (HEADER["llama"], ("<|eot_id|>",), "<|eot_id|>", 0),
    "olmo": (HEADER["im"], (IM, EOS), EOS, 9),
    "tulu": ("<|assistant|>\n", (EOS,), EOS, 0),
    "tulu_bos": ("<|assistant|>\n", (EOS,), EOS, 0),
}
TOKENIZERS = {IM: "ChatML", "<|eot_id|>": "Llama 3.1", EOS: "Tulu 3"}  # of tests.support.golden, by their eos


def golden(name: str) -> Golden:
    header, ends, eos, calls = TRAITS[name]
    return Golden((TEMPLATES / f"{name}.jinja").read_text(), (header,), ends, eos, calls=calls)


def listed(folder: Path) -> list[str]:
    """The names in the first column of a folder's table."""
    return re.findall(r"^\| `(\w+)` \|", (folder / "README.md").read_text(), flags=re.MULTILINE)


def test_the_tables_list_what_is_there():
    assert sorted(listed(TEMPLATES)) == sorted(path.stem for path in TEMPLATES.glob("*.jinja")) == sorted(TRAITS)
    prompts = [path.stem for path in PROMPTS.iterdir() if path.suffix != ".md"]
    assert sorted(listed(PROMPTS)) == sorted(prompts) == sorted(PROMPT_TEXTS)


@pytest.mark.parametrize("name", TRAITS)
def test_masks_of_our_templates(name):
    template, tokenizer = golden(name), golden_tokenizer(TOKENIZERS[TRAITS[name][2]])
    encoder = ChatEncoder(tokenizer, template.template)
    assert sorted(encoder.end_token_ids()) == sorted(tokenizer.convert_tokens_to_ids(list(template.ends)))
    for kind in CONVERSATIONS:
        conversation = to_conversation(row_of(kind))
        (document,) = encoder.encode([conversation])
        reason = refusal(template, kind)
        if reason is not None:
            assert isinstance(document, RowError) and document.reason.startswith(reason), kind
            continue
        assert not isinstance(document, RowError), (kind, document)
        rendered = tokenizer.apply_chat_template(
            conversation.messages, tools=conversation.tools, chat_template=template.template, return_dict=False
        )
        assert document.tokens.tolist() == rendered
        spans = [tokenizer.decode(document.tokens[first:stop]) for first, stop in document.spans]
        assert spans == expected_spans(template, kind, tokenizer.decode(document.tokens)), kind


SYSTEM, USER = {"role": "system", "content": "Elm."}, {"role": "user", "content": "Alder?"}


@pytest.mark.parametrize(
    ("name", "messages", "text"),
    [
        ("chatml", [USER], "<|im_start|>user\nAlder?<|im_end|>\n<|im_start|>assistant\n"),
        ("qwen", [USER], "<|im_start|>user\nAlder?<|im_end|>\n<|im_start|>assistant\n"),
        ("tulu", [SYSTEM, USER], "<|system|>\nElm.\n<|user|>\nAlder?\n<|assistant|>\n"),
        ("tulu_bos", [USER], "<s><|user|>\nAlder?\n<|assistant|>\n"),
        (
            "olmo",
            [SYSTEM, USER],
            "<|im_start|>system\nElm. <functions></functions><|im_end|>\n"
            "<|im_start|>user\nAlder?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "llama3",
            [USER],
            "<s><|start_header_id|>user<|end_header_id|>\n\nAlder?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ],
)
def test_what_a_model_is_asked_through_our_templates(name, messages, text):
    tokenizer = golden_tokenizer("Tulu 3")
    template = (TEMPLATES / f"{name}.jinja").read_text()
    assert tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    ) == text  # fmt: skip


def test_rows_that_hold_functions_as_text():
    """Of the kind that open-instruct's olmo template was made for."""
    messages = [
        SYSTEM | {"functions": "[weather]"},
        USER,
        {"role": "assistant", "content": None, "function_calls": 'weather(city="Birch")'},
        {"role": "environment", "content": "Cedar"},
        {"role": "assistant", "content": "Dogwood."},
    ]
    text = golden_tokenizer("OLMo 3").apply_chat_template(
        messages, chat_template=(TEMPLATES / "olmo.jinja").read_text(), tokenize=False
    )
    assert text == (
        "<|im_start|>system\nElm. <functions>[weather]</functions><|im_end|>\n<|im_start|>user\nAlder?<|im_end|>\n"
        '<|im_start|>assistant\n<function_calls>weather(city="Birch")</function_calls><|im_end|>\n'
        "<|im_start|>environment\nCedar<|im_end|>\n<|im_start|>assistant\nDogwood.<|endoftext|>"
    )


PROMPT_TEXTS = {
    "math": "Solve the following math problem. Put the answer (and only answer) inside \\boxed{}.\n\n{1}",
    "openmath_tir": "Solve the following math problem. While you reason, you may run Python code up to 12 times.\n"
    "Put the answer (and only answer) inside \\boxed{}.\n\n{1}",
    "genselect": "{1}",
    "openmathinstruct2": "Think step by step and solve this problem. Give the final answer inside \\boxed{}.\n\n{1}",
}


@pytest.mark.parametrize("name", PROMPT_TEXTS)
def test_texts_of_our_prompts(name):
    row = {"problem": "{1}", "generated_solution": "Remaining code executions: 11 Remaining code executions: 10"}
    assert load_prompt(name).messages(row) == [{"role": "user", "content": PROMPT_TEXTS[name]}]
