"""What preparing is told, and the checks of it that need neither rows nor a tokenizer."""

from dataclasses import dataclass, field
from pathlib import Path

from data.preparation.formats import Fields
from data.preparation.where import Where


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Turns conversations into a data directory that training reads."""

    sources: tuple[str, ...]
    """JSONL, JSON or parquet files, directories of data sets, or hub names (name[:config[:split]])."""
    output: Path
    """The data directory to make."""
    model: str | None = None
    """Hugging Face directory or hub name of the model to be trained."""
    tokenizer: str | None = None
    """Directory or hub name of another tokenizer, e.g. of the chat model beside a base model."""
    chat_template: Path | None = None
    """Jinja file with the chat template to use instead of the tokenizer's own."""
    prompt: Path | None = None
    """Prompt file: text with {problem}-style fields, or YAML with `system` and `user`."""
    fields: Fields = field(default_factory=Fields)
    config: str | None = None
    """Configuration of hub data sets that do not name their own."""
    split: str | None = None
    """Split of hub data sets that do not name their own."""
    where: tuple[str, ...] = ()
    """Keep only rows that meet all these Python expressions over their columns (`row['odd name']` for others), e.g.
    "float(pass_rate) <= 0.3"; `tokens(column)` is a text's length by the tokenizer."""
    limit: int | None = None
    """Take this many rows, from the first source on, before any --where."""
    hold_out: int = 0
    """Put this many documents into OUTPUT/valid instead."""
    hold_out_fraction: float = 0.0
    """Put this fraction of the documents into OUTPUT/valid instead."""
    seed: int = 0
    """Chooses the documents that are held out."""
    num_workers: int = 0
    """Processes (0: one for each core)."""
    strict: bool = False
    """Stop at the first row that cannot be used, instead of dropping and counting it."""
    overwrite: bool = False
    """Replace a data directory that is there already."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("--sources: name at least one file or data set")
        if self.model is None and self.tokenizer is None:
            raise ValueError("--model: name the model whose tokenizer is to be used (or a --tokenizer)")
        if self.num_workers < 0 or self.hold_out < 0 or (self.limit is not None and self.limit < 1):
            raise ValueError("--num-workers and --hold-out must be at least 0, --limit at least 1")
        if not 0 <= self.hold_out_fraction < 1 or (self.hold_out and self.hold_out_fraction):
            raise ValueError("--hold-out-fraction must be in [0, 1), and is given instead of --hold-out")
        Where(self.where, len)  # raises for what is no expression
