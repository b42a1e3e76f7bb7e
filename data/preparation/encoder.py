"""Conversations -> token documents with the spans of tokens that are supervised.

The whole rendered text is tokenised once, without special tokens of the tokenizer's own (the template
writes them), and the assistant's turns are carried over from characters to tokens.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer

from data.preparation.chat_template import ChatTemplate
from data.preparation.conversation import Conversation, RowError
from data.preparation.turns import Turn, TurnFinder

BATCH_CHARACTERS = 1 << 19  # an encoding takes about a hundred bytes for each token


@dataclass(frozen=True)
class Document:
    """One tokenised conversation."""

    tokens: np.ndarray  # int32 [length]
    spans: np.ndarray  # int32 [n, 2], half-open, sorted, disjoint
    open_turns: int = 0  # assistant's turns that the template ends with nothing
    straddling: int = 0  # supervised tokens that hold characters outside their turn too
    rewritten: int = 0  # assistant's turns whose content is not in the text as it was given


class ChatEncoder:
    """Tokenises conversations with a tokenizer and its chat template, or the one given as text.

    Raises ValueError where there is no template, or none that can be trained on.
    """

    def __init__(self, tokenizer, chat_template: str | None = None, now: datetime | None = None):
        source = chat_template or template_of(tokenizer)
        backend = _backend(tokenizer)
        added = [token.content for token in backend.get_added_tokens_decoder().values()]
        self.finder = TurnFinder(ChatTemplate(source, tokenizer.special_tokens_map, now), added)
        self._added_ids = frozenset(backend.get_added_tokens_decoder())
        # Byte-level post-processors trim the spaces off the offsets; nothing else is asked of one here.
        self._encoder = Tokenizer.from_str(backend.to_str())
        self._encoder.no_truncation()
        self._encoder.no_padding()
        self._encoder.post_processor = None  # type: ignore[assignment]

    def encode(self, conversations: Sequence[Conversation]) -> list[Document | RowError]:
        """A document, or the reason why there is none, for each conversation."""
        results: list[Document | RowError] = []
        located: list[tuple[int, str, list[Turn]]] = []
        for index, conversation in enumerate(conversations):
            try:
                text, turns = self.finder.locate(conversation.messages, conversation.tools)
                text.encode()
                located.append((index, text, turns))
                results.append(RowError("not encoded"))  # its place, filled below
            except RowError as error:
                results.append(error)
            except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can hold
                results.append(RowError("not Unicode", str(error)))
        for batch in _batches(located):
            encodings = self._encoder.encode_batch([text for _, text, _ in batch], add_special_tokens=False)
            for (index, text, turns), encoding in zip(batch, encodings, strict=True):
                results[index] = self._document(encoding, text, turns, conversations[index])
        return results

    def end_token_ids(self) -> list[int]:
        """See the function of this name."""
        ends = [self.finder.end_text if self.finder.end_is_token else None, self.finder.call_end()]
        ids = map(self._encoder.token_to_id, dict.fromkeys(filter(None, ends)))
        return [number for number in ids if number is not None]  # none is: they are added tokens

    def _document(
        self, encoding: Encoding, text: str, turns: list[Turn], conversation: Conversation
    ) -> Document | RowError:
        tokens = np.array(encoding.ids, dtype=np.int32)
        spans: list[tuple[int, int]] = []
        straddling = 0
        for turn in turns:
            first, stop, shared = self._tokens_of(encoding, text, turn.start, turn.end)
            first = max(first, spans[-1][1] if spans else 0)  # turns that meet inside one token
            straddling += shared
            if first < stop:
                spans.append((first, stop))
        if not spans:
            return RowError("nothing to supervise", "no token of the text belongs to an assistant's turn")
        answers = [message for message in conversation.messages if message["role"] == "assistant"]
        return Document(
            tokens,
            np.array(spans, dtype=np.int32),
            open_turns=sum(not turn.closed for turn in turns),
            straddling=straddling,
            rewritten=sum(map(_is_rewritten, answers, [text] * len(turns), turns)),
        )

    def _tokens_of(self, encoding: Encoding, text: str, start: int, end: int) -> tuple[int, int, int]:
        """Tokens [first, stop) that hold characters of [start, end), and how many of them hold others too.

        An added token belongs where its own text lies: one that swallows the spaces beside it (`rstrip`) is
        not drawn into a turn by them.
        """
        first, stop = _token_at(encoding, start, len(text)), _token_at(encoding, end, len(text))
        shared = set()
        left, right = _characters(encoding, first), _characters(encoding, stop)
        if left and left[0] < start:
            if self._is_outside(encoding.ids[first], text, left, start, end):
                first += 1
            else:
                shared.add(first)
        if right and right[0] < end and not self._is_outside(encoding.ids[stop], text, right, start, end):
            shared.add(stop)
            stop += 1
        return first, stop, len(shared)

    def _is_outside(self, token: int, text: str, place: tuple[int, int], start: int, end: int) -> bool:
        if token not in self._added_ids:
            return False
        covered = text[place[0] : place[1]]
        core = place[0] + len(covered) - len(covered.lstrip())
        return not start <= core < end


def _is_rewritten(answer: dict, text: str, turn: Turn) -> bool:
    """Whether the turn lacks something its message says; its header may have begun it (<think>)."""
    said = [answer.get(name, "").strip() for name in ("content", "reasoning_content")]
    return any(text.find(one, max(0, turn.start - len(one)), turn.end) < 0 for one in said)


def _token_at(encoding: Encoding, character: int, characters: int) -> int:
    """The first token that holds the character, or else the next character that any token holds."""
    for place in range(character, characters):
        token = encoding.char_to_token(place)
        if token is not None:
            return token
    return len(encoding)


def _characters(encoding: Encoding, token: int) -> tuple[int, int] | None:
    return encoding.token_to_chars(token) if token < len(encoding) else None


def _batches(located: list[tuple[int, str, list[Turn]]]):
    batch, size = [], 0
    for item in located:
        batch.append(item)
        size += len(item[1])
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def template_of(tokenizer) -> str:
    """The tokenizer's own chat template. Raises ValueError where it has none."""
    template = tokenizer.chat_template
    if isinstance(template, list):  # the older way of keeping several
        template = {one["name"]: one["template"] for one in template}
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template: give one with"
            " --chat-template FILE.jinja, or the tokenizer of a chat model with --tokenizer"
        )
    return template


def load_tokenizer(name: str, chat_template: Path | None = None):
    """The tokenizer of a directory or hub name, with the template that is to be used. Raises ValueError."""
    from transformers import AutoTokenizer  # a second to import, which readers of an index need not spend

    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        raise ValueError(f"no tokenizer could be loaded from {name}: there is no such directory")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"no tokenizer could be loaded from {name}: {reason}") from error
    _backend(tokenizer)
    if chat_template is None:
        tokenizer.chat_template = template_of(tokenizer)
    elif not chat_template.is_file():
        raise ValueError(f"--chat-template {chat_template}: there is no such file")
    else:
        tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
    return tokenizer


def tokenizer_fingerprint(tokenizer) -> str:
    """A hash of vocabulary, merges and added tokens: equal where the same pieces have the same ids.

    Pre-tokenisation, chat template and special token names are no part of it, and saving and loading do not change it.
    """
    backend = json.loads(_backend(tokenizer).to_str())
    model = backend["model"]
    added = sorted((token["id"], token["content"]) for token in backend["added_tokens"])
    content = [model.get("vocab"), model.get("merges"), added]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def end_token_ids(tokenizer, chat_template: str | None = None) -> list[int]:
    """Ids of the tokens with which the template ends an assistant's turn, for `generation_config`.

    The one after an answer comes first, then the one after a tool call where it differs. Empty where the
    template ends turns with nothing, or with text that is no token of this tokenizer.
    """
    return ChatEncoder(tokenizer, chat_template).end_token_ids()


def _backend(tokenizer) -> Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise ValueError(f"the tokenizer of {name} has no fast version (tokenizer.json), which offsets need")
    return backend
