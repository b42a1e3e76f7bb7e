"""Tokenizers of every kind are loaded as they are meant, and cut texts as their makers do."""

import io
import itertools
import json

import pytest
import sentencepiece
from transformers import AutoTokenizer

from data.preparation.encoder import ChatEncoder, Document
from data.preparation.formats import to_conversation
from data.preparation.tokenizer import load_tokenizer, templates_of, text_ends
from tests.support.chatting import CHATML, WORDS, chat, small_tokenizer, tool_row

TEXTS = ["how many apples", "two  spaces", " before", "after ", "a\nb", "é 😀", "x", "\n\n"]


def sentencepiece_model(folder, **options) -> sentencepiece.SentencePieceProcessor:
    """Trains a SentencePiece model into `folder`, which then holds nothing but tokenizer.model."""
    written = io.BytesIO()
    lines = [f"{WORDS.strip()} {number}" for number in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, vocab_size=340, byte_fallback=True, minloglevel=2,
        hard_vocab_limit=False, user_defined_symbols=["<|im_start|>", "<|im_end|>"], **options,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


@pytest.mark.parametrize(
    ("kind", "rule", "takes_together", "prefix"),
    list(itertools.product(["bpe", "unigram"], ["nmt_nfkc", "identity"], [True, False], [True, False])),
)
def test_a_sentencepiece_model_alone(tmp_path, kind, rule, takes_together, prefix):
    model = sentencepiece_model(
        tmp_path, model_type=kind, normalization_rule_name=rule, remove_extra_whitespaces=takes_together,
        add_dummy_prefix=prefix,
    )  # fmt: skip
    tokenizer = load_tokenizer(str(tmp_path), needs_template=False)
    assert [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS] == [
        model.encode(text) for text in TEXTS
    ]
    encoder = ChatEncoder(tokenizer, CHATML)
    (document,) = encoder.encode([to_conversation(chat(("user", "how many"), ("assistant", "four apples")))])
    assert isinstance(document, Document)
    ((first, stop),) = document.spans
    assert tokenizer.decode(document.tokens[first:stop]).strip() == "four apples<|im_end|>"


def test_templates_by_name_are_picked_as_transformers_does():
    tokenizer = small_tokenizer()
    named = {"default": CHATML, "tool_use": CHATML.replace("<tool_call>", "<use>"), "rag": "{{ documents }}"}
    encoder = ChatEncoder(tokenizer, named)
    plain, tools = encoder.encode(
        [to_conversation(chat(("user", "a"), ("assistant", "b"))), to_conversation(tool_row())]
    )
    assert "<use>" not in tokenizer.decode(plain.tokens) and "<use>" in tokenizer.decode(tools.tokens)
    conversation = to_conversation(tool_row())
    wanted = tokenizer.apply_chat_template(
        conversation.messages, tools=conversation.tools, chat_template=tokenizer.get_chat_template(
            named["tool_use"], conversation.tools), return_dict=False
    )  # fmt: skip
    assert tools.tokens.tolist() == wanted
    with pytest.raises(ValueError, match="no chat template"):
        templates_of(type("Nameless", (), {"chat_template": {"rag": "x"}, "name_or_path": ""}))


def test_templates_by_name_survive_loading(tmp_path):
    tokenizer = small_tokenizer().__class__(tokenizer_object=small_tokenizer().backend_tokenizer, eos_token="</s>")
    tokenizer.chat_template = {"default": CHATML, "tool_use": CHATML + "{# tools #}"}
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).chat_template == tokenizer.chat_template


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="the directory has none of tokenizer.json"):
        load_tokenizer(str(tmp_path))
    small_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--chat-template tulip: there is no such file, and no template of that name"):
        load_tokenizer(str(tmp_path), "tulip")
    with pytest.raises(ValueError, match="--chat-template {{ messages }}{{ messages }}.*: there is no such file"):
        load_tokenizer(str(tmp_path), "{{ messages }}" * 30)
    (tmp_path / "latin.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"--chat-template .*latin.jinja: not UTF-8 at byte 3: save the file"):
        load_tokenizer(str(tmp_path), tmp_path / "latin.jinja")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=f"no tokenizer could be loaded from {tmp_path}"):
        load_tokenizer(str(tmp_path))


def test_what_stands_around_a_text():
    begin, end = text_ends(small_tokenizer())
    assert (begin.tolist(), end.tolist()) == ([], [small_tokenizer().eos_token_id])


@pytest.mark.parametrize("named", ["TokenizersBackend", "PreTrainedTokenizerFast"])
def test_the_generic_class_is_what_transformers_chooses(tmp_path, named):
    small_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": named}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 500}))
    loaded, chosen = load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(chosen)
    assert loaded.backend_tokenizer.to_str() == chosen.backend_tokenizer.to_str()
    assert loaded.special_tokens_map == chosen.special_tokens_map
