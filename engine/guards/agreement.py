"""Whether all ranks run the same thing on machines that work, before the first weight is read."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import resource
import shutil
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
import yaml
from torch import distributed

from engine.cli import dump_run
from engine.layout import Layout
from engine.prepare import Prepared
from engine.run_status import Refused

LIBRARIES = ("torch", "megatron-core", "transformers", "transformer-engine")
ROOMS = ("engine", "models", "data")
# Settings that may differ, but seldom should.
VARIABLES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", "NVTE_")
ELEMENTS = 1 << 18  # of the collective that is tried: 1 MiB of fp32
SMALL = 1 << 20  # bytes of a model's file up to which its content is compared, not its size alone
SHARED_MEMORY = 1 << 30  # bytes of /dev/shm below which NCCL is known to fail
DISK = 1 << 30  # bytes at RUN below which hardly a checkpoint is written
SHOWN = 4  # of many differing entries or hosts


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """What one rank knows of itself and of the run; facts must be equal on all ranks."""

    host: str
    facts: dict[str, str]  # short values, or digests of `details`
    loose: dict[str, str]  # whose differences are said and do not matter
    complaints: tuple[str, ...] = ()  # of limits of its host
    details: dict[str, dict[str, str]] = field(default_factory=dict)  # of facts that are digests, entry by entry


def digest(entries: dict[str, str]) -> str:
    """A short name of all entries."""
    lines = "".join(f"{name}\0{value}\0" for name, value in sorted(entries.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Python and the libraries that numbers depend on."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "not installed"
    return found


def source_files(root: Path) -> dict[str, str]:
    """Lathe's own files with their content's digests."""
    paths = [path for room in ROOMS for path in sorted((root / room).rglob("*.py"))]
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in paths}


def model_files(folders: Iterable[Path]) -> dict[str, str]:
    """The files of a model: sizes, and digests of the small ones."""
    found = {}
    for path in sorted({path for folder in folders if folder.is_dir() for path in folder.iterdir()}):
        if path.is_file():
            size = path.stat().st_size
            content = f", {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}" if size <= SMALL else ""
            found[path.name] = f"{size} bytes{content}"
    return found


def rank_facts(prepared: Prepared) -> RankFacts:
    """What this rank contributes."""
    base = prepared.base_model
    orders = {"--data": prepared.order} | {f"--valid {name}": one for name, one in prepared.valid_orders.items()}
    details = {
        "Lathe's source": source_files(Path(__file__).parents[2]),
        "the configuration": entries_of(yaml.safe_load(dump_run(prepared.config))),
        "the model's files": model_files({base.files, base.weights}),
        "the data": entries_of({name: order.fingerprint() for name, order in orders.items()}),
    }
    resume = "none" if prepared.resume is None else f"step {prepared.resume.step}, {prepared.resume.manifest['data']}"
    facts = versions() | {name: digest(entries) for name, entries in details.items()}
    facts |= {"the checkpoint to resume from": resume, "the length in steps": str(prepared.total_steps)}
    loose = {name: os.environ[name] for name in sorted(os.environ) if name.startswith(VARIABLES)}
    if torch.cuda.is_available():
        loose["the GPU"] = torch.cuda.get_device_name()
    first_of_host = os.environ.get("LOCAL_RANK", "0") == "0"
    return RankFacts(
        host=socket.gethostname(),
        facts=facts,
        loose=loose,
        complaints=tuple(complaints(prepared.run.path, distributed.get_world_size())) if first_of_host else (),
        details=details,
    )


def entries_of(value: object, name: str = "") -> dict[str, str]:
    """The single values of nested mappings under names such as `optim.lr`; lists are values."""
    if not isinstance(value, dict):
        return {name: str(value)}
    parts = [entries_of(inner, f"{name}.{key}" if name else str(key)) for key, inner in value.items()]
    return {entry: text for part in parts for entry, text in part.items()}


def complaints(run: Path, world_size: int) -> list[str]:
    """What this host's limits will not stand, in sentences."""
    found = []
    files, sockets = resource.getrlimit(resource.RLIMIT_NOFILE)[0], 256 + 4 * world_size
    if files < sockets:  # gloo's groups keep a socket to each of their ranks
        found.append(f"a process may open {files:,} files and sockets, and will want {sockets:,}: ulimit -n 65536")
    if torch.cuda.is_available() and (free := shutil.disk_usage("/dev/shm").free) < SHARED_MEMORY:
        found.append(f"/dev/shm has {free / 2**20:,.0f} MiB free, NCCL may want more: give containers --shm-size 8g")
    there = next(path for path in (run.resolve(), *run.resolve().parents) if path.exists())
    if (free := shutil.disk_usage(there).free) < DISK:
        found.append(f"{there} has {free / 2**20:,.0f} MiB free for checkpoints: make room, or give another --output")
    return found


def ranks_text(ranks: list[int]) -> str:
    """Ranks as ranges: `ranks 0-7 and 16`."""
    ranges: list[list[int]] = []
    for rank in ranks:
        if ranges and rank == ranges[-1][1] + 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(words)}"


def hosts_text(hosts: Iterable[str]) -> str:
    """The first few names of hosts."""
    names = list(dict.fromkeys(hosts))
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def difference(name: str, values: list[str], hosts: list[str]) -> str:
    """Which ranks have which value of something, the commonest first; empty where all are equal."""
    by_value: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        by_value.setdefault(value, []).append(rank)
    if len(by_value) < 2:
        return ""
    parts = [
        f"{value or 'nothing'} on {ranks_text(ranks)} ({hosts_text(hosts[rank] for rank in ranks)})"
        for value, ranks in sorted(by_value.items(), key=lambda item: -len(item[1]))
    ]
    return f"{name} is {', '.join(parts)}"


def differences(name: str, entries: list[dict[str, str]], hosts: list[str]) -> list[str]:
    """The same, entry by entry of a fact that is a digest of many."""
    names = dict.fromkeys(entry for one in entries for entry in one)
    found = [difference(f"{name}, {entry},", [one.get(entry, "") for one in entries], hosts) for entry in names]
    return [one for one in found if one]


def check_layouts(layout: Layout) -> None:
    """Compares what process groups are built from, which hang where it differs; every rank calls it, in the world.

    Refused, the same on every rank, where layouts or numbers of ranks differ.
    """
    sizes = entries_of(dataclasses.asdict(layout)) | {"the number of ranks": os.environ.get("WORLD_SIZE", "1")}
    ranks: list[tuple[str, dict[str, str]]] = [("", {})] * distributed.get_world_size()
    distributed.all_gather_object(ranks, (socket.gethostname(), sizes))
    if wrong := differences("the layout", [entries for _, entries in ranks], [host for host, _ in ranks]):
        raise _disagreement("; ".join(wrong))


def _disagreement(wrong: str) -> Refused:
    return Refused(f"the ranks do not agree: {wrong}; make all nodes the same and start again")


def check_agreement(prepared: Prepared, device: torch.device) -> list[str]:
    """Compares all ranks and tries a collective; every rank calls it. What there is to say, a line each.

    Refused, the same on every rank, where ranks differ in something that the result depends on, or cannot add.
    """
    own = rank_facts(prepared)
    sent = RankFacts(host=own.host, facts=own.facts, loose=own.loose, complaints=own.complaints)
    ranks: list[RankFacts] = [sent] * distributed.get_world_size()
    distributed.all_gather_object(ranks, sent)
    hosts = [rank.host for rank in ranks]
    for name in own.facts:
        wrong = difference(name, [rank.facts.get(name, "") for rank in ranks], hosts)
        if wrong and name in own.details:
            entries: list[dict[str, str]] = [{}] * len(ranks)
            distributed.all_gather_object(entries, own.details[name])
            every = differences(name, entries, hosts)
            wrong = "; ".join(every[:SHOWN]) + (f"; and {len(every) - SHOWN} more" if len(every) > SHOWN else "")
        if wrong:
            raise _disagreement(wrong)
    milliseconds = try_collective(device)
    lines = [
        f"ranks: {len(ranks):,} agree, on {hosts_text(hosts)}; all added up 1 MiB in {milliseconds:,.0f} ms",
        *(f"warning: on {rank.host}, {sentence}" for rank in ranks for sentence in rank.complaints),
    ]
    names = dict.fromkeys(name for rank in ranks for name in rank.loose)
    loose = [difference(name, [rank.loose.get(name, "") for rank in ranks], hosts) for name in names]
    return lines + [f"warning: {one}" for one in loose if one]


def try_collective(device: torch.device) -> float:
    """Adds up a known number over all ranks; milliseconds, or Refused where the sum is another."""
    world_size = distributed.get_world_size()
    numbers = torch.full((ELEMENTS,), float(distributed.get_rank() + 1), device=device)
    distributed.all_reduce(numbers)  # which sets up what later ones use
    wanted = world_size * (world_size + 1) / 2
    wrong = numbers[numbers != wanted]
    sums: list[tuple[str, float] | None] = [None] * world_size
    distributed.all_gather_object(sums, (socket.gethostname(), float(wrong[0])) if len(wrong) else None)
    if named := [f"{one[1]} on rank {rank} ({one[0]})" for rank, one in enumerate(sums) if one is not None]:
        raise Refused(
            f"1 to {world_size} added up over the ranks to {', '.join(named[:SHOWN])} instead of {wanted}: a network "
            "or a device corrupts what it carries; start again without that host"
        )
    started = time.perf_counter()
    distributed.all_reduce(numbers)
    float(numbers[0])  # waits for the device
    return (time.perf_counter() - started) * 1000
