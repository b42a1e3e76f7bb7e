"""What a `torch_dist` checkpoint says of itself, read without trust: nothing is executed, and every number is checked.

`.metadata` is a pickle of torch's classes. Here it makes inert records instead, of those names alone that such files
have (seen in files of torch 2.1 to 2.13 and megatron-core 0.5 to 0.16), and torch's objects are built from records
whose numbers fit the files. A piece is an archive of `torch.save`, a ZIP file whose records must lie there as they are.
"""

import pickle
import resource
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from data.checksums import DamagedFile
from engine.checkpointing.directory import METADATA

MOST_BYTES = 2**30  # of `.metadata`: a million pieces have an eighth of that
_MEMORY = 2**31  # that its loading may take beside what grows with its size, and other threads meanwhile
_MOST_RECORDS = 64  # an archive of one tensor has about seven
_MOST_DESCRIPTION = 2**20  # bytes of the record that describes one tensor; it has about 150
_RECORDS = {
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.planner": ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
}


class Piece(NamedTuple):
    """Where one chunk of a tensor lies."""

    file: str
    start: int
    length: int


class _Record:
    """Anything but a shape or a dtype: keeps what it is made of, and does nothing."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.arguments = (state,)

    def __getitem__(self, name: str) -> Any:
        state = self.arguments[0] if self.arguments else None
        if not isinstance(state, dict):
            raise TypeError(f"a {type(self).__name__} without fields")
        return state.get(name)


class _Unpickler(pickle.Unpickler):
    """Knows the names of `_RECORDS`, shapes, and dtypes of torch. Every load makes record classes of its own."""

    def __init__(self, file: IO[bytes]):
        super().__init__(file)
        self._made: dict[str, type[_Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if name not in _RECORDS.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint has")
        return self._made.setdefault(name, type(name, (_Record,), {}))


def read_metadata(directory: Path) -> tuple[dict[str, TensorStorageMetadata], dict[MetadataIndex, Piece]]:
    """The tensors of a checkpoint and where their chunks lie; ValueError for a file that cannot be right."""
    path = directory / METADATA
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise ValueError(f"it has {size:,} bytes")
        with open(path, "rb") as file, _little_memory(_MEMORY + 64 * size):
            metadata = _Unpickler(file).load()
        tensors = {
            key: _tensor(key, entry) for key, entry in metadata["state_dict_metadata"].items() if _is_tensor(entry)
        }
        pieces = dict(_piece(index, info) for index, info in metadata["storage_data"].items())
        _check_pieces(directory, tensors, pieces)
    except OSError as error:
        raise ValueError(f"{directory} holds no readable torch_dist checkpoint: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, EOFError, OverflowError) as error:
        raise ValueError(f"{directory} holds no readable torch_dist checkpoint: {path} is damaged ({error})") from None
    except (pickle.UnpicklingError, MemoryError, RecursionError) as error:
        raise ValueError(f"{directory} holds no readable torch_dist checkpoint: {path} is refused ({error})") from None
    return tensors, pieces


@contextmanager
def _little_memory(more: int) -> Iterator[None]:
    """Lets this process take at most so many bytes more within the block: a pickle may ask for room for 2**32 objects.

    To look for that in its operations first would take ten times as long as the loading.
    """
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [pages * resource.getpagesize() + more, *[one for one in (before, hard) if one != resource.RLIM_INFINITY]]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))


def _is_tensor(entry: Any) -> bool:
    return type(entry).__name__ == "TensorStorageMetadata"


def _tensor(key: Any, entry: _Record) -> TensorStorageMetadata:
    size = _shape(entry["size"])
    dtype = entry["properties"].arguments[0]
    dtype = dtype["dtype"] if isinstance(dtype, dict) else dtype[0]
    if not isinstance(key, str) or not isinstance(dtype, torch.dtype):
        raise ValueError(f"{key!r} has dtype {dtype!r}")
    chunks = []
    for found in entry["chunks"]:
        chunk = ChunkStorageMetadata(_shape(found["offsets"]), _shape(found["sizes"]))
        ends = [offset + length for offset, length in zip(chunk.offsets, chunk.sizes, strict=True)]
        if len(ends) != len(size) or any(end > whole for end, whole in zip(ends, size, strict=True)):
            raise ValueError(f"a piece of {key} lies outside the tensor")
        chunks.append(chunk)
    covered = sum(chunk.sizes.numel() for chunk in chunks)
    if covered != size.numel():
        raise ValueError(f"pieces of {key} cover {covered} of {size.numel()} elements")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _shape(numbers: Any) -> torch.Size:
    if not isinstance(numbers, torch.Size) or any(type(one) is not int or one < 0 for one in numbers):
        raise ValueError(f"{numbers!r} is no shape")
    product = 1
    for one in numbers:
        product *= one
    if product >= 2**56:  # before torch multiplies in 64 bits
        raise ValueError(f"{list(numbers)} is larger than any tensor")
    return numbers


def _piece(index: _Record, info: _Record) -> tuple[MetadataIndex, Piece]:
    key, offset = index["fqn"], index["offset"]
    file, start, length = info["relative_path"], info["offset"], info["length"]
    if not isinstance(key, str) or type(start) is not int or type(length) is not int or start < 0 or length < 0:
        raise ValueError(f"a piece of {key!r} lies from {start!r} over {length!r} bytes")
    if not isinstance(file, str) or "/" in file or file in ("", ".", ".."):
        raise ValueError(f"it names a file outside its directory: {file!r}")
    if info["transform_descriptors"]:
        raise ValueError(f"{key} is compressed, which is not supported")
    return MetadataIndex(key, None if offset is None else _shape(offset)), Piece(file, start, length)


def _check_pieces(
    directory: Path, tensors: Mapping[str, TensorStorageMetadata], pieces: Mapping[MetadataIndex, Piece]
) -> None:
    """Every chunk has its bytes in a file of the directory itself; so no tensor is larger than the files."""
    for key, entry in tensors.items():
        itemsize = entry.properties.dtype.itemsize
        for chunk in entry.chunks:
            piece = pieces.get(MetadataIndex(key, chunk.offsets))
            if piece is None or piece.length < chunk.sizes.numel() * itemsize:
                found = "no" if piece is None else f"{piece.length:,}"
                raise ValueError(f"{key} has {found} bytes for a piece of {list(chunk.sizes)} {entry.properties.dtype}")
    ends: dict[str, int] = {}
    for piece in pieces.values():
        ends[piece.file] = max(ends.get(piece.file, 0), piece.start + piece.length)
    for file, end in ends.items():
        path = directory / file
        if path.is_symlink():
            raise ValueError(f"{path} is a link, and a checkpoint's files do not lie elsewhere")
        if not path.is_file() or path.stat().st_size < end:
            raise FileNotFoundError(f"{path} is {'truncated' if path.exists() else 'missing'}")


def open_archive(file: IO[bytes], place: str) -> tuple[int, Tensor]:
    """The byte of an archive at which its tensor's first element lies, and a tensor on the meta device for its layout.

    Raises ValueError, beginning with `place`, for an archive that is no plain one of one tensor.
    """
    try:
        records = {entry.filename.partition("/")[2]: entry for entry in _records(file)}
        data, description = records["data/0"], records["data.pkl"]
        if description.file_size > _MOST_DESCRIPTION:
            raise ValueError(f"the description of a tensor has {description.file_size:,} bytes")
        file.seek(data.header_offset + 26)  # of a record's own header, which ends with its name and more
        names = file.read(4)
        start = data.header_offset + 30 + int.from_bytes(names[:2], "little") + int.from_bytes(names[2:], "little")
        file.seek(0)
        blank = torch.load(file, weights_only=True, map_location="meta")
        if not isinstance(blank, Tensor):
            raise ValueError("it holds no tensor")
        if min(blank.stride(), default=0) < 0 or span_of(blank) > data.file_size:
            raise ValueError(f"{list(blank.shape)} {blank.dtype} is more than its {data.file_size:,} bytes")
    except DamagedFile:
        raise
    except (zipfile.BadZipFile, KeyError, ValueError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise DamagedFile(f"{place} is damaged: {str(error).splitlines()[0] if str(error) else 'no archive'}") from None
    return start + int(blank.storage_offset()) * blank.element_size(), blank


def _records(file: IO[bytes]) -> list[zipfile.ZipInfo]:
    """The records of an archive, none of them compressed: one that is could become any number of bytes."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if len(entries) > _MOST_RECORDS:
        raise ValueError(f"an archive of {len(entries):,} records is no tensor")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ValueError(f"its record {entry.filename} is compressed")
    return entries


def span_of(part: Tensor) -> int:
    """Bytes from a tensor's storage's start to the end of its last element."""
    if not part.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(part.shape, part.stride(), strict=True))
    return (int(part.storage_offset()) + last + 1) * part.element_size()
