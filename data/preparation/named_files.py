"""Files that are given by a path, or by the name of one of the project's own."""

import os
from collections.abc import Sequence
from pathlib import Path


def find_named(given: str | Path, folder: Path, suffixes: Sequence[str]) -> Path | None:
    """The file of a path, or of a name in `folder` with one of the suffixes behind it; None where there is neither."""
    for path in (Path(given), *(folder / f"{given}{suffix}" for suffix in suffixes)):
        if os.path.isfile(path):  # false for what can be no path, too, such as the file's own text
            return path
    return None


def names_in(folder: Path, suffixes: Sequence[str]) -> list[str]:
    """The names by which the files of a folder with one of these suffixes can be given."""
    return sorted({file.stem for file in folder.glob("*") if file.suffix in suffixes})


def read_utf8(path: Path, label: str, encoding: str = "utf-8") -> str:
    """The text of a file; `label` begins what is said of one that is not UTF-8 (ValueError)."""
    try:
        return path.read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{label}: not UTF-8 at byte {error.start}: save the file in this encoding") from error
