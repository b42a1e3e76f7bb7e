"""Byte ranges: what rules call a plain copy is one, and the kernel's copy and its stand-in do the same."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from models.conversion.byte_ranges import ByteRange, copy_byte_ranges, iterate_byte_ranges, plain_ranges
from models.conversion.hf_reader import HFReader
from models.hf_config import describe
from tests.support.tiny import save_model


def read_byte_ranges(byte_ranges: list[ByteRange]) -> bytearray:
    return bytearray(b"".join(map(bytes, iterate_byte_ranges(byte_ranges))))


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt_oss"])
def test_ranges_are_the_bytes_of_a_slice(tmp_path, name):
    """Of every rule, whole and in slices; what is transposed or interleaved in files has none."""
    folder = save_model(name, tmp_path, dtype=torch.bfloat16, layers=2)
    description, reader = describe(folder), HFReader(folder)
    plain = 0
    for rule in description.rules:
        for index in ((), (slice(1, rule.shape[0]),), (slice(2, 3),), (slice(1, 2), slice(0, 5))[: len(rule.shape)]):
            byte_ranges = plain_ranges(rule, index, reader.first_byte, 2)
            if byte_ranges is None:
                continue
            found = torch.frombuffer(read_byte_ranges(byte_ranges), dtype=torch.bfloat16)
            assert torch.equal(found, rule.read(reader, index).flatten()), (rule.key, index)
            plain += 1
        turned = rule.transposed or any(row_range.step > 1 for row_range in rule.row_ranges)
        assert (plain_ranges(rule, (), reader.first_byte, 2) is None) == turned, rule.key
    assert plain > 2 * len(description.rules)


@pytest.mark.parametrize("able", [True, False])
def test_byte_ranges_are_copied_to_their_place(tmp_path, monkeypatch, able):
    if not able:

        def refuse(*_):
            raise OSError(errno.EXDEV, "other file system")

        monkeypatch.setattr(os, "copy_file_range", refuse)
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 300)
    byte_ranges = [ByteRange(source, 3, 70_000), ByteRange(None, 0, 11), ByteRange(source, 250, 9)]
    descriptor = os.open(tmp_path / "target", os.O_CREAT | os.O_WRONLY)
    try:
        assert copy_byte_ranges(byte_ranges, descriptor, 5) == 70_020
    finally:
        os.close(descriptor)
    assert (tmp_path / "target").read_bytes() == bytes(5) + read_byte_ranges(byte_ranges)
    assert read_byte_ranges(byte_ranges)[70_000:] == bytes(11) + bytes([250, 251, 252, 253, 254, 255, 0, 1, 2])
    with pytest.raises(ValueError, match="source is truncated"):
        copy_byte_ranges([ByteRange(source, 76_000, 1000)], os.open(tmp_path / "other", os.O_CREAT | os.O_WRONLY), 0)
