"""A tokenizer trained on the spot and chat templates of several kinds, for tests of the data path."""

import functools
import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|return|>", "<|call|>"]
SPECIAL += ["<|channel|>", "<|message|>"]
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CALLS = (
    "{% for call in message.tool_calls or [] %}\n<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
)
TOOLS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
CHATML = (
    TOOLS
    + "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    + CALLS
    + "<|im_end|>\n{% endfor %}"
    + PROMPT
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}" + PROMPT
)
STRIPPED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% elif m.role == 'assistant' and '</think>' not in m.content %}<think>\n\n</think>\n\n{{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}" + PROMPT
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|message|>\n\n{{ m.content | trim }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|message|>\n\n{% endif %}"
)
INSTRUCTIONS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
BETWEEN = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% if m.role == 'assistant' %}"
    "{{ eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHANNELS = (
    "{% if tools %}<|start|>developer<|message|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }}"
    "{% if m.role != 'assistant' %}<|message|>{{ m.content }}<|end|>"
    "{% elif m.tool_calls %}<|channel|>call {{ m.tool_calls[0].function.name }}<|message|>"
    "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% else %}{% if m.thinking and loop.last %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>assistant"
    "{% endif %}<|channel|>final<|message|>{{ m.content }}"
    "{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
HASHES = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
TEMPLATES = {
    "chatml": CHATML,
    "chatml without a generation prompt": CHATML.removesuffix(PROMPT),
    "chatml with generation markers": MARKED,
    "chatml, eos appended": CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
    "chatml, default system": "<|im_start|>system\nBe brief.<|im_end|>\n" + CHATML,
    "chatml, thinking prompted": CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"),
    "chatml, thinking stripped": STRIPPED,
    "header style": HEADERS,
    "instruction style": INSTRUCTIONS,
    "eos between turns": BETWEEN,
    "channels": CHANNELS,
    "no end": HASHES + "{% if add_generation_prompt %}### assistant:\n{% endif %}",
    "eos at the very end": (
        HASHES + "{% if add_generation_prompt %}### assistant:\n{% else %}{{ eos_token }}{% endif %}"
    ),
    "words as end": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}[done]\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    ),
}
WORDS = "how many apples are left after two? The answer is 42, so four more remain: \\boxed{4}. Think again!\n"


@functools.cache
def small_tokenizer(trim_offsets: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with pad equal to eos, and trimmed offsets, as many have them."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    backend.train_from_iterator([WORDS] * 20, trainer)
    backend.add_tokens([AddedToken("<greedy>", rstrip=True, lstrip=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=CHATML
    )


def chat(*turns: tuple[str, str]) -> dict:
    """A row of messages."""
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def tool_row() -> dict:
    """A row with a tool call as OpenAI's API writes it."""
    call = {"name": "add", "arguments": json.dumps({"x": "1+1", "n": 3})}
    return {
        "messages": [
            {"role": "user", "content": "Sum?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": call}],
            },
            {"role": "tool", "content": "2", "tool_call_id": "1"},
            {"role": "assistant", "content": "It is 2."},
        ],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
    }
