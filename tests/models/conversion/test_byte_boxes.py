"""Boxes of tensors read by bytes: just the box, in few calls, whatever its shape and wherever it goes."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from models.conversion import byte_boxes
from models.conversion.byte_boxes import GAP_BYTES, PlainFile, bytes_of
from models.conversion.hf_reader import SINGLE, HFReader

DTYPES = (torch.bfloat16, torch.float32, torch.uint8, torch.float64)


class Counted(PlainFile):
    """A file that notes what is read of it."""

    opened = 0
    reads: tuple[tuple[int, int], ...] = ()

    def __init__(self, path):
        super().__init__(path)
        Counted.opened += 1

    def read_into(self, start, target):
        Counted.reads += ((start, len(target)),)
        super().read_into(start, target)


@pytest.fixture(autouse=True)
def _count_anew():
    Counted.opened, Counted.reads = 0, ()


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_box_is_that_box_of_the_whole(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("box")
    shape = data.draw(st.lists(st.integers(1, 7), max_size=4))
    dtype = data.draw(st.sampled_from(DTYPES))
    whole = (torch.arange(torch.Size(shape).numel()).view(shape) % 251).to(dtype)
    save_file({"before": torch.ones(3, dtype=torch.uint8), "w": whole}, folder / SINGLE)
    index = tuple(
        slice(
            data.draw(st.none() | st.integers(0, size)),
            data.draw(st.none() | st.integers(0, size + 1)),
            data.draw(st.none() | st.integers(1, 3)),
        )
        for size in shape[: data.draw(st.integers(0, len(shape)))]
    )
    for gap, block in ((GAP_BYTES, 2**20), (0, 2**20), (GAP_BYTES, 16)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(byte_boxes, "GAP_BYTES", gap)
            patch.setattr(byte_boxes, "BLOCK_BYTES", block)
            patch.setattr("models.conversion.hf_reader.BLOCK_BYTES", block)
            reader = HFReader(folder)
            found = reader.read("w", index)
            assert found.dtype == dtype and torch.equal(found, whole[index])
            for out in (
                torch.empty_like(found, dtype=torch.float64),
                torch.empty(found.shape[::-1], dtype=dtype).permute(tuple(range(found.dim()))[::-1]),
            ):
                assert reader.read("w", index, out) is out
                assert torch.equal(out, whole[index].to(out.dtype))


def test_rows_are_one_read_and_thousands_of_boxes_open_a_file_once(tmp_path):
    whole = torch.arange(64 * 96.0).view(64, 96)
    save_file({"w": whole, "other": torch.ones(5)}, tmp_path / SINGLE)
    reader = HFReader(tmp_path, Counted)
    head = (tmp_path / SINGLE).read_bytes()
    length = int.from_bytes(head[:8], "little")
    first = 8 + length + json.loads(head[8 : 8 + length])["w"]["data_offsets"][0]
    Counted.reads = ()
    assert torch.equal(reader.read("w", (slice(3, 60),)), whole[3:60])
    assert torch.equal(reader.read("w", (slice(7, 8), slice(11, 90))), whole[7:8, 11:90])
    rows, piece = (first + 3 * 384, 57 * 384), (first + 7 * 384 + 44, 79 * 4)
    assert Counted.reads == (rows, piece)
    for number in range(2000):
        row = number % 64
        assert reader.read("w", (slice(row, row + 1), slice(1, 2))).item() == whole[row, 1]
        reader.read("other")
    assert Counted.opened == 1


def test_columns_far_apart_are_read_one_by_one(tmp_path):
    whole = torch.arange(4 * 3 * GAP_BYTES).view(4, -1).to(torch.uint8)
    save_file({"w": whole}, tmp_path / SINGLE)
    reader = HFReader(tmp_path, Counted)
    Counted.reads = ()
    assert torch.equal(reader.read("w", (slice(None), slice(5, 9))), whole[:, 5:9])
    assert [length for _, length in Counted.reads] == [4] * 4


def test_a_file_cut_after_it_was_opened_is_named(tmp_path):
    save_file({"w": torch.ones(1000)}, tmp_path / SINGLE)
    reader = HFReader(tmp_path)
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:2000])
    with pytest.raises(ValueError, match=f"{SINGLE} is truncated or damaged: it ends before byte 2,000"):
        reader.read("w")


def test_one_number_is_its_bytes_whatever_its_strides():
    whole = torch.arange(1.0, 5).bfloat16().view(2, 2)
    for one in (whole[1:, 0], whole[0, 1:], whole[1, 0].expand(1, 1), whole.T[1:, :1]):
        assert bytes(bytes_of(one)) == one.clone().view(1).view(torch.int16).numpy().tobytes()
    assert len(bytes_of(torch.empty(0, 3))) == 0
