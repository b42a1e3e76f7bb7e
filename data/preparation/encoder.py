"""Conversations -> token documents with the spans of tokens that are supervised.

The whole rendered text is tokenised once, without special tokens of the tokenizer's own (the template
writes them), and what is trained is carried over from characters to tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from data.preparation.chat_template import ChatTemplate
from data.preparation.conversation import Conversation, RowError
from data.preparation.tokenizer import backend_of, templates_of, text_ends
from data.preparation.trained_on import TrainedOn, choose_turns
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
    untrained_turns: int = 0  # assistant's turns that the row, or the choice of turns, leaves out
    stripped_turns: int = 0  # those left out because the template leaves out their thinking
    masked_tool_outputs: int = 0  # blocks of tool output inside assistant's turns
    prompt_hash: bytes = b""  # of the text before the first turn that its row wants trained
    text_hash: bytes = b""  # of the whole text


class ChatEncoder:
    """Tokenises conversations with a tokenizer and its chat template, or the one given as text.

    Without a template it takes text alone; `hashed` says whether documents get their hashes. Raises ValueError for a
    template that cannot be trained on.
    """

    def __init__(
        self,
        tokenizer,
        chat_template: str | dict[str, str] | None = None,
        now: datetime | None = None,
        options: TrainedOn | None = None,
        *,
        hashed: bool = True,
    ):
        self.options, self._hashed = options or TrainedOn(), hashed
        templates = chat_template or (templates_of(tokenizer) if tokenizer.chat_template else {})
        backend = backend_of(tokenizer)
        added = [token.content for token in backend.get_added_tokens_decoder().values()]
        named = templates if isinstance(templates, dict) else {"default": templates}
        self.finders = {
            name: TurnFinder(ChatTemplate(source, tokenizer.special_tokens_map, now), added, self.options.template_args)
            for name, source in named.items()
            if name in ("default", "tool_use")
        }
        self._added_ids = frozenset(backend.get_added_tokens_decoder())
        # Byte-level post-processors trim the spaces off the offsets; nothing else is asked of one here.
        self._encoder = Tokenizer.from_str(backend.to_str())
        self._encoder.no_truncation()
        self._encoder.no_padding()
        self._encoder.post_processor = None  # type: ignore[assignment]
        self._text_ends = text_ends(tokenizer)

    @property
    def notes(self) -> list[str]:
        """What a user should know of how turns are found."""
        marked = [name for name, finder in self.finders.items() if finder.template.has_markers]
        said = "the chat template marks what is trained ({% generation %}), and those marks are the mask"
        return [said if name == "default" else f"{said} (template {name})" for name in marked]

    def encode(self, conversations: Sequence[Conversation]) -> list[Document | RowError]:
        """A document, or the reason why there is none, for each conversation."""
        results: list[Document | RowError] = []
        located: list[_Located] = []
        for index, conversation in enumerate(conversations):
            try:
                located.append(self._locate(index, conversation))
                results.append(RowError("not encoded"))  # its place, filled below
            except RowError as error:
                results.append(error)
            except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can hold
                results.append(RowError("not Unicode", str(error)))
        for batch in _batches(located):
            encodings = self._encoder.encode_batch([one.text for one in batch], add_special_tokens=False)
            for one, encoding in zip(batch, encodings, strict=True):
                results[one.number] = self._document(encoding, one)
        return results

    def end_token_ids(self) -> list[int]:
        """Ids of the tokens with which the template ends an assistant's turn, for `generation_config`.

        The one after an answer comes first, then the one after a tool call where it differs. Empty where the
        template ends turns with nothing, or with text that is no token of this tokenizer.
        """
        if not self.finders:
            return self._text_ends[1].tolist()
        ends = [end for finder in self.finders.values() for end in finder.learned.ends]
        ids = map(self._encoder.token_to_id, dict.fromkeys(ends))
        return [number for number in ids if number is not None]  # none is: they are added tokens

    def _locate(self, index: int, conversation: Conversation) -> _Located:
        if conversation.text is None:
            text, turns = self._finder(conversation).locate(conversation)
        else:
            text = conversation.text
            turns = [Turn(start, end, number) for number, (start, end) in enumerate(conversation.trained)]
        kept, counts = choose_turns(text, turns, conversation, self.options)
        text.encode()  # raises for half of a surrogate pair
        plain = conversation.kind == "text"
        hashes = (b"", b"")
        if self._hashed:
            trained = (turn.start for turn in turns if turn.message not in conversation.untrained)
            # examples that all rows share are part of the prompt; a text has none, and is compared whole
            prompt = text if plain else text[: next(trained, len(text))]
            hashes = _hash(prompt), _hash(text)
        return _Located(index, text, kept, counts, hashes, plain)

    def _finder(self, conversation: Conversation) -> TurnFinder:
        """That of the template which transformers' `get_chat_template` picks."""
        if not self.finders:
            raise RowError("no chat template", "the tokenizer has none: give one with --chat-template")
        name = "tool_use" if conversation.tools is not None and "tool_use" in self.finders else "default"
        return self.finders[name]

    def _document(self, encoding: Encoding, located: _Located) -> Document | RowError:
        tokens = np.frombuffer(array("i", encoding.ids), np.int32)  # twice as fast as np.array
        prompt_hash, text_hash = located.hashes
        if located.plain:
            begin, end = self._text_ends
            tokens = np.concatenate((begin, tokens, end))
            whole = np.array([[0, len(tokens)]], np.int32)
            return Document(tokens, whole, prompt_hash=prompt_hash, text_hash=text_hash)
        spans: list[tuple[int, int]] = []
        straddling = 0
        for place in located.kept:
            first, stop, shared = self._tokens_of(encoding, located.text, *place)
            first = max(first, spans[-1][1] if spans else 0)  # turns that meet inside one token
            straddling += shared
            if first < stop:
                spans.append((first, stop))
        if not spans:
            return RowError("nothing to supervise", "no token of the text belongs to an assistant's turn")
        return Document(
            tokens,
            np.array(spans, dtype=np.int32),
            straddling=straddling,
            prompt_hash=prompt_hash,
            text_hash=text_hash,
            **located.counts,
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


def _hash(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()


def _token_at(encoding: Encoding, character: int, characters: int) -> int:
    """The first token that holds the character, or else the next character that any token holds."""
    for place in range(character, characters):
        token = encoding.char_to_token(place)
        if token is not None:
            return token
    return len(encoding)


def _characters(encoding: Encoding, token: int) -> tuple[int, int] | None:
    return encoding.token_to_chars(token) if token < len(encoding) else None


class _Located(NamedTuple):
    number: int  # of the conversation
    text: str
    kept: list[tuple[int, int]]  # characters [start, end) that are trained
    counts: dict[str, int]
    hashes: tuple[bytes, bytes]  # of prompt and text
    plain: bool  # all of it is trained, and the tokens that begin and end a text belong to it


def _batches(located: list[_Located]):
    batch, size = [], 0
    for item in located:
        batch.append(item)
        size += len(item.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
