"""The streamed torch_dist store: megatron-core loads what it writes, and it reads what that saved."""

import pytest
import torch

from engine.tensor_store import StoreReader, write_store


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


def test_tensors_without_dimensions_are_stored(tmp_path):
    write_store(tmp_path, [("s", (), torch.float32, lambda rows: torch.tensor(3.5))])
    assert StoreReader(tmp_path).read("s") == 3.5
