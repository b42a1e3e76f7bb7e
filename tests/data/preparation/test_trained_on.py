"""Which turns are trained: all, the last, those that a row allows, without what a program printed."""

import time
from dataclasses import replace

import numpy as np
import pytest

from data.preparation.conversation import Conversation, RowError
from data.preparation.encoder import ChatEncoder, Document
from data.preparation.formats import to_conversation
from data.preparation.trained_on import TrainedOn
from data.preparation.turns import _marked_turns
from tests.support.chatting import CHATML, TEMPLATES, chat, small_tokenizer
from tests.support.golden import CONVERSATIONS, TOOLS, call, golden_tokenizer

TALK = to_conversation(chat(("user", "One?"), ("assistant", "First."), ("user", "Two?"), ("assistant", "Second.")))


def encoded(conversation: Conversation, template: str = CHATML, **options) -> Document | RowError:
    return ChatEncoder(small_tokenizer(), template, options=TrainedOn(**options)).encode([conversation])[0]


def spans(document: Document | RowError) -> list[str]:
    assert isinstance(document, Document), document
    return [small_tokenizer().decode(document.tokens[first:stop]) for first, stop in document.spans]


@pytest.mark.parametrize("template", [CHATML, TEMPLATES["chatml with generation markers"]])
def test_the_last_turn_alone(template):
    document = encoded(TALK, template, turns="last")
    assert spans(document) == ["Second.<|im_end|>"] and document.untrained_turns == 1


def test_every_token():
    document = encoded(TALK, turns="all")
    assert document.spans.tolist() == [[0, len(document.tokens)]]
    without = encoded(replace(TALK, untrained=frozenset({1})), turns="all")
    assert "First." not in "".join(spans(without)) and without.untrained_turns == 1
    assert sum(map(len, spans(without))) == len(small_tokenizer().decode(document.tokens)) - len("First.<|im_end|>")


def test_turns_that_a_row_leaves_out():
    document = encoded(replace(TALK, untrained=frozenset({1})))
    assert spans(document) == ["Second.<|im_end|>"] and document.untrained_turns == 1
    refused = encoded(replace(TALK, untrained=frozenset({1, 3})))
    assert isinstance(refused, RowError) and refused.reason == "nothing to supervise"


@pytest.mark.parametrize(
    ("answer", "kept", "masked"),
    [
        ("Run.\n```output\n4\n```\nSo 4.", ["Run.\n", "So 4.<|im_end|>"], 1),
        ("```output\n```\nNone.", ["None.<|im_end|>"], 1),
        (
            "a\n```output\n1\n```\n```system\nRemaining code executions: 11.\n```\nb\n```output\nx\ny\n```\n",
            ["a\n", "b\n", "<|im_end|>"],
            3,
        ),
        ("<tool_response>\n5\n</tool_response>\nFive.", ["Five.<|im_end|>"], 1),
        ("```python\nprint(1)\n```", ["```python\nprint(1)\n```<|im_end|>"], 0),
        ("an open ```output\n4", ["an open ```output\n4<|im_end|>"], 0),
    ],
)
def test_what_a_program_printed_is_left_out(answer, kept, masked):
    conversation = to_conversation(chat(("user", "```output\nq\n```"), ("assistant", answer)))
    document = encoded(conversation, mask_tool_output=True)
    assert spans(document) == kept and document.masked_tool_outputs == masked
    assert spans(encoded(conversation)) == [answer + "<|im_end|>"]


def test_arguments_of_the_template_for_all_rows_and_for_one():
    template = CHATML.replace("{{ message.content }}", "{{ message.content }}{{ mood | default('') }}")
    assert spans(encoded(TALK, template, template_args={"mood": "!"})) == ["First.!<|im_end|>", "Second.!<|im_end|>"]
    one = replace(TALK, template_args={"mood": "?"})
    assert spans(encoded(one, template, template_args={"mood": "!"})) == ["First.?<|im_end|>", "Second.?<|im_end|>"]


def test_rendered_text_keeps_its_own_mask():
    text = "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"
    conversation = Conversation([], text=text, trained=((text.index("So."), len(text)),), kind="rendered")
    document = encoded(conversation)
    assert spans(document) == ["So.<|im_end|>\n"]
    assert document.tokens.tolist() == small_tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_plain_text_is_trained_whole_to_its_end():
    encoder = ChatEncoder(small_tokenizer_without_template())
    text, chatting = encoder.encode([Conversation([], text="how many", trained=((0, 8),), kind="text"), TALK])
    assert isinstance(text, Document) and text.spans.tolist() == [[0, len(text.tokens)]]
    assert small_tokenizer().decode(text.tokens) == "how many</s>"
    assert isinstance(chatting, RowError) and chatting.reason == "no chat template"
    assert encoder.end_token_ids() == [small_tokenizer().eos_token_id]


def small_tokenizer_without_template():
    return small_tokenizer().__class__(tokenizer_object=small_tokenizer().backend_tokenizer, eos_token="</s>")


def test_hashes_tell_questions_and_conversations_apart():
    first, again, other = (
        encoded(to_conversation(chat(("user", question), ("assistant", answer))))
        for question, answer in (("a", "b"), ("a", "c"), ("d", "b"))
    )
    assert first.prompt_hash == again.prompt_hash != other.prompt_hash
    assert len({first.text_hash, again.text_hash, other.text_hash}) == 3


def test_generation_markers_are_the_mask_and_are_said():
    marked = TEMPLATES["chatml with generation markers"]
    encoder = ChatEncoder(small_tokenizer(), marked)
    assert encoder.notes == ["the chat template marks what is trained ({% generation %}), and those marks are the mask"]
    assert ChatEncoder(small_tokenizer()).notes == []
    thought = {"role": "assistant", "content": "b", "reasoning_content": "hidden"}
    row = {"messages": [{"role": "user", "content": "a"}, thought]}
    document = encoded(to_conversation(row), marked)
    assert spans(document) == ["b<|im_end|>"] and document.rewritten == 1


def test_generation_markers_are_read_in_linear_time():
    finder = ChatEncoder(small_tokenizer(), TEMPLATES["chatml with generation markers"]).finders["default"]

    def seconds(turns: int) -> float:
        pair = [{"role": "user", "content": "a", "name": "x"}, {"role": "assistant", "content": "b", "name": "y"}]
        rendered = finder.template.render(pair * turns)
        times = []
        for _ in range(3):
            start = time.process_time()
            assert len(_marked_turns(rendered, finder.learned)) == turns
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(4000) < 40 * max(seconds(400), 1e-4)  # 10 times as much; squares would be 100


def test_arguments_of_rows_are_not_remembered_without_end(monkeypatch):
    monkeypatch.setattr("data.preparation.turns._HELD", 3)
    encoder = ChatEncoder(small_tokenizer(), CHATML)
    pair = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [Conversation(pair, template_args={"number": number}) for number in range(9)]
    assert {len(document.tokens) for document in encoder.encode(rows)} == {len(encoder.encode(rows)[0].tokens)}
    assert len(encoder.finders["default"]._learned) <= 4


@pytest.mark.parametrize("name", ["Qwen2.5", "Qwen3", "OLMo 3"])
def test_long_exchanges_with_tools_are_located_whole(name):
    messages = [CONVERSATIONS["single"][0]]
    for number in range(100):
        messages.append({"role": "assistant", "content": "", "tool_calls": [call(f"City{number}")]})
        messages.append({"role": "tool", "content": "rain", "name": "weather", "tool_call_id": "call00000"})
    tokenizer = golden_tokenizer(name)
    (document,) = ChatEncoder(tokenizer).encode(
        [Conversation([*messages, {"role": "assistant", "content": "Done."}], TOOLS)]
    )
    assert isinstance(document, Document) and len(document.spans) == 101
    texts = [tokenizer.decode(document.tokens[first:stop]) for first, stop in document.spans]
    assert all(f"City{number}" in text for number, text in enumerate(texts[:-1])) and "Done." in texts[-1]
    assert np.all(document.spans[1:, 0] >= document.spans[:-1, 1])
