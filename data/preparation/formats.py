"""Rows of a data set -> conversations, in the format that is named or by the columns that a row has."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from data.preparation.additions import ADDING, missing_system, template_args_of, tools_of
from data.preparation.columns import COMPLETION, PAIRS, Columns, Fields, find_pair, lacking, text_of
from data.preparation.conversation import Conversation, Messages, RowError
from data.preparation.messages import MESSAGES, read_messages
from data.preparation.prompt import QUESTIONS, Prompt
from data.preparation.recognition import ABOUT, ANSWERS, INSTRUCTION, TEXT, is_rendered, marker, recognised
from data.preparation.tool_calls import turns_from_columns
from data.preparation.values import is_empty, shown

FORMATS = ("auto", "messages", "prompt_completion", "alpaca", "question_answer", "rendered", "text")
_CALLS = frozenset(("tool_calls", "function_calls", "functions"))  # keys of messages in which a tool is called or shown
_USUAL = Fields()  # the names of columns that are taken without being told


@dataclass(frozen=True, kw_only=True)
class RowReader:
    """Makes the conversation of a row, in a format that is one of FORMATS.

    `system` is the system's turn of every row: a row that has another one is refused. `ignore_columns` are left aside
    as if no row had them. `special_tokens` are those that the chat template writes, by which `auto` knows a row that
    has been through it. Raises ValueError for options that do not go together.
    """

    format: str = "auto"
    fields: Fields = _USUAL
    prompt: Prompt | None = None
    system: str | None = None
    ignore_columns: tuple[str, ...] = ()
    special_tokens: tuple[str, ...] = ()
    _left_aside: frozenset[str] = field(init=False, repr=False, compare=False)
    _markers: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check(self)
        object.__setattr__(self, "_left_aside", frozenset(self.ignore_columns))
        object.__setattr__(self, "_markers", marker(self.special_tokens))

    def __call__(self, row: Any) -> Conversation:
        """The conversation of one row. Raises RowError for a row that cannot be used."""
        if not isinstance(row, dict):
            raise RowError("not an object", f"a row must be a JSON object, this is a {type(row).__name__}")
        columns = Columns(row, self._left_aside)
        if not columns.row:
            raise RowError("empty row", "--ignore-columns leaves all its columns aside" if row else "")
        kind = self.format
        if kind == "auto":
            kind = recognised(columns.filled, self.fields, self.prompt is not None, self.system is not None)
        return _MAKERS[kind](self, columns)

    def _messages(self, columns: Columns) -> Conversation:
        name = self.fields.messages or next((name for name in MESSAGES if name in columns.filled), MESSAGES[0])
        if name not in columns.row:
            raise lacking(columns.names, name, "name the column of messages with --fields.messages")
        messages, untrained = read_messages(columns.take(name), name)
        if messages:
            self._refuse_rendered(messages[0]["content"], f"message 0 of {name}", "--format messages takes it as it is")
        return self._conversation("messages", columns, messages, untrained)

    def _prompt_completion(self, columns: Columns) -> Conversation:
        """Two texts, or messages of which those of the completion are trained."""
        prompt, completion = self.fields.question or COMPLETION[0], self.fields.answer or COMPLETION[1]
        _demand(columns, prompt, completion)
        if not any(isinstance(columns.row[name], list) for name in (prompt, completion)):
            return self._exchange("prompt_completion", columns, self._question(columns, prompt), completion, (prompt,))
        if self.prompt is not None:
            raise RowError("not text", f"{prompt} or {completion} is a list of messages, and --prompt asks for text")
        asked, _ = _turns(columns, prompt, "user")
        answered, untrained = _turns(columns, completion, "assistant")
        if not answered or answered[-1]["role"] != "assistant":
            raise RowError("no assistant turn", f"{completion} does not end with an assistant's turn")
        if asked:
            mend = "--format prompt_completion takes it as it is"
            self._refuse_rendered(asked[0]["content"], f"message 0 of {prompt}", mend)
        context = [number for number, turn in enumerate(asked) if turn["role"] == "assistant"]
        untrained = frozenset([*context, *(len(asked) + number for number in untrained)])
        return self._conversation("prompt_completion", columns, asked + answered, untrained)

    def _alpaca(self, columns: Columns) -> Conversation:
        """An instruction, what it is about on the line after it, and the answer."""
        row = columns.row
        answers = [name for name in ANSWERS if name in columns.filled] or [name for name in ANSWERS if name in row]
        instruction, answer = self.fields.question or INSTRUCTION, self.fields.answer or next(iter(answers), ANSWERS[0])
        _demand(columns, instruction, answer)
        about = [name for name in ABOUT if name not in (instruction, answer) and not is_empty(row.get(name))]
        for names in (about, [] if self.fields.answer else answers):
            if len(names) > 1:
                raise RowError("ambiguous fields", f"the row has {' and '.join(names)}: --ignore-columns one of them")
        parts = about if about and is_empty(row[instruction]) else [instruction, *about]
        question = "\n".join([text_of(row, name) for name in parts])
        return self._exchange("alpaca", columns, question, answer, (instruction, *ABOUT))

    def _question_answer(self, columns: Columns) -> Conversation:
        fields, row = self.fields, columns.row
        try:
            question, answer = find_pair(columns.names, columns.filled, fields)
        except RowError:
            if self.prompt is None or fields.question is not None or fields.answer not in row:
                raise
            # the prompt may name all the columns that the question is made of
            return self._exchange("question_answer", columns, None, str(fields.answer), ())
        return self._exchange("question_answer", columns, self._question(columns, question), answer, (question,))

    def _rendered(self, columns: Columns) -> Conversation:
        question, answer = find_pair(columns.names, columns.filled, self.fields, (*PAIRS, COMPLETION))
        asked, answered = columns.text(question), columns.text(answer)
        columns.refuse_unused(ADDING, "rendered")
        text = asked + answered
        trained = ((len(asked), len(text)),)
        return Conversation([], text=text, trained=trained, kind="rendered", unused=columns.unused())

    def _text(self, columns: Columns) -> Conversation:
        name = self.fields.answer or TEXT
        if name not in columns.row:
            raise lacking(columns.names, name, "name the column with --fields.answer")
        text = columns.text(name)
        self._refuse_rendered(text, name, "--format text trains all of it")
        columns.refuse_unused(ADDING, "text")
        return Conversation([], text=text, trained=((0, len(text)),), kind="text", unused=columns.unused())

    def _question(self, columns: Columns, name: str) -> Any:
        """The question's column, which must be text where no prompt makes text of it."""
        return columns.text(name) if self.prompt is None else columns.row[name]

    def _exchange(
        self, kind: str, columns: Columns, question: Any, answer: str, asking: tuple[str, ...]
    ) -> Conversation:
        """Question, calls and answer; `asking` are the columns of which the question is made."""
        if isinstance(question, str):
            mend = f"use --format rendered, which supervises `{answer}` and its end"
            self._refuse_rendered(question, asking[0], mend)
        answered = columns.text(answer)
        if self.prompt is None:
            columns.used.update(asking)
            messages = [{"role": "user", "content": question}]
        else:
            messages = _prompted(self.prompt, columns, question, answered, asking)
        examples = frozenset(number for number, turn in enumerate(messages) if turn["role"] == "assistant")
        if self.fields.tools or columns.any_of(ADDING):
            messages += turns_from_columns(columns, self.fields)
        messages.append({"role": "assistant", "content": answered})
        return self._conversation(kind, columns, messages, examples)

    def _conversation(self, kind: str, columns: Columns, messages: Messages, untrained: frozenset[int]) -> Conversation:
        """The conversation of these messages with what other columns of the row add to it."""
        assistants = {number for number, turn in enumerate(messages) if turn["role"] == "assistant"}
        tools = template_args = None
        if not assistants:
            roles = ", ".join([turn["role"] for turn in messages][:8])
            raise RowError("no assistant turn", f"the roles are {roles or 'none'}")
        if assistants <= untrained:
            raise RowError("no turn to train", "the row says of every assistant's turn that it is not to be trained")
        if columns.any_of(ADDING) or self.system is not None:
            taken = self.prompt.fields if self.prompt is not None else ()
            system = missing_system(columns, messages, self.system, taken)
            if system is not None:
                messages = [{"role": "system", "content": system}, *messages]
                untrained = frozenset(number + 1 for number in untrained)
            tools, template_args = tools_of(columns), template_args_of(columns)
            columns.refuse_unused(ADDING, kind)
        if kind != "messages":
            columns.refuse_unused((*self.fields.tools, INSTRUCTION), kind)
        kind = _named(kind, messages, tools)
        return Conversation(messages, tools, template_args, untrained, kind=kind, unused=columns.unused())

    def _refuse_rendered(self, text: str, where: str, mend: str) -> None:
        if self.format == "auto" and is_rendered(text, self._markers):
            raise RowError("already rendered by a chat template", f"{where} begins with {shown(text)}: {mend}")


def to_conversation(row: Any, fields: Fields = _USUAL, prompt: Prompt | None = None) -> Conversation:
    """The conversation of one row whose format is recognised. Raises RowError for a row that cannot be used."""
    return RowReader(fields=fields, prompt=prompt)(row)


_MAKERS: dict[str, Callable[[RowReader, Columns], Conversation]] = {
    "messages": RowReader._messages,
    "prompt_completion": RowReader._prompt_completion,
    "alpaca": RowReader._alpaca,
    "question_answer": RowReader._question_answer,
    "rendered": RowReader._rendered,
    "text": RowReader._text,
}


def _check(reader: RowReader) -> None:
    """Raises ValueError for options that do not go together."""
    chosen, fields, prompt = f"--format {reader.format}", reader.fields, reader.prompt
    if reader.format not in FORMATS:
        raise ValueError(f"{chosen}: there is no such format, known are {', '.join(FORMATS)}")
    if reader.format in ("rendered", "text"):
        if prompt is not None or reader.system is not None:
            raise ValueError(f"{chosen} takes rows as they are: leave --prompt and --system out")
        if fields.tools:
            raise ValueError(f"{chosen} takes rows as they are: leave --fields.tool-* out")
        if fields.question and reader.format == "text":
            raise ValueError(f"{chosen} takes one column, which --fields.answer names: leave --fields.question out")
    if reader.format == "messages" and (prompt is not None or fields != Fields(messages=fields.messages)):
        raise ValueError(f"{chosen} takes whole conversations: leave --prompt and other --fields.* than messages out")
    if fields.messages and (reader.format not in ("auto", "messages") or prompt is not None):
        raise ValueError("--fields.messages names whole conversations: it goes with neither --prompt nor other formats")
    if prompt is not None and prompt.system is not None and reader.system not in (None, prompt.system):
        raise ValueError(
            f"--system {reader.system!r}: the prompt has another, {prompt.system!r}: leave one of them out"
        )


def _demand(columns: Columns, question: str, answer: str) -> None:
    for name, flag in ((question, "--fields.question"), (answer, "--fields.answer")):
        if name not in columns.row:
            raise lacking(columns.names, name, f"name the column with {flag}")


def _turns(columns: Columns, name: str, role: str) -> tuple[Messages, frozenset[int]]:
    """The messages of a column; text is one message of this role."""
    if isinstance(columns.row[name], str):
        return [{"role": role, "content": columns.text(name)}], frozenset()
    return read_messages(columns.take(name), name)


def _prompted(prompt: Prompt, columns: Columns, question: Any, answer: str, asking: tuple[str, ...]) -> Messages:
    """The prompt's turns, in which all of the question's columns must have their place."""
    row, named = columns.row, prompt.fields
    try:
        messages = prompt.turns(row, question, answer)
    except ValueError as error:
        raise RowError("missing prompt field", str(error)) from error
    columns.used.update(named)
    if "" in named or any(name in QUESTIONS and row.get(name) is None for name in named):
        columns.used.update(asking)
    if isinstance(question, str) and not question.strip() and not columns.used.isdisjoint(asking):
        raise RowError("empty text", f"{asking[0]} is empty")
    for name in asking:
        if name not in columns.used and not is_empty(row.get(name)):
            raise RowError("column not used", f"{name} holds the question, and --prompt names neither it nor {{}}")
    return messages


def _named(kind: str, messages: Messages, tools: list | None) -> str:
    """The kind of row that reports count: its format, and whether there are tools and thinking in it."""
    calls, thinks = bool(tools), False
    for turn in messages:
        if turn["role"] == "assistant" and ("<think>" in turn["content"] or turn.get("reasoning_content", "").strip()):
            thinks = True
        if turn["role"] == "tool" or not _CALLS.isdisjoint(turn):
            calls = True
    return kind + (", tools" if calls else "") + (", thinking" if thinks else "")
