"""Files that were made to harm: nothing in them is executed, no path leaves its directory, and memory is bounded."""

import io
import json
import os
import pickle
import resource
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from data.checksums import Sums, write_sums
from engine.checkpointing.directory import MANIFEST, read_manifest
from engine.checkpointing.store_reader import StoreReader
from engine.checkpointing.store_writer import write_store

INDEX = MetadataIndex("t", torch.Size([0, 0]))


@pytest.fixture
def store(tmp_path) -> Path:
    whole = torch.arange(12.0).view(3, 4)
    write_store(tmp_path / "state", [("t", whole.shape, whole.dtype, whole.__getitem__)])
    (tmp_path / "state" / "__0_0.distcp.sums").unlink()
    return tmp_path / "state"


def change(store: Path, edit) -> None:
    """Lets `edit` change what `.metadata` holds."""
    metadata = pickle.loads((store / ".metadata").read_bytes())
    edit(metadata)
    (store / ".metadata").write_bytes(pickle.dumps(metadata))


class Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_is_not_executed(store, tmp_path):
    change(store, lambda metadata: setattr(metadata, "planner_data", Payload(tmp_path / "marker")))
    with pytest.raises(ValueError, match=r"it asks for posix.system, which no checkpoint has"):
        StoreReader(store)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Payload(tmp_path / "marker")))
        file.writestr("archive/data/0", bytes(48))
        file.writestr("archive/version", "3")
    write_store(store, [("t", (3, 4), torch.float32, torch.zeros(3, 4).__getitem__)])
    put_archive(store, archive.getvalue())
    with pytest.raises(ValueError, match=r"the piece at byte 0 is damaged"):
        StoreReader(store).read("t")
    assert not (tmp_path / "marker").exists()


def put_archive(store: Path, content: bytes) -> None:
    (store / "__0_0.distcp").write_bytes(content)
    (store / "__0_0.distcp.sums").unlink(missing_ok=True)
    change(store, lambda m: m.storage_data.update({INDEX: _StorageInfo("__0_0.distcp", 0, len(content))}))


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "..", "", "sub/file", "."])
def test_paths_do_not_leave_their_directory(store, name):
    change(store, lambda metadata: setattr(metadata.storage_data[INDEX], "relative_path", name))
    with pytest.raises(ValueError, match="names a file outside its directory"):
        StoreReader(store)


def test_links_do_not_leave_their_directory(store, tmp_path):
    (store / "__0_0.distcp").rename(tmp_path / "elsewhere")
    (store / "__0_0.distcp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link"):
        StoreReader(store)


def resized(size: tuple[int, ...], *chunks: tuple[tuple[int, ...], tuple[int, ...]]):
    def edit(metadata) -> None:
        entry = metadata.state_dict_metadata["t"]
        entry.size = torch.Size(size)
        entry.chunks[:] = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in chunks]
        info = metadata.storage_data[INDEX]
        for offsets, _ in chunks:
            metadata.storage_data[MetadataIndex("t", torch.Size(offsets))] = info

    return edit


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (resized((2**40, 4), ((0, 0), (2**40, 4))), "bytes for a piece"),
        (resized((2**62, 2**62), ((0, 0), (2**62, 2**62))), "larger than any tensor"),
        (resized((3, 4), ((0, 0), (4, 4))), "outside the tensor"),
        (resized((3, 4), ((-1, 0), (3, 4))), "no shape"),
        (resized((3, 4), ((0, 0), (2, 4))), "cover 8 of 12"),
        (resized((3, 4), ((0, 0), (2, 4)), ((1, 0), (1, 4))), "two pieces of t hold the same elements"),
        (lambda m: setattr(m.storage_data[INDEX], "offset", -5), "a piece of 't' lies from -5"),
        (lambda m: setattr(m.storage_data[INDEX], "length", 2**60), "is truncated"),
        (lambda m: setattr(m.storage_data[INDEX], "transform_descriptors", ["zstd"]), "is compressed"),
        (lambda m: m.storage_data.clear(), "has no bytes"),
        (lambda m: setattr(m, "state_dict_metadata", 7), "is damaged"),
    ],
)
def test_numbers_that_cannot_be_are_refused(store, edit, sentence):
    change(store, edit)
    with pytest.raises(ValueError, match=sentence):
        StoreReader(store).read("t")


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_what_would_take_much_memory_is_refused(store):
    before = peak()
    (store / ".metadata").write_bytes(b"\x80\x02}r" + struct.pack("<I", 2**31 - 1) + b".")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(ValueError, match=r"\.metadata is refused"):  # room for 2,147,483,647 objects
        StoreReader(store)
    assert resource.getrlimit(resource.RLIMIT_AS) == limits
    os.truncate(store / ".metadata", 2**31)
    with pytest.raises(ValueError, match="it has 2,147,483,648 bytes"):
        StoreReader(store)
    write_store(store, [("t", (3, 4), torch.float32, torch.zeros(3, 4).__getitem__)])
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(2**28))  # 256 KiB that unfold to a thousand times as much
        file.writestr("archive/data/0", bytes(48))
    put_archive(store, archive.getvalue())
    with pytest.raises(ValueError, match=r"its record archive/data.pkl is compressed"):
        StoreReader(store).read("t")
    assert peak() - before < 2**29 + 2**28  # making the bomb takes some


def test_checksums_of_absurd_number_are_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(10_000))
    write_sums(path, 4096)
    beside = tmp_path / "file.sums"
    content = bytearray(beside.read_bytes())
    content[16:32] = struct.pack("<QQ", 2**60, 2**48)
    beside.write_bytes(content)
    with pytest.raises(ValueError, match="damaged or cut off"):
        Sums(path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd"])
def test_a_manifest_names_files_of_its_own_directory(tmp_path, name):
    (tmp_path / MANIFEST).write_text(json.dumps({"format": 1, "files": {name: 0}}))
    with pytest.raises(ValueError, match="names a file outside its directory"):
        read_manifest(tmp_path)
