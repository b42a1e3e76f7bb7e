"""Hugging Face directories, read by slices; and the files beside the weights, copied."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.conversion.rules import Index

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I64": torch.int64,
}
# All that a user keeps with a model besides its weights and the list of their files.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "chat_template*",
    "additional_chat_templates/*",
    "LICENSE*",
    "NOTICE*",
)


class HFReader:
    """The tensors of a Hugging Face directory, in one safetensors file or in several with an index.

    Files are opened for each read and closed after it: mapped pages would otherwise count as memory.
    Raises ValueError for a directory without safetensors, for a damaged file (naming it), and for an index
    that does not agree with its files.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        index = read_index(self.path)
        if index is None and not (self.path / SINGLE).exists():
            raise ValueError(_no_safetensors(self.path))
        files = sorted(set(index["weight_map"].values())) if index else [SINGLE]
        self._file: dict[str, str] = {}
        self._shape: dict[str, tuple[int, ...]] = {}
        self._dtype: dict[str, torch.dtype] = {}
        self._offsets: dict[str, dict[str, int]] = {}  # by file and tensor
        for file in files:
            self._survey(file)
        if index:
            self._check_index(index["weight_map"])

    def names(self) -> list[str]:
        return sorted(self._file)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shape[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype[name]

    def read(self, name: str, index: Index = (), out: Tensor | None = None) -> Tensor:
        """A tensor or a slice of it, put into `out` or into memory of its own; only the slice's pages are read."""
        with self._open(self._file[name]) as file:
            mapped = file.get_slice(name)
            part = mapped[tuple(slice(s.start, s.stop) for s in index)] if index else mapped[...]
            if any(s.step not in (None, 1) for s in index):
                part = part[tuple(slice(None, None, s.step) for s in index)]
            return part.clone(memory_format=torch.contiguous_format) if out is None else out.copy_(part)

    def first_byte(self, name: str) -> tuple[Path, int]:
        """The file that holds a tensor, and its first byte there (safetensors: 8 bytes of length, a header, data)."""
        file = self._file[name]
        if file not in self._offsets:
            with open(self.path / file, "rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(length))
            self._offsets[file] = {
                one: 8 + length + entry["data_offsets"][0] for one, entry in header.items() if one != "__metadata__"
            }
        return self.path / file, self._offsets[file][name]

    def _open(self, file: str):
        try:
            return safe_open(self.path / file, "pt")
        except FileNotFoundError:
            raise ValueError(f"{self.path} lacks {file}, which its {INDEX} lists") from None
        except SafetensorError as error:
            raise ValueError(f"{self.path / file} is truncated or damaged: {error}") from None

    def _survey(self, file: str) -> None:
        with self._open(file) as opened:
            for name in list(opened.keys()):
                mapped = opened.get_slice(name)
                kind = mapped.get_dtype()
                if kind not in DTYPES:
                    raise ValueError(f"{self.path / file}: {name} has dtype {kind}, which is not supported")
                if name in self._file:
                    raise ValueError(f"{self.path}: {name} is both in {self._file[name]} and in {file}")
                self._file[name] = file
                self._shape[name] = tuple(mapped.get_shape())
                self._dtype[name] = DTYPES[kind]

    def _check_index(self, weight_map: Mapping[str, str]) -> None:
        drift = [name for name, file in weight_map.items() if self._file.get(name) != file]
        drift += [name for name in self._file if name not in weight_map]
        if drift:
            raise ValueError(
                f"{self.path / INDEX} does not agree with its files on {len(drift)} tensor(s): "
                + ", ".join(sorted(drift)[:5])
            )


def read_index(path: Path) -> dict | None:
    """A directory's safetensors index: `metadata`, `weight_map` and the file's `bytes`; None without one."""
    try:
        content = (path / INDEX).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        index = json.loads(content)
        files = set(index["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path / INDEX} is damaged: it is no JSON object with a weight_map") from None
    strangers = [f for f in files if Path(f).name != f or not f.endswith(".safetensors")]
    if strangers:
        raise ValueError(f"{path / INDEX} names a file outside its directory: {strangers[0]}")
    return {"metadata": {}, **index, "bytes": content}


def copy_side_files(src: str | Path, dst: str | Path, *, with_index: bool = False) -> list[str]:
    """Copy config, generation config, tokenizer and chat templates byte for byte; returns the names.

    `with_index` also keeps the list of weight files, from which an export takes its sharding.
    """
    copied = []
    for pattern in (*SIDE_FILES, *([INDEX] if with_index else [])):
        for file in sorted(Path(src).glob(pattern)):
            name = str(file.relative_to(src))
            if file.is_file() and name not in copied:
                target = Path(dst) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
                copied.append(name)
    return copied


def _no_safetensors(path: Path) -> str:
    if list(path.glob("pytorch_model*.bin")):
        return (
            f"{path} holds pytorch_model.bin, which is a pickle: load it with transformers and save it "
            "again, which writes safetensors"
        )
    return f"{path} holds no {SINGLE} and no {INDEX}"
