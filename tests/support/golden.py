"""Chat templates with the traits of the published ones, and conversations in which every word stands once."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_QWEN_CALLS = (
    "{% for call in m.tool_calls or [] %}{% if m.content or not loop.first %}{{ '\n' }}{% endif %}<tool_call>\n"
    "{{ '{\"name\": \"' + call.function.name + '\", \"arguments\": ' + call.function.arguments | tojson + '}' }}\n"
    "</tool_call>{% endfor %}"
)
# answers of tools that follow each other stand in one user turn
_QWEN_RESULTS = (
    "{% elif m.role == 'tool' %}{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
)
_QWEN_TOOLS = "{% if tools %}<|im_start|>system\n<tools>{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n</tools>"
_QWEN_TOOLS += "<|im_end|>\n{% endif %}"
_CHATML = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content }}" + _QWEN_CALLS
    + "<|im_end|>\n" + _QWEN_RESULTS
     + "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + _PROMPT
)  # fmt: skip
# the last question decides which turns keep their thinking; a user turn that is a tool's answer is none
_THINKING = (
    "{% set ns = namespace(last=messages | length - 1, open=true) %}{% for m in messages[::-1] %}"
    "{% if ns.open and m.role == 'user' and not (m.content.startswith('<tool_response>') and"
    " m.content.endswith('</tool_response>')) %}"
    "{% set ns.open = false %}{% set ns.last = messages | length - 1 - loop.index0 %}{% endif %}{% endfor %}"
    + _QWEN_TOOLS +
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% set thought = '' %}{% set said = m.content %}"
    "{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
    "{% elif '</think>' in m.content %}"
    "{% set thought = m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + said.lstrip('\n') }}"
    "{% else %}{{ said }}{% endif %}" + _QWEN_CALLS + "<|im_end|>\n" + _QWEN_RESULTS
    
    + "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)  # fmt: skip
_LLAMA = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ strftime_now('%d %b %Y') }}\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}"
    "<|eot_id|>{% for m in messages %}{% if m.tool_calls %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% set f = m.tool_calls[0].function %}"
    '{{ \'{"name": "\' + f.name + \'", "parameters": \' }}{{ f.arguments | tojson }}{{ "}" }}<|eot_id|>'
    "{% elif m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>"
    "{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if tools and loop.first %}{{ tools | tojson }}\n\n{% endif %}{{ m.content | trim }}<|eot_id|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_TULU = (
    "{{ START }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>\n' + m.content + eos_token }}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% else %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
_OLMO3 = (
    "{% if messages | selectattr('role', 'equalto', 'system') | list | length == 0 %}<|im_start|>system\nBe kind."
    "{% if tools %}<functions>{{ tools | tojson }}</functions>{% endif %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if m.get('content', none) is not none %}{{ m.content }}{% endif %}"
    "{% if m.get('function_calls', none) is not none %}"
    "{{ '<function_calls>' + m.function_calls + '</function_calls>' }}{% elif m.get('tool_calls') %}<function_calls>"
    "{% for call in m.tool_calls %}{% set ns = namespace(pairs=[]) %}"
    "{% for key, value in call.function.arguments.items() %}"
    "{% set ns.pairs = ns.pairs + [key ~ '=' ~ (value | tojson)] %}{% endfor %}"
    "{{ call.function.name + '(' + ns.pairs | join(', ') + ')' }}{% if not loop.last %}{{ '\n' }}{% endif %}"
    "{% endfor %}"
    "</function_calls>{% endif %}{% if loop.last %}{{ eos_token }}{% else %}<|im_end|>\n{% endif %}"
    "{% elif m.role in ('environment', 'tool') %}<|im_start|>environment\n{{ m.content }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.role == 'system' and tools %}"
    "<functions>{{ tools | tojson }}</functions>{% elif m.get('functions') %} <functions>{{ m.functions }}</functions>"
    "{% endif %}<|im_end|>\n{% endif %}{% endfor %}" + _PROMPT
)
_HARMONY = (
    "{% set last = namespace(name=none) %}<|start|>system<|message|>Reasoning: low<|end|>"
    "{% if tools or messages[0].role == 'system' %}<|start|>developer<|message|>"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "{% for t in tools or [] %}\ntype {{ t.function.name }} = {{ t.function.parameters | tojson }}{% endfor %}<|end|>"
    "{% endif %}{% for m in messages %}{% if m.role == 'assistant' and 'tool_calls' in m %}"
    "{% set later = messages[loop.index:] | rejectattr('tool_calls', 'defined')"
    " | selectattr('role', 'equalto', 'assistant') | list %}"
    "{% set thought = m.content or m.thinking %}{% if thought and not later %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + thought + '<|end|>' }}{% endif %}"
    "<|start|>assistant to={{ 'functions.' + m.tool_calls[0].function.name }}<|channel|>commentary json<|message|>"
    "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>{% set last.name = m.tool_calls[0].function.name %}"
    "{% elif m.role == 'assistant' %}{% if loop.last and 'thinking' in m %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}"
    "{% elif m.role == 'tool' %}<|start|>functions.{{ last.name }} to=assistant<|channel|>commentary<|message|>"
    "{{ m.content | tojson }}<|end|>"
    "{% elif m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and loop.index0 == 0 %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST]{% if first and loop.first %}{{ first + '\n\n' }}{% endif %}{{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[TOOL_CALLS][{% for call in m.tool_calls %}{{ call.function | tojson }}"
    "{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% else %}{{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Golden:
    """A template, and what an independent reader of its text needs to know."""

    template: str
    headers: tuple[str, ...]  # what stands before a turn, the longest first
    ends: tuple[str, ...]  # what ends one
    eos: str = "<|im_end|>"
    calls: int = 0  # how many calls a turn may have
    content_beside_call: bool = True
    keeps: str = "nothing"  # of thinking: "nothing", "last" (after the last question)
    prompt_thinks: bool = False


_IM = ("<|im_start|>assistant\n",)
GOLDEN = {
    "ChatML": Golden(_QWEN_TOOLS + _CHATML, _IM, ("<|im_end|>",), calls=9),
    "Qwen2.5": Golden(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
        + _QWEN_TOOLS + _CHATML, _IM, ("<|im_end|>",), calls=9,
    ),
    "Qwen3": Golden(_THINKING + _PROMPT, _IM, ("<|im_end|>",), calls=9, keeps="last"),
    "Qwen3-Thinking": Golden(
        _THINKING + _PROMPT.replace("assistant\n", "assistant\n<think>\n"), (*(f"{h}<think>\n" for h in _IM), *_IM),
        ("<|im_end|>",), calls=9, keeps="last", prompt_thinks=True,
    ),
    "Llama 3.1": Golden(
        _LLAMA, ("<|start_header_id|>assistant<|end_header_id|>\n\n",), ("<|eot_id|>",), "<|eot_id|>", calls=1,
        content_beside_call=False,
    ),
    "Tulu 3": Golden(_TULU.replace("{{ START }}", ""), ("<|assistant|>\n",), ("<|endoftext|>",), "<|endoftext|>"),
    "OLMo 2": Golden(
        _TULU.replace("START", "bos_token"), ("<|assistant|>\n",), ("<|endoftext|>",), "<|endoftext|>"
    ),
    "OLMo 3": Golden(_OLMO3, _IM, ("<|im_end|>", "<|endoftext|>"), "<|endoftext|>", calls=9),
    "Harmony": Golden(
        _HARMONY, ("<|start|>assistant",), ("<|end|>", "<|return|>", "<|call|>"), "<|return|>", calls=1,
        content_beside_call=False, keeps="last",
    ),
    "Mistral": Golden(
        _MISTRAL, ("[/INST]", "[/TOOL_RESULTS]"), ("</s>",), "</s>", calls=9, content_beside_call=False
    ),
}  # fmt: skip
_ADDED = "<s> </s> <|im_start|> <|im_end|> <|endoftext|> <|eot_id|> <|start_header_id|> <|end_header_id|> <|start|>"
_ADDED += (
    " <|end|> <|return|> <|call|> <|channel|> <|message|> <tool_call> </tool_call> <think> </think> [INST] [/INST]"
)
_ADDED += " <tool_response> </tool_response> [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS] <function_calls>"


@functools.cache
def golden_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Bytes and whole special tokens: every character of a text is known from its tokens."""
    golden = GOLDEN[name]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=_ADDED.split(),
        show_progress=False,
    )
    backend.train_from_iterator(["the assistant says that all is well"] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=golden.eos, chat_template=golden.template
    )


def call(word: str | None, number: int = 0) -> dict:
    arguments = {"city": word} if word else {}
    return {
        "id": f"call{number:05d}",
        "type": "function",
        "function": {"name": "weather", "arguments": arguments},
    }


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def _user(word: str) -> dict:
    return {"role": "user", "content": word}


def _says(word: str, *calls: dict, thinks: str | None = None) -> dict:
    message = {"role": "assistant", "content": word, **({"tool_calls": list(calls)} if calls else {})}
    return message if thinks is None else {**message, "reasoning_content": thinks}


def _tool(word: str, number: int = 0) -> dict:
    return {"role": "tool", "content": word, "tool_call_id": f"call{number:05d}", "name": "weather"}


CONVERSATIONS = {
    "single": [_user("Alder?"), _says("Birch.")],
    "several": [_user("Alder?"), _says("Birch."), _user("Cedar?"), _says("Dogwood.")],
    "system": [{"role": "system", "content": "Elm."}, _user("Alder?"), _says("Birch.")],
    "assistant first": [_says("Birch."), _user("Alder?"), _says("Cedar.")],
    "assistant twice": [_user("Alder?"), _says("Birch."), _says("Cedar.")],
    "thinking": [_user("Alder?"), _says("Birch.", thinks="Fir.")],
    "thinking twice": [_user("Alder?"), _says("Birch.", thinks="Fir."), _user("Cedar?"), _says("Dog.", thinks="Gum.")],
    "call": [_user("Alder?"), _says("", call("Birch")), _tool("Cedar"), _says("Dogwood.")],
    "call without arguments": [_user("Alder?"), _says("", call(None)), _tool("Cedar"), _says("Dogwood.")],
    "call at the end": [_user("Alder?"), _says("", call("Birch"))],
    "call beside content": [_user("Alder?"), _says("Elm.", call("Birch")), _tool("Cedar"), _says("Dogwood.")],
    "chained calls": [
        _user("Alder?"), _says("", call("Birch")), _tool("Cedar"), _says("", call("Elm", 1)), _tool("Fir", 1),
        _says("Gum."),
    ],
    "parallel calls": [
        _user("Alder?"), _says("", call("Birch"), call("Elm", 1)), _tool("Cedar"), _tool("Fir", 1), _says("Gum."),
    ],
    "a user who quotes a tool": [_user("<tool_response>\nAlder\n</tool_response>"), _says("Birch.")],
}  # fmt: skip
