"""The answer that a solution states, found without parsing any mathematics."""

import re

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_SENTENCE = re.compile(r"(?i)\b(?:the )?(?:final )?answer is:?\s*([^\n]+)")


def last_boxed(text: str) -> str | None:
    r"""What stands in the last complete `\boxed{...}`; None where there is none or it is empty.

    Braces are balanced; an escaped brace counts for nothing: `\boxed{\{1, 2\}}` gives `\{1, 2\}`.
    """
    for match in reversed(list(_BOXED.finditer(text))):
        depth, place = 1, match.end()
        while place < len(text) and depth:
            if text[place] == "\\":
                place += 1
            else:
                depth += {"{": 1, "}": -1}.get(text[place], 0)
            place += 1
        if not depth:
            return text[match.end() : place - 1].strip() or None
    return None


def stated_answer(text: str) -> str | None:
    r"""The answer of a worked solution: last `\boxed{}`, else last `#### x`, else "The answer is x"."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    if hashes := _HASHES.findall(text):
        return hashes[-1].strip()
    if sentences := _SENTENCE.findall(text):
        return sentences[-1].strip().rstrip(".").strip() or None
    return None


def tidy(answer: str) -> str:
    """An answer without what does not change it: outer dollars, blanks, full stop, commas in thousands."""
    answer = answer.strip().strip("$").strip().rstrip(".").strip()
    return answer.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", answer) else answer
