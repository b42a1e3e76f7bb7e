"""Exactly the assistant's turns are supervised, whatever the chat template does."""

import string

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data.preparation.conversation import Conversation, RowError
from data.preparation.encoder import ChatEncoder, Document
from data.preparation.formats import to_conversation
from data.preparation.tokenizer import load_tokenizer, tokenizer_fingerprint
from data.preparation.trained_on import TrainedOn
from tests.support.chatting import CHATML, SPECIAL, TEMPLATES, WORDS, chat, small_tokenizer, tool_row

TALK = chat(("user", " One? "), ("assistant", " First. \n"), ("user", "Two?"), ("assistant", "Second."))
CHATML_SPANS = [" First. \n<|im_end|>", "Second.<|im_end|>"]
SPANS = {
    "chatml": CHATML_SPANS,
    "chatml without a generation prompt": CHATML_SPANS,
    "chatml with generation markers": CHATML_SPANS,
    "chatml, eos appended": CHATML_SPANS,
    "chatml, default system": CHATML_SPANS,
    "chatml, thinking prompted": CHATML_SPANS,
    "chatml, thinking stripped": [CHATML_SPANS[0], "<think>\n\n</think>\n\nSecond.<|im_end|>"],
    "header style": ["First.<|end|>", "Second.<|end|>"],
    "instruction style": [" First. </s>", " Second. </s>"],
    "eos between turns": [" First. \n</s>", "Second.</s>"],
    "channels": [
        "<|channel|>final<|message|> First. \n<|end|>",
        "<|channel|>final<|message|>Second.<|return|>",
    ],
    "no end": [" First. \n", "Second."],
    "eos at the very end": [" First. \n", "Second.\n\n</s>"],
    "words as end": ["  First. \n[done]", " Second.[done]"],
}
END_TOKENS = {
    "header style": ["<|end|>"],
    "instruction style": ["</s>"],
    "eos between turns": ["</s>"],
    "channels": ["<|return|>", "<|call|>"],
    "no end": [],
    "eos at the very end": ["</s>"],
    "words as end": [],
}


def render(template: str, messages: list[dict]) -> str:
    """What transformers makes of the messages."""
    return small_tokenizer().apply_chat_template(messages, chat_template=template, tokenize=False)


def encode(row: dict, template: str = CHATML, tokenizer=None, options=None) -> Document | RowError:
    return ChatEncoder(tokenizer or small_tokenizer(), template, options=options).encode([to_conversation(row)])[0]


def supervised(document: Document | RowError, tokenizer=None) -> list[str]:
    assert isinstance(document, Document), document
    return [(tokenizer or small_tokenizer()).decode(document.tokens[first:stop]) for first, stop in document.spans]


@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_spans_of_every_template(name, trim_offsets):
    tokenizer = small_tokenizer(trim_offsets)
    document = encode(TALK, TEMPLATES[name], tokenizer)
    assert supervised(document, tokenizer) == SPANS[name]
    expected = tokenizer.apply_chat_template(TALK["messages"], chat_template=TEMPLATES[name], return_dict=False)
    np.testing.assert_array_equal(document.tokens, expected)
    assert document.open_turns == {"no end": 2, "eos at the very end": 1}.get(name, 0)
    assert (document.straddling, document.rewritten) == (0, 0)


@pytest.mark.parametrize("name", TEMPLATES)
def test_end_token_ids(name):
    tokens = small_tokenizer().convert_ids_to_tokens(ChatEncoder(small_tokenizer(), TEMPLATES[name]).end_token_ids())
    assert tokens == END_TOKENS.get(name, ["<|im_end|>"])


def test_mask_is_that_of_generation_markers():
    """The markers that some templates have are not needed; what transformers makes of them is the same."""
    tokenizer, template = small_tokenizer(trim_offsets=False), TEMPLATES["chatml with generation markers"]
    document = encode(TALK, template, tokenizer)
    expected = tokenizer.apply_chat_template(
        TALK["messages"], chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    mask = np.zeros(len(document.tokens), dtype=int)
    for first, stop in document.spans:
        mask[first:stop] = 1
    assert mask.tolist() == expected["assistant_masks"]
    assert 0 < mask.sum() < len(mask)


@pytest.mark.parametrize("kind", ["metaspace", "prepend"])
def test_spans_of_tokenizers_without_bytes(kind):
    """SentencePiece's ways of writing spaces, one of which puts one before every piece of text."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", *SPECIAL],
        initial_alphabet=list(string.printable),
        show_progress=False,
    )
    backend.train_from_iterator([WORDS] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    for name in ("chatml", "header style", "instruction style", "no end"):
        spans = supervised(encode(TALK, TEMPLATES[name], tokenizer), tokenizer)
        assert spans == SPANS[name], name


def test_tool_calls_are_supervised_and_results_are_not():
    call = '<tool_call>\n{"name": "add", "arguments": {"x": "1+1", "n": 3}}\n</tool_call>'
    assert supervised(encode(tool_row())) == [f"{call}<|im_end|>", "It is 2.<|im_end|>"]
    assert supervised(encode(tool_row(), TEMPLATES["channels"])) == [
        '<|channel|>call add<|message|>{"x": "1+1", "n": 3}<|call|>',
        "<|channel|>final<|message|>It is 2.<|return|>",
    ]
    refused = encode(tool_row(), TEMPLATES["header style"])  # which writes no tool calls
    assert isinstance(refused, RowError) and refused.reason == "left out by the chat template"


def test_a_turn_whose_thinking_the_template_leaves_out():
    thought = "<think>\nhm\n</think>\n\nYes."
    row = chat(("user", "a"), ("assistant", thought), ("user", "b"), ("assistant", thought))
    document = encode(row, TEMPLATES["chatml, thinking stripped"])
    assert supervised(document) == [f"{thought}<|im_end|>"]  # else it would learn to answer without a thought
    assert (document.rewritten, document.stripped_turns) == (0, 1)
    asked = encode(row, TEMPLATES["chatml, thinking stripped"], options=TrainedOn(stripped_thinking=True))
    assert supervised(asked) == ["Yes.<|im_end|>", f"{thought}<|im_end|>"]
    assert (asked.rewritten, asked.stripped_turns) == (1, 0)
    prompted = encode(row, TEMPLATES["chatml, thinking prompted"])  # what the prompt says is not to be learned
    assert supervised(prompted) == ["hm\n</think>\n\nYes.<|im_end|>"] * 2
    assert (prompted.rewritten, prompted.stripped_turns) == (0, 0)


def test_text_that_looks_like_the_template_misleads_nothing():
    fake = "x<|im_end|>\n<|im_start|>assistant\nfake<|im_end|>\n"
    row = chat(("system", fake), ("user", fake), ("assistant", fake), ("user", "b"), ("assistant", "c"))
    assert supervised(encode(row)) == [fake + "<|im_end|>", "c<|im_end|>"]
    thinking = encode(row, TEMPLATES["chatml, thinking stripped"])  # located by marks
    assert supervised(thinking) == [fake + "<|im_end|>", "<think>\n\n</think>\n\nc<|im_end|>"]


CONTENTS = st.lists(
    st.sampled_from(
        [
            "a",
            "é",
            "😀",
            " ",
            "\n",
            "</think>",
            "<think>",
            "<|im_end|>",
            "</s>",
            "### user:",
            "[done]",
            "Alpha",
            "<greedy>",
        ]
    ),
    min_size=1,
    max_size=6,
).map("".join)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(TEMPLATES)),
    contents=st.lists(CONTENTS.filter(str.strip), min_size=2, max_size=5),
)
def test_turns_are_whole_with_and_without_rendering(name, contents):
    if name == "chatml, thinking stripped":  # which leaves nothing of a turn that is all thinking
        assume(all(content.split("</think>")[-1].strip() for content in contents[1::2]))
    finder = ChatEncoder(small_tokenizer(), TEMPLATES[name]).finders["default"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    text, turns = finder.locate(Conversation(messages))
    rendered = finder.template.render(messages)
    assert rendered.text == text == render(TEMPLATES[name], messages)
    assert finder._turns(rendered, messages, {}) == turns
    assert [turn.message for turn in turns] == list(range(1, len(contents), 2))
    if "thinking" not in name:
        for turn, content in zip(turns, contents[1::2], strict=True):
            assert content.strip() in text[turn.start : turn.end]


def test_tokens_on_a_boundary():
    header = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    header += "{% if add_generation_prompt %}assistant: {% endif %}"
    document = encode(chat(("user", "how"), ("assistant", "apples")), header)
    assert supervised(document) == [" apples</s>"]  # one token holds the header's space and the word
    assert document.straddling == 1
    greedy = CHATML.replace("<|im_start|>{{ message.role }}\n", "<greedy>{{ message.role }}<greedy>")
    greedy = greedy.replace("<|im_start|>assistant\n", "<greedy>assistant<greedy>").replace(
        "<|im_end|>\n", "<|im_end|>"
    )
    document = encode(chat(("user", "how"), ("assistant", "  apples")), greedy)
    assert supervised(document) == ["apples<|im_end|>"]  # the header's token swallows the spaces, and stays out
    assert document.straddling == 0


def test_characters_of_several_tokens_and_padding_like_eos():
    document = encode(chat(("user", "é"), ("assistant", "😀é</s>")))
    assert supervised(document) == ["😀é</s><|im_end|>"]
    assert small_tokenizer().pad_token_id in document.tokens[slice(*document.spans[0])]


def test_refusals():
    def reason(row, template=CHATML):
        refused = encode(row, template)
        assert isinstance(refused, RowError)
        return refused.reason

    with_system = chat(("system", "s"), ("user", "u"), ("assistant", "a"))
    raising = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    assert reason(with_system, raising) == "refused by the chat template"
    silent = CHATML.replace("for message in messages", "for message in messages if message.role != 'system'")
    assert reason(with_system, silent) == "left out by the chat template"
    no_tools = CHATML.replace("if tools", "if false")
    assert reason(tool_row(), no_tools) == "left out by the chat template"
    thoughts = chat(("user", "u"), ("assistant", "<think>a</think>b"), ("user", "v"))
    assert reason(thoughts, TEMPLATES["chatml, thinking stripped"]) == "thinking left out by the chat template"
    assert reason(chat(("user", "\ud800"), ("assistant", "a"))) == "not Unicode"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            "shows no assistant turn to train on",
        ),
        ("{% for m in messages %}", "not Jinja"),
        ("{{ raise_exception('never') }}", "never"),
    ],
)
def test_templates_that_cannot_be_trained_on(template, message):
    with pytest.raises(ValueError, match=message):
        ChatEncoder(small_tokenizer(), template)


def test_developer_is_system_where_a_template_knows_no_other_name():
    row = chat(("developer", "d"), ("user", "u"), ("assistant", "a"))
    tokenizer = small_tokenizer()
    assert tokenizer.decode(encode(row).tokens).startswith("<|im_start|>system\nd")
    knowing = CHATML + "{# developer #}"
    assert tokenizer.decode(encode(row, knowing).tokens).startswith("<|im_start|>developer\nd")


def test_fingerprint_and_template_survive_saving(tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    assert loaded.chat_template == CHATML
    (tmp_path / "other.jinja").write_text(TEMPLATES["header style"])
    other = load_tokenizer(str(tmp_path), tmp_path / "other.jinja")
    assert other.chat_template == TEMPLATES["header style"]
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(tokenizer)  # the template is no part of it
    other.add_tokens(["<more>"])
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)


def test_missing_template_or_tokenizer_names_the_mend(tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template is None
    with pytest.raises(ValueError, match="no chat template: give one with --chat-template, a file or a name"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="no tokenizer could be loaded from"):
        load_tokenizer(str(tmp_path / "nowhere"))


def test_a_name_of_an_assistant_is_no_name_of_its_call():
    row = tool_row()
    named = {**row, "messages": [{**message, "name": "Ann"} for message in row["messages"]]}
    assert supervised(encode(named)) == supervised(encode(row))


def test_a_call_whose_arguments_are_not_written_is_dropped():
    bare = CHATML.replace("{{ call.function | tojson }}", "{{ call.function.name }}")
    refused = encode(tool_row(), bare)
    assert str(refused) == "left out by the chat template: the arguments of call 0 of message 1"


def test_a_template_that_cannot_count_with_what_a_row_gives_it_refuses_the_row():
    row = {**TALK, "chat_template_kwargs": {"parts": 0}}
    refused = encode(row, "{{ 1 / (parts if parts is defined else 1) }}" + CHATML)
    assert isinstance(refused, RowError) and refused.reason == "refused by the chat template"
