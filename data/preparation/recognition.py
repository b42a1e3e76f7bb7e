"""Which format a row has, by its columns, and whether its text has been through a chat template already."""

import functools
import re
from collections.abc import Iterable

from data.preparation.columns import COMPLETION, PAIRS, Fields
from data.preparation.conversation import RowError
from data.preparation.messages import MESSAGES

# an instruction, what it is about, and the answer to it, under the names that are taken without being told
INSTRUCTION, ABOUT, ANSWERS = "instruction", ("input", "context"), ("output", "response")
TEXT = "text"
_HALVES = (*(name for pair in (*PAIRS, COMPLETION) for name in pair), INSTRUCTION, *ANSWERS)
_TAG = re.compile(r"<(/?)(\w{2,})>")


@functools.lru_cache(maxsize=256)
def recognised(columns: tuple[str, ...], fields: Fields, prompted: bool, system: bool) -> str:
    """The format of a row with these columns, not counting those that hold null.

    Where a prompt or a field's name asks for a question, messages are not taken. Raises RowError where several fit.
    """
    there = {*columns}
    asks = prompted or fields != Fields()
    has_messages = not there.isdisjoint(MESSAGES)
    if fields.messages or (has_messages and not asks):
        return "messages"
    if fields.question or fields.answer:
        return "question_answer"
    found = {}
    pairs = [pair for pair in PAIRS if {*pair} <= there]
    if INSTRUCTION in there and not there.isdisjoint(ANSWERS):
        found["alpaca"] = INSTRUCTION
        pairs = [pair for pair in pairs if not {*pair} & {*ABOUT, *ANSWERS}]
    if {*COMPLETION} <= there:
        found["prompt_completion"] = "/".join(COMPLETION)
    if pairs:
        found["question_answer"] = " or ".join("/".join(pair) for pair in pairs)
    if len(found) > 1:
        choices = ", ".join(f"{names} ({kind})" for kind, names in found.items())
        raise RowError("ambiguous fields", f"the row has {choices}: choose one with --format")
    if not found and has_messages:
        raise RowError(
            "unknown fields", "--prompt or --fields.* asks for a question and an answer, the row has messages"
        )
    # not where half of a pair stands beside the text, whose other half has some other name
    if TEXT in there and there.isdisjoint(_HALVES) and not (found or asks or system):
        return "text"
    return next(iter(found), "question_answer")


def marker(special_tokens: Iterable[str]) -> re.Pattern[str]:
    """Finds the special tokens of which a template builds its turns.

    Left out are tags that stand in contents, in pairs, such as `<think>` and `</think>`, and tokens that are ordinary
    text: a row does not become suspicious by them.
    """
    tokens = set(special_tokens)
    building = [token for token in tokens if len(token) > 2 and not token.isalnum() and not _is_tag(token, tokens)]
    return re.compile("|".join(map(re.escape, sorted(building, key=len, reverse=True))) or "(?!)")


def _is_tag(token: str, tokens: set[str]) -> bool:
    found = _TAG.fullmatch(token)
    return found is not None and {f"<{found.group(2)}>", f"</{found.group(2)}>"} <= tokens


def is_rendered(text: str, markers: re.Pattern[str]) -> bool:
    """Whether a text begins with a token of the template's and holds a second one: a mere mention does not."""
    first = markers.match(text, len(text) - len(text.lstrip()))
    return first is not None and markers.search(text, first.end()) is not None
