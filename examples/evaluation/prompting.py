"""Messages -> the token ids a model is asked with, and the ids that end its answer."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.evaluation.options import EvaluationError, EvaluationOptions
from examples.evaluation.questions import Question

# Stands for an answer when the template is asked how it ends one; no template is likely to change it.
PROBE = "probe"


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What generation needs beside the model: `ids` per question, `eos` ids, the `pad` id."""

    ids: list[list[int]]
    eos: list[int]
    pad: int
    warnings: list[str]


def load_tokenizer(options: EvaluationOptions) -> Any:
    """The model's tokenizer, with the chat template it is asked through.

    Raises `EvaluationError` where there is no tokenizer or no chat template.
    """
    from transformers import AutoTokenizer

    from data.preparation.tokenizer import read_template

    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EvaluationError(f"--model {options.model} cannot be loaded: {first}") from error
    if options.chat_template is not None:
        try:
            tokenizer.chat_template = read_template(options.chat_template)
        except ValueError as error:
            raise EvaluationError(str(error)) from error
    if not tokenizer.chat_template:
        raise EvaluationError(f"--model {options.model} has no chat template; give one with --chat-template FILE.jinja")
    return tokenizer


def build_prompts(tokenizer: Any, questions: list[Question], options: EvaluationOptions) -> Prompts:
    """Render and tokenize every question with the chat template, up to where the answer begins."""
    ids = []
    for question in questions:
        try:
            text = tokenizer.apply_chat_template(question.messages, add_generation_prompt=True, tokenize=False)
        # A template is a foreign program: what it raises is its own affair.
        except Exception as error:
            raise EvaluationError(
                f"--data {options.data}, row {question.index + 1}: the chat template refused it ({error})"
            ) from error
        ids.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    eos = _eos_ids(options.model, tokenizer)
    warnings = []
    turn_end = _turn_end(tokenizer)
    if turn_end is not None and turn_end not in eos:
        warnings.append(
            f"warning: the chat template ends a turn with {tokenizer.convert_ids_to_tokens(turn_end)!r} "
            f"({turn_end}), but generation stops only at {eos}: answers may run on to --max-new-tokens"
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0]
    return Prompts(ids=ids, eos=eos, pad=pad, warnings=warnings)


def _eos_ids(model: str, tokenizer: Any) -> list[int]:
    """Where generation stops: by generation_config.json, else config.json, else the tokenizer."""
    from transformers import AutoConfig, GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        found = None
    if found is None:
        # Read as plain JSON where it is at hand: an architecture unknown here is no reason to fail yet.
        config = Path(model) / "config.json"
        fields = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else None
        if fields is None:
            found = AutoConfig.from_pretrained(model, trust_remote_code=False).eos_token_id
        else:
            found = fields.get("eos_token_id")
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        raise EvaluationError(f"--model {model} names no end-of-sequence token: its answers would never end")
    return [found] if isinstance(found, int) else list(found)


def _turn_end(tokenizer: Any) -> int | None:
    """The first special token that the template puts after an answer; None where there is none."""
    turns = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    # A template that refuses two plain turns tells nothing here; the rows themselves are rendered above.
    except Exception:
        return None
    after = tokenizer(text[text.rindex(PROBE) + len(PROBE) :], add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((token for token in after if token in special), None)
