"""Hugging Face directories, read by slices; and the files beside the weights, copied."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.conversion.byte_boxes import BLOCK_BYTES, ByteFile, PlainFile, read_box
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
    "provenance.json",
)


class HFReader:
    """The tensors of a Hugging Face directory, in one safetensors file or in several with an index.

    Where both lie in it the one file is read, as transformers does (`ignored_files`). Bytes of weights come through
    `open_file` alone, so that what it returns may check them; one file stays open at a time. Nothing is mapped:
    mapped pages would count as memory. Raises ValueError for a directory without safetensors, for a damaged file
    (naming it), and for an index that does not agree with its files.
    """

    def __init__(self, path: str | Path, open_file: Callable[[Path], ByteFile] = PlainFile):
        self.path = Path(path)
        index = _used_index(self.path)
        if index is None and not (self.path / SINGLE).exists():
            raise ValueError(_no_safetensors(self.path))
        files = sorted(set(index["weight_map"].values())) if index else [SINGLE]
        self._open_file = open_file
        self._opened: tuple[str, ByteFile] | None = None
        self._file: dict[str, str] = {}
        self._shape: dict[str, tuple[int, ...]] = {}
        self._dtype: dict[str, torch.dtype] = {}
        self._first: dict[str, int] = {}  # a tensor's first byte in its file
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
        """A tensor or a slice of it, put into `out` or into memory of its own; little more than the slice is read."""
        shape, dtype = self._shape[name] or (1,), self._dtype[name]
        sides = [range(size)[part] for size, part in zip(shape, index, strict=False)]
        sides += [range(size) for size in shape[len(sides) :]]
        if out is None:
            out = torch.empty([len(side) for side in sides[: len(self._shape[name])]], dtype=dtype)
        if not out.numel():
            return out
        file, first = self._opened_file(self._file[name]), self._first[name]
        target = out if out.dim() else out.view(1)
        if out.dtype == dtype and out.is_contiguous():
            read_box(file, first, shape, sides, target)
            return out
        # Through memory of some rows; rows of the first dimension that has several.
        cut = next((number for number, side in enumerate(sides) if len(side) > 1), 0)
        row_bytes = math.prod(len(side) for side in sides[cut + 1 :]) * dtype.itemsize
        rows, step = sides[cut], max(1, BLOCK_BYTES // row_bytes)
        for start in range(0, len(rows), step):
            some = [*sides[:cut], rows[start : start + step], *sides[cut + 1 :]]
            part = torch.empty([len(side) for side in some], dtype=dtype)
            read_box(file, first, shape, some, part)
            target.narrow(cut, start, len(some[cut])).copy_(part)
        return out

    def _opened_file(self, file: str) -> ByteFile:
        if self._opened is None or self._opened[0] != file:
            if self._opened is not None:
                self._opened[1].close()
            self._opened = file, self._open_file(self.path / file)
        return self._opened[1]

    def _survey(self, file: str) -> None:
        for name, entry in self._header(file).items():
            kind = entry["dtype"]
            if kind not in DTYPES:
                raise ValueError(f"{self.path / file}: {name} has dtype {kind}, which is not supported")
            if name in self._file:
                raise ValueError(f"{self.path}: {name} is both in {self._file[name]} and in {file}")
            self._file[name] = file
            self._shape[name] = tuple(entry["shape"])
            self._dtype[name] = DTYPES[kind]
            self._first[name] = entry["first"]

    def _header(self, file: str) -> dict:
        """A file's tensors by name: dtype, shape and first byte (safetensors: 8 bytes of length, a header, data)."""
        try:
            with safe_open(self.path / file, "pt"):
                pass  # the library has checked lengths, shapes and places against each other and against the file
        except FileNotFoundError:
            raise ValueError(f"{self.path} lacks {file}, which its {INDEX} lists") from None
        except SafetensorError as error:
            raise ValueError(f"{self.path / file} is truncated or damaged: {error}") from None
        opened, length = self._opened_file(file), bytearray(8)
        opened.read_into(0, memoryview(length))
        header = bytearray(int.from_bytes(length, "little"))
        opened.read_into(8, memoryview(header))
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        return {name: {**entry, "first": 8 + len(header) + entry["data_offsets"][0]} for name, entry in entries.items()}

    def _check_index(self, weight_map: Mapping[str, str]) -> None:
        drift = [name for name, file in weight_map.items() if self._file.get(name) != file]
        drift += [name for name in self._file if name not in weight_map]
        if drift:
            raise ValueError(
                f"{self.path / INDEX} does not agree with its files on {len(drift)} tensor(s): "
                + ", ".join(sorted(drift)[:5])
            )


def ignored_files(path: str | Path) -> list[str]:
    """The safetensors files of a directory, and its index, that are not read: transformers does not read them either.

    It takes model.safetensors before an index of several files (`_get_resolved_checkpoint_files` of 5.23).
    """
    folder = Path(path)
    index = _used_index(folder)
    used = {INDEX, *index["weight_map"].values()} if index else {SINGLE}
    there = {file.name for file in folder.glob("*.safetensors")} | {file.name for file in folder.glob(INDEX)}
    return sorted(there - used)


def _used_index(path: Path) -> dict | None:
    """The index of the weights, where they lie in several files."""
    return None if (path / SINGLE).is_file() else read_index(path)


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

    `with_index` also keeps the list of weight files, where it is one, from which an export takes its sharding.
    """
    copied = []
    stale = (Path(src) / SINGLE).is_file()
    for pattern in (*SIDE_FILES, *([INDEX] if with_index and not stale else [])):
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
