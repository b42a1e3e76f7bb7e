"""Ranks that differ in what a result depends on are told apart before weights are read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import distributed

from engine.cli import parse_run
from engine.guards import agreement
from engine.layout import world_from_environment
from engine.mesh import build_mesh
from engine.prepare import prepare_run
from engine.run_status import Refused
from tests.support.tiny import save_model, write_documents


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_model("qwen2_tied", folder / "model", layers=2)
    write_documents(folder / "data", 14)
    write_documents(folder / "other", 10)
    return folder


def arguments(inputs: Path, output: Path, *extra: str, data: str = "data") -> list[str]:
    fixed = ["--model", inputs / "model", "--data", inputs / data, "--output", output, "--precision", "fp32"]
    return [
        *map(str, fixed),
        *["--seq-len", "96", "--global-batch-size", "4", "--steps", "2", "--optim.lr", "1e-2"],
        *extra,
    ]


def agree(own: list[list[str]], library: str = "") -> str:
    """The lines of a check in which every rank has its own arguments, or its error."""
    rank, world_size, _ = world_from_environment()
    prepared = prepare_run(parse_run(own[rank]), world_size=world_size, cuda=False)
    mesh = build_mesh(prepared.config.layout)
    versions = agreement.versions
    if library and rank == 1:
        agreement.versions = lambda: versions() | {library: "0.1"}
    try:
        return "\n".join(agreement.check_agreement(prepared, torch.device("cpu")))
    except Refused as error:
        return f"{error}"
    finally:
        agreement.versions = versions
        assert mesh.world_size == world_size


def agree_on_copies(own: list[str], other: str) -> str:
    """The same arguments on all ranks; what the second finds under the path of --data is `other`."""
    rank, world_size, _ = world_from_environment()
    config = parse_run(own)
    found = dataclasses.replace(config, data=(other,)) if rank == 1 else config
    prepared = prepare_run(found, world_size=world_size, cuda=False)
    build_mesh(config.layout)
    try:
        return "\n".join(agreement.check_agreement(dataclasses.replace(prepared, config=config), torch.device("cpu")))
    except Refused as error:
        return f"{error}"


def test_ranks_that_agree_say_so_in_one_line(pool, inputs, tmp_path):
    lines = pool.run(agree, 2, [arguments(inputs, tmp_path / "run")] * 2)[0].splitlines()
    assert lines[0].startswith("ranks: 2 agree, on ") and "added up 1 MiB in" in lines[0]
    assert all(line.startswith("warning: ") for line in lines[1:])  # of this machine's limits


def test_what_differs_is_named_on_every_rank(pool, inputs, tmp_path):
    same = arguments(inputs, tmp_path / "run")
    rate = arguments(inputs, tmp_path / "run", "--optim.lr", "2e-2")
    found = pool.run(agree, 2, [same, rate])
    assert found[0] == found[1]
    assert found[0].startswith("the ranks do not agree: the configuration, optim.lr, is 0.01 on rank 0 (")
    assert ", 0.02 on rank 1 (" in found[0] and found[0].endswith("make all nodes the same and start again")
    found = pool.run(agree, 2, [same, same], "torch")
    assert found[0] == found[1]
    assert f"torch is {torch.__version__} on rank 0" in found[0] and "0.1 on rank 1" in found[0]


def test_other_data_of_one_name_is_noticed(pool, inputs, tmp_path):
    """Nodes with copies of their own: the same path holds other documents on one of them."""
    both = [arguments(inputs, tmp_path / "run"), arguments(inputs, tmp_path / "run", data="other")]
    found = pool.run(agree, 2, both)
    assert found[0] == found[1]
    settings = f"the configuration, data, is ['{inputs / 'data'}'] on rank 0 ("
    assert f"the ranks do not agree: {settings}" in found[0] and f"['{inputs / 'other'}'] on rank 1" in found[0]


def test_copies_of_one_path_that_differ(pool, inputs, tmp_path):
    """Nodes with disks of their own: the same path holds other documents on one of them."""
    found = pool.run(agree_on_copies, 2, arguments(inputs, tmp_path / "run"), str(inputs / "other"))
    assert found[0] == found[1] and found[0].startswith("the ranks do not agree: the data, --data.")
    assert agreement.difference("the data, --data,", ["a", "a", "b"], ["n1", "n1", "n2"]) == (
        "the data, --data, is a on ranks 0-1 (n1), b on rank 2 (n2)"
    )


def corrupted() -> str:
    """Rank 1 adds up wrongly."""
    all_reduce = distributed.all_reduce

    def wrong(tensor, *rest, **options):
        all_reduce(tensor, *rest, **options)
        if distributed.get_rank() == 1:
            tensor[77] += 1

    distributed.all_reduce = wrong
    try:
        agreement.try_collective(torch.device("cpu"))
    except Refused as error:
        return str(error)
    finally:
        distributed.all_reduce = all_reduce
    return ""


def test_a_sum_that_is_wrong_is_named(pool):
    one, other = pool.run(corrupted, 2)
    assert one == other and one.startswith("1 to 2 added up over the ranks to 4.0 on rank 1 (")


def test_words():
    assert agreement.ranks_text([0, 1, 2, 7]) == "ranks 0-2, 7"
    assert agreement.hosts_text(f"n{number}" for number in range(6)) == "n0, n1, n2, n3 and 2 more"
    settings = {"steps": 3, "optim": {"lr": 0.1}, "data": ["a", "b"], "mcore": {}}
    assert agreement.entries_of(settings) == {"steps": "3", "optim.lr": "0.1", "data": "['a', 'b']"}


def test_limits_of_a_host(monkeypatch, tmp_path):
    monkeypatch.setattr(agreement.resource, "getrlimit", lambda kind: (300, 300))
    monkeypatch.setattr(agreement.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5 << 20}))
    files, disk = agreement.complaints(tmp_path / "not" / "made", 64)
    assert "a process may open 300 files and sockets, and will want 512: ulimit -n" in files
    assert disk.startswith(f"{tmp_path} has 5 MiB free for checkpoints")
