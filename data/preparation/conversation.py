"""What a row becomes before it is tokenised: messages for a chat template, or text; or the reason why it cannot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Messages = list[dict[str, Any]]


class RowError(ValueError):
    """A row that cannot be used: `reason` is what rows are counted by, `detail` says what this one shows."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail

    def __reduce__(self):
        return RowError, (self.reason, self.detail)


@dataclass(frozen=True)
class Conversation:
    """One row in the form that the encoder takes: `messages` for the chat template, or `text` as it stands."""

    messages: Messages
    tools: list[dict[str, Any]] | None = None  # JSON schemas of the tools that may be called
    template_args: dict[str, Any] | None = None  # the row's `chat_template_kwargs`
    untrained: frozenset[int] = frozenset()  # numbers of assistant messages that the row says not to train
    text: str | None = None  # rendered or plain text: no template is applied
    trained: tuple[tuple[int, int], ...] = ()  # supervised characters [start, end) of `text`
    kind: str = "messages"  # the row's shape, as reports count it
    unused: tuple[str, ...] = ()  # the row's columns that no part of the conversation comes from
