"""What preparing is told, and the checks of it that need neither rows nor a tokenizer."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from tyro.constructors import PrimitiveConstructorSpec

from data.preparation.additions import NO_TEMPLATE_ARGS
from data.preparation.formats import FORMATS, Fields
from data.preparation.prompt import Prompt
from data.preparation.sources import Source, check_hold_out, name_all, parse_source
from data.preparation.where import Where


def parse_template_args(pairs: list[str]) -> dict[str, Any]:
    """`name=value` pairs as a dict, values read as YAML. Raises ValueError for what is no pair."""
    values = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--template-args {pair}: write name=value, e.g. enable_thinking=false")
        try:
            values[name] = yaml.safe_load(text) if text else ""
        except yaml.YAMLError as error:
            raise ValueError(f"--template-args {pair}: the value is no YAML: quote it if it is text") from error
    return values


def _word(metavar: str, kind: type | tuple[type, ...]) -> PrimitiveConstructorSpec:
    """One word on the command line, kept as it is; recipes may hold an object in its place."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: isinstance(value, kind),
        str_from_instance=lambda value: [value.data if isinstance(value, Source) else str(value)],
    )


_PAIRS = PrimitiveConstructorSpec[Any](
    nargs="*",
    metavar="[NAME=VALUE ...]",
    instance_from_str=tuple,
    is_instance=lambda value: isinstance(value, dict | tuple),
    str_from_instance=lambda value: [f"{name}={value[name]}" for name in value],
)


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Turns conversations into a data directory that training reads.

    Mixture files and recipes, YAML before the flags, have the same names as keys, and an object for each source.
    """

    sources: tuple[Annotated[Source | str, _word("SOURCE[:TAKE]", (Source, str))], ...] = ()
    """Files (JSONL, JSON, CSV, each also as .gz or .zst; parquet, Arrow), patterns of files, directories, or hub names
    (name[:config[:split]]). `:0.5` behind one takes half of its documents, `:3.0` each three times, `:2000` that many.
    """
    output: Path | None = None
    """The data directory to make."""
    model: str | None = None
    """Hugging Face directory or hub name of the model to be trained."""
    tokenizer: str | None = None
    """Directory or hub name of another tokenizer, e.g. of the chat model beside a base model."""
    resize_embeddings: bool = False
    """Take a tokenizer with more tokens than the model; train with --override.resize-embeddings."""
    chat_template: str | Path | None = None
    """A name in examples/chat_templates/, or a Jinja file, to use instead of the tokenizer's own chat template."""
    template_args: Annotated[dict[str, Any], _PAIRS] = field(default_factory=dict)
    """Arguments that the chat template is given for all rows, e.g. enable_thinking=false."""
    prompt: Annotated[str | Path | Prompt | None, _word("NAME|FILE", object)] = None
    """A name in examples/prompts/, or a file: text with {} for the question or with {problem}-style fields, or YAML
    with `user` and, if wanted, `system` and `examples`."""
    system: str | None = None
    """A system turn of this text, instead of the template's default; "" for an empty one. Rows that have another are
    dropped."""
    format: str = "auto"
    """How rows are read: auto (by their columns), messages, prompt_completion, alpaca, question_answer, rendered (text
    that has been through a chat template) or text (plain text, all of it supervised)."""
    fields: Fields = field(default_factory=Fields)
    ignore_columns: tuple[str, ...] = ()
    """Columns to leave aside, as if no row had them."""
    config: str | None = None
    """Configuration of hub data sets that do not name their own."""
    split: str | None = None
    """Split of hub data sets that do not name their own."""
    where: tuple[str, ...] = ()
    """Keep only rows that meet all these Python expressions over their columns (`row['odd name']` for others), e.g.
    "float(pass_rate) <= 0.3"; `tokens(column)` is a text's length by the tokenizer."""
    limit: int | None = None
    """Read each source up to this many rows that --where keeps."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Supervise every assistant turn, the last one alone, or every token, questions included."""
    mask_tool_output: bool = False
    """Do not train on the output of executed code inside an assistant turn, such as ```output blocks."""
    stripped_thinking: bool = False
    """Also train turns whose thinking the chat template leaves out."""
    max_length: int | None = None
    """Drop documents with more tokens than this; rows of plain text are cut instead."""
    dedup: Literal["none", "prompt", "conversation"] = "none"
    """Drop rows whose prompt, or whole conversation, a row before them has already."""
    decontaminate: tuple[str, ...] = ()
    """Files of test questions: rows are dropped of which a user turn shares --ngram words in a row with one of them."""
    ngram: int = 13
    """How many words in a row make an overlap with a test question; a shorter question is looked for whole."""
    hold_out: int | float = 0
    """Put this many documents into OUTPUT/valid instead; with a point, as 0.05, this share of them."""
    hold_out_fraction: float = 0.0
    """The share of --hold-out, in a flag of its own."""
    seed: int = 0
    """Chooses the documents that are taken and held out."""
    num_workers: int = 0
    """Processes (0: one for each core)."""
    strict: bool = False
    """Stop at the first row that cannot be used, instead of dropping and counting it."""
    overwrite: bool = False
    """Replace a data directory that is there already."""
    preview: int = 0
    """Write nothing: show this many documents with their supervised tokens marked, and why rows would be dropped."""

    def __post_init__(self) -> None:
        if isinstance(self.template_args, tuple):  # as the command line has them
            object.__setattr__(self, "template_args", parse_template_args(list(self.template_args)))
        if others := [name for name in NO_TEMPLATE_ARGS if name in self.template_args]:
            raise ValueError(f"--template-args {others[0]}: it is made from each row: leave it out")
        if self.num_workers < 0 or (self.limit is not None and self.limit < 1) or self.preview < 0:
            raise ValueError("--num-workers and --preview must be at least 0, --limit at least 1")
        if not 0 <= self.hold_out_fraction < 1 or (self.hold_out and self.hold_out_fraction):
            raise ValueError("--hold-out-fraction must be in [0, 1), and is given instead of --hold-out")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"--max-length {self.max_length} must be at least 2")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed} must be at least 0")
        if self.ngram < 1:
            raise ValueError(f"--ngram {self.ngram} must be at least 1")
        check_hold_out("--hold-out", self.hold_out)
        given = [(self.format, self.where), *((source.format, source.where) for source in self.each_source())]
        for name, where in given:
            if name not in FORMATS:
                raise ValueError(f"--format {name}: choose one of {', '.join(FORMATS)}")
            Where(where or (), len)  # raises for what is no expression

    def check_complete(self) -> None:
        """Raises ValueError where something is missing without which nothing can be prepared."""
        if not self.sources:
            raise ValueError("--sources: name at least one file or data set")
        if self.model is None and self.tokenizer is None:
            raise ValueError("--model: name the model whose tokenizer is to be used (or a --tokenizer)")
        if self.output is None and not self.preview:
            raise ValueError("--output: name the data directory to make (or look at some rows with --preview 20)")

    def each_source(self) -> list[Source]:
        """The sources, all different in name, with the options for all where they say nothing of their own."""
        sources = [parse_source(source) if isinstance(source, str) else source for source in self.sources]
        inherited = ("format", "fields", "prompt", "system", "ignore_columns", "where", "limit", "config", "split")
        return [
            replace(
                source,
                name=name,
                **{key: getattr(self, key) for key in inherited if getattr(source, key) is None},
            )
            for source, name in zip(sources, name_all(sources), strict=True)
        ]
