"""What preparing may remove: its own directories, and nothing that anything else has put there."""

from collections.abc import Iterable
from pathlib import Path

# All that a data directory holds, and what stands in the directory of parts beside it.
DATA = (
    "meta.json",
    "tokens.bin",
    "tokens.idx",
    "spans.npy",
    "spans_offsets.npy",
    "tokenizer",
    "valid",
    "valid.partial",  # while it is written
    "dropped.jsonl",
)
PARTS = ("plan.json", "*.npz", "*.partial")


def check_output(output: Path, inputs: Iterable[str | Path | None], *, overwrite: bool) -> None:
    """Refuses an output whose replacement would remove what preparing did not make; ValueError in one sentence.

    inputs: sources, model, tokenizer and the like; what is no path of this machine is left alone.
    """
    place = output.resolve()
    for given in inputs:
        if given is not None and Path(given).exists() and Path(given).resolve().is_relative_to(place):
            holds = "is" if Path(given).resolve() == place else "holds"
            raise ValueError(f"--output {output} {holds} {given}, which the data is made from: choose another --output")
    if overwrite and output.exists():
        _check_own(output, DATA, "meta.json", f"--overwrite: {output}")
    for ending, names, mark in ((".parts", PARTS, "plan.json"), (".partial", DATA, "tokens.bin")):
        beside = output.with_name(output.name + ending)
        if beside.exists():
            _check_own(beside, names, mark, f"--output {output}: {beside}, where unfinished work would stand,")


def _check_own(folder: Path, names: tuple[str, ...], mark: str, what: str) -> None:
    """Refuses a directory without its mark, or with anything in it that has none of the names."""
    entries = sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else [folder]
    strange = [entry.name for entry in entries if not any(entry.match(name) for name in names)]
    if strange or (entries and not (folder / mark).is_file()):
        found = f" (it holds {', '.join(strange[:3])})" if strange else ""
        raise ValueError(f"{what} was not made by prepare_data{found}: remove it yourself, or choose another --output")
