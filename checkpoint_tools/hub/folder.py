"""The files of a model directory that are published, and what must be true of them before any is sent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from checkpoint_tools.verify import model_faults
from engine.checkpointing.export_sums import check_small_files
from models.conversion.hf_reader import HFReader, ignored_files

CARD = "README.md"
_SMALL = 2**26  # bytes: the largest tokenizers have half of that


@dataclass(frozen=True)
class ModelFolder:
    """A model directory, and the files of it that are published, each by its path within it."""

    path: Path
    files: tuple[str, ...]
    hidden: tuple[str, ...]  # names that begin with a dot, which stay here

    @property
    def bytes(self) -> int:
        return sum((self.path / file).stat().st_size for file in self.files)


def open_folder(path: Path) -> ModelFolder:
    """A directory whose weights are just those that its index lists; ValueError, in one sentence, for any other."""
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{path} is no model directory: it has no config.json; export a checkpoint first with lathe to-hf "
            f"--checkpoint CHECKPOINT --output HF"
        )
    check_small_files(path)
    HFReader(path)  # every file that the index lists is there, whole, with the tensors that it lists
    if strangers := ignored_files(path):
        raise ValueError(
            f"{path} holds weights that its index does not list ({', '.join(strangers[:5])}), and those who load the "
            "model would not read them: remove them, or export into a new directory"
        )
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    hidden = tuple(name for name in names if any(part.startswith(".") for part in name.split("/")))
    return ModelFolder(path, tuple(name for name in names if name not in hidden), hidden)


def check_content(folder: ModelFolder, token: str) -> None:
    """Reads every file: ValueError for one that is damaged, or small and holds the access token."""
    found, _ = model_faults(folder.path)
    if found:
        raise ValueError(found[0] + (f"; {len(found) - 1} more files are damaged" if found[1:] else ""))
    for file in (folder.path / name for name in folder.files):
        if file.stat().st_size <= _SMALL and token.encode() in file.read_bytes():
            raise ValueError(f"{file} holds your access token: remove it before the file is published")
