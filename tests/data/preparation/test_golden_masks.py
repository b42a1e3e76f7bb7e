"""Masks of ten kinds of chat template, against a reader of the text that knows nothing of how turns are found."""

import importlib.util
import re
from pathlib import Path

import pytest

from data.preparation.conversation import RowError
from data.preparation.encoder import ChatEncoder, Document
from data.preparation.formats import to_conversation
from tests.support.golden import CONVERSATIONS, GOLDEN, TOOLS, Golden, golden_tokenizer

CASES = [(name, kind) for name in GOLDEN for kind in CONVERSATIONS]


def row_of(kind: str) -> dict:
    return {"messages": CONVERSATIONS[kind], **({"tools": TOOLS} if "call" in kind else {})}


def expected_spans(golden: Golden, kind: str, text: str) -> list[str]:
    """The turns by their words, each of which stands in the text once."""
    messages, spans = CONVERSATIONS[kind], []
    last_question = max(number for number, message in enumerate(messages) if message["role"] == "user")
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        thought = message.get("reasoning_content")
        stripped = thought is not None and (golden.keeps == "nothing" or number < last_question)
        if stripped and not golden.prompt_thinks:
            continue
        calls = message.get("tool_calls", [])
        arguments = [word for call in calls for word in call["function"]["arguments"].values()]
        names = ['weather"', "weather(", "functions.weather"]  # the calls, and not the tool's description
        words = [
            *([thought] if thought and not stripped else []),
            *([message["content"]] if message["content"] else []),
        ]
        words += arguments
        if calls and not arguments:
            words += [name for name in names if name in text[text.index("Alder") :]][:1]
        first, last = (text.index(words[0], text.index("Alder") if calls else 0), text.rindex(words[-1]))
        if calls and not arguments:
            last = first
        headers = [text.rfind(header, 0, first) + len(header) for header in golden.headers if header in text[:first]]
        ends = [text.find(end, last) + len(end) for end in golden.ends if text.find(end, last) >= 0]
        spans.append(text[max(headers) : min(ends)])
    return spans


def refusal(golden: Golden, kind: str) -> str | None:
    """The reason for which this template cannot take the conversation, as its traits have it."""
    if "thinking" in kind and golden.keeps == "nothing":
        return "thinking left out by the chat template"
    if kind == "parallel calls" and golden.calls == 1:
        return "refused by the chat template" if "one call at a time" in golden.template else "left out"
    if "call" in kind and not golden.calls:
        return "left out by the chat template"
    if kind == "call beside content" and not golden.content_beside_call:
        return "left out by the chat template"
    no_header = ("assistant first", "assistant twice") if golden is GOLDEN["Mistral"] else ()
    return "turns cannot be located" if kind in no_header else None


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_masks(name, kind):
    golden, tokenizer = GOLDEN[name], golden_tokenizer(name)
    conversation = to_conversation(row_of(kind))
    (document,) = ChatEncoder(tokenizer).encode([conversation])
    reason = refusal(golden, kind)
    if reason is not None:
        assert isinstance(document, RowError) and document.reason.startswith(reason)
        return
    assert isinstance(document, Document), document
    rendered = tokenizer.apply_chat_template(
        conversation.messages, tools=conversation.tools, return_dict=False, tokenize=True
    )
    assert document.tokens.tolist() == rendered
    spans = [tokenizer.decode(document.tokens[first:stop]) for first, stop in document.spans]
    assert spans == expected_spans(golden, kind, tokenizer.decode(document.tokens))
    assert document.open_turns == document.straddling == 0


TRL = importlib.util.find_spec("trl")
TRL_TEMPLATES = sorted(Path(TRL.origin).parent.glob("chat_templates/*_training.jinja")) if TRL and TRL.origin else []


@pytest.mark.skipif(not TRL_TEMPLATES, reason="trl is not installed")
@pytest.mark.parametrize("path", TRL_TEMPLATES, ids=lambda path: path.stem)
def test_masks_of_published_training_templates(path):
    """Where a template marks what is trained, the mask is what transformers makes of the marks."""
    source, tokenizer = path.read_text(encoding="utf-8"), golden_tokenizer("ChatML")
    tokenizer.add_tokens(sorted(set(re.findall(r"<[|｜/]?[\w▁|｜]+>", source))), special_tokens=True)
    try:
        encoder = ChatEncoder(tokenizer, source)
    except ValueError as error:  # templates for pictures, which take no text as content
        pytest.skip(str(error))
    compared = 0
    for kind in CONVERSATIONS:
        conversation = to_conversation(row_of(kind))
        (document,) = encoder.encode([conversation])
        if isinstance(document, RowError):
            continue
        wanted = tokenizer.apply_chat_template(
            conversation.messages, tools=conversation.tools, chat_template=source, return_dict=True,
            return_assistant_tokens_mask=True,
        )  # fmt: skip
        mask = [0] * len(document.tokens)
        for first, stop in document.spans:
            mask[first:stop] = [1] * (stop - first)
        assert (document.tokens.tolist(), mask) == (wanted["input_ids"], wanted["assistant_masks"]), kind
        compared += 1
    assert compared >= 3
