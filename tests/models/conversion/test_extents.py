"""Runs of bytes: what rules call a plain copy is one, and the kernel's copy and its stand-in do the same."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from models.conversion.extents import Extent, copy_extents, read_extents
from models.conversion.hf_reader import HFReader
from models.conversion.runs import runs_of
from models.hf_config import describe
from tests.support.tiny import save_model


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt_oss"])
def test_runs_are_the_bytes_of_a_slice(tmp_path, name):
    """Of every rule, whole and in slices; what is transposed or interleaved in files has none."""
    folder = save_model(name, tmp_path, dtype=torch.bfloat16, layers=2)
    description, reader = describe(folder), HFReader(folder)
    plain = 0
    for rule in description.rules:
        for index in ((), (slice(1, rule.shape[0]),), (slice(2, 3),), (slice(1, 2), slice(0, 5))[: len(rule.shape)]):
            runs = runs_of(rule, index)
            if runs is None:
                continue
            extents = []
            for file, first, count in runs:
                path, start = reader.place(file) if file else (None, 0)
                extents.append(Extent(path, start + 2 * first if file else 0, 2 * count))
            found = torch.frombuffer(read_extents(extents), dtype=torch.bfloat16)
            assert torch.equal(found, rule.read(reader, index).flatten()), (rule.key, index)
            plain += 1
        turned = rule.transposed or any(row_range.step > 1 for row_range in rule.row_ranges)
        assert (runs_of(rule) is None) == turned, rule.key
    assert plain > 2 * len(description.rules)


@pytest.mark.parametrize("able", [True, False])
def test_extents_are_copied_to_their_place(tmp_path, monkeypatch, able):
    if not able:

        def refuse(*_):
            raise OSError(errno.EXDEV, "other file system")

        monkeypatch.setattr(os, "copy_file_range", refuse)
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 300)
    extents = [Extent(source, 3, 70_000), Extent(None, 0, 11), Extent(source, 250, 9)]
    descriptor = os.open(tmp_path / "target", os.O_CREAT | os.O_WRONLY)
    try:
        assert copy_extents(extents, descriptor, 5) == 70_020
    finally:
        os.close(descriptor)
    assert (tmp_path / "target").read_bytes() == bytes(5) + read_extents(extents)
    assert read_extents(extents)[70_000:] == bytes(11) + bytes([250, 251, 252, 253, 254, 255, 0, 1, 2])
    with pytest.raises(ValueError, match="source is truncated"):
        copy_extents([Extent(source, 76_000, 1000)], os.open(tmp_path / "other", os.O_CREAT | os.O_WRONLY), 0)
