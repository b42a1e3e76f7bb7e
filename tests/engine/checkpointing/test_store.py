"""The streamed torch_dist store: megatron-core loads what it writes, and it reads what that saved."""

import math
import os
import tempfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.checked_files import CheckedFile
from engine.checkpointing.store_reader import Scratch, StoreReader
from engine.checkpointing.store_writer import write_store


def load_slices(folder: str) -> dict[str, torch.Tensor]:
    """On each of two ranks: its half of a tensor by rows, its half of another by columns."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from torch import distributed

    rank = distributed.get_rank()
    shapes = {
        "rows": ((5, 6), (10, 6), (5 * rank, 0), (2, 1)),
        "columns": ((9, 2), (9, 4), (0, 2 * rank), (1, 2)),
    }
    state = {
        key: ShardedTensor(key, torch.zeros(local, dtype=torch.bfloat16), torch.bfloat16, local, whole, at, grid)
        for key, (local, whole, at, grid) in shapes.items()
    }
    return dist_checkpointing.load(state, folder)


def save_slices(folder: str) -> None:
    """The same two tensors saved by megatron-core; the second as a transposed, strided one."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from torch import distributed

    rank = distributed.get_rank()
    rows, columns = tensors_to_store()
    part = rows[5 * rank : 5 * rank + 5]
    strided = columns[:, 2 * rank : 2 * rank + 2].t().contiguous().t()
    state = {
        "a": ShardedTensor("rows", part, part.dtype, (5, 6), (10, 6), (5 * rank, 0), (2, 1)),
        "b": ShardedTensor("columns", strided, part.dtype, (9, 2), (9, 4), (0, 2 * rank), (1, 2)),
    }
    dist_checkpointing.save(state, folder)


def tensors_to_store() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(60).view(10, 6).bfloat16(), -torch.arange(36).view(9, 4).bfloat16()


@pytest.mark.parametrize("piece_bytes", [1, 40, 1 << 20])
def test_megatron_core_loads_any_slice_of_what_was_streamed(pool, tmp_path, piece_bytes):
    rows, columns = tensors_to_store()
    specs = [
        ("rows", (10, 6), rows.dtype, rows.__getitem__),
        ("columns", (9, 4), rows.dtype, columns.__getitem__),
    ]
    write_store(tmp_path / "store", specs, piece_bytes)
    for rank, loaded in enumerate(pool.run(load_slices, 2, str(tmp_path / "store"))):
        assert torch.equal(loaded["rows"], rows[5 * rank : 5 * rank + 5])
        assert torch.equal(loaded["columns"], columns[:, 2 * rank : 2 * rank + 2])


def test_what_megatron_core_saved_is_read_by_rows(pool, tmp_path):
    rows, columns = tensors_to_store()
    pool.run(save_slices, 2, str(tmp_path))
    store = StoreReader(tmp_path)
    assert store.keys() == ["columns", "rows"]
    for key, whole in (("rows", rows), ("columns", columns)):
        assert store.shape(key) == tuple(whole.shape)
        assert torch.equal(store.read(key), whole)
        for start in range(len(whole)):
            assert torch.equal(store.read(key, (slice(start, start + 3),)), whole[start : start + 3])
            box = (slice(start, start + 3), slice(1, 4))
            assert torch.equal(store.read(key, box), whole[box])


def test_tensors_without_dimensions_are_stored(tmp_path):
    write_store(tmp_path, [("s", (), torch.float32, lambda rows: torch.tensor(3.5))])
    assert StoreReader(tmp_path).read("s") == 3.5


@st.composite
def stored_boxes(draw):
    """A shape, the bytes of a piece, and a box in that shape."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    index = []
    for size in shape[: draw(st.integers(0, len(shape)))]:
        start = draw(st.integers(0, size))
        index.append(slice(start, draw(st.integers(start, size))))
    return tuple(shape), draw(st.sampled_from([1, 24, 100, 10**6])), tuple(index)


@given(stored_boxes(), st.sampled_from([torch.bfloat16, torch.float32, torch.uint8]), st.integers(1, 2))
@settings(max_examples=60, deadline=None)
def test_any_box_is_read_from_any_pieces(case, dtype, workers):
    shape, piece_bytes, index = case
    whole = torch.arange(math.prod(shape)).view(shape).to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        write_store(folder, [("t", shape, dtype, whole.__getitem__)], piece_bytes, workers)
        store, scratch = StoreReader(folder), Scratch()
        assert torch.equal(store.read("t", index), whole[index])
        assert torch.equal(store.read("t", (), scratch), whole)
        assert torch.equal(store.read("t", index, scratch), whole[index])


@pytest.mark.parametrize("checked", [True, False])
def test_a_box_touches_no_other_bytes(tmp_path, checked):
    """A row slice reads its own bytes, a column slice what lies between; with checksums, whole blocks of 256 KiB."""
    whole = torch.arange(64 * 65536, dtype=torch.float32).view(64, 65536)
    write_store(tmp_path, [("t", whole.shape, whole.dtype, whole.__getitem__)])
    if not checked:
        (tmp_path / "__0_0.distcp.sums").unlink()
    store = StoreReader(tmp_path)
    store.read("t", (slice(0, 1),))  # which finds where the data begins
    counts = []
    original = os.preadv

    def counting(descriptor, buffers, offset):
        counts.append(sum(map(len, buffers)))
        return original(descriptor, buffers, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", counting)
        assert torch.equal(store.read("t", (slice(17, 27),)), whole[17:27])
        assert torch.equal(store.read("t", (slice(42, 43), slice(5, 11))), whole[42:43, 5:11])
        assert torch.equal(store.read("t", (slice(50, 52), slice(100, 103))), whole[50:52, 100:103])
    row = 65536 * 4
    assert counts == ([2**18] * (11 + 1 + 2) if checked else [10 * row, 6 * 4, row + 3 * 4])
    with pytest.raises(ValueError, match="a box has no steps"):
        store.read("t", (slice(0, 4, 2),))


def test_a_box_is_read_into_any_tensor(tmp_path):
    whole = torch.randn(30, 40)
    write_store(tmp_path, [("t", whole.shape, whole.dtype, whole.__getitem__)], 600)
    store = StoreReader(tmp_path)
    for out in (torch.zeros(7, 9), torch.zeros(9, 7).t(), torch.zeros(7, 20)[:, 3:12], torch.zeros(7, 9).bfloat16()):
        store.read_into("t", (11, 5), out)
        assert torch.equal(out, whole[11:18, 5:14].to(out.dtype))
    with pytest.raises(ValueError, match=r"t of \[30, 40\] has no \[7, 9\] at \[25, 5\]"):
        store.read_into("t", (25, 5), torch.zeros(7, 9))


def test_workers_write_files_of_their_own_and_one_list_of_pieces(tmp_path):
    tensors = {f"t{number}": torch.randn(number + 1, 3, 5) for number in range(7)}
    specs = [(key, t.shape, t.dtype, t.__getitem__) for key, t in tensors.items()]
    for workers in (1, 3):
        write_store(tmp_path / str(workers), specs, 60, workers)
        store = StoreReader(tmp_path / str(workers))
        assert store.keys() == sorted(tensors)
        assert all(torch.equal(store.read(key), t) for key, t in tensors.items())
        files = sorted(path.name for path in (tmp_path / str(workers)).glob("*.distcp"))
        assert files == [f"__{number}_0.distcp" for number in range(workers)]
    with pytest.raises(ValueError, match=r"t: torch.float32 \[2\] is not \[3\]"):
        write_store(tmp_path / "bad", [("t", (3,), torch.float32, lambda rows: torch.zeros(2))], 60, 2)


def test_shares_of_a_piece_are_read_with_little_around_them(tmp_path, monkeypatch):
    read = []
    original = CheckedFile._read

    def counted(self, start, target):
        read.append(len(target))
        original(self, start, target)

    monkeypatch.setattr(CheckedFile, "_read", counted)
    whole = torch.arange(2.0**22).view(4096, 1024)  # 16 MiB
    write_store(tmp_path, [("t", whole.shape, whole.dtype, whole.__getitem__)], 2**24)
    for number in range(4):
        share = torch.empty(1024, 1024)
        StoreReader(tmp_path).read_into("t", (1024 * number, 0), share)
        assert torch.equal(share, whole[1024 * number : 1024 * (number + 1)])
    assert sum(read) < 1.15 * whole.nbytes
