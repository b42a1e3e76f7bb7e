"""What a run sets for CUDA, NCCL and torch, beside its own settings: chosen from plain values, said, never forced.

What a user has set stays, and is said; only what cannot work is refused. The environment is set before torch is
imported, for the driver, the allocator and NCCL read it once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.layout import Layout

RECORDED_COLLECTIVES = 2000  # of each rank, by NCCL's flight recorder
# NCCL's algorithms in which switches add, in the order in which parts arrive: their names in capitals, and all others.
_SWITCHES, _NO_SWITCHES = {"NVLS", "NVLSTREE"}, "^NVLS,NVLSTree"
_WORKSPACES = (":4096:8", ":16:8")  # with which cuBLAS sums in one order; torch refuses others
_set: dict[str, str] = {}  # by this process


@dataclass(frozen=True)
class Setting:
    """One variable of the environment, and the names under which a user may have set it."""

    name: str
    value: str
    aliases: tuple[str, ...] = ()


def wanted(layout: Layout, *, deterministic: bool, dumps: Path) -> list[Setting]:
    """What a run of this layout wants, in the order in which it is said.

    dumps: the beginning of the names of the files into which NCCL writes a rank's last collectives, once one of them
    has not ended within its time.
    """
    settings = [
        # Documents differ in length, and so do most tensors: without it blocks of the wrong sizes pile up.
        Setting("PYTORCH_ALLOC_CONF", "expandable_segments:True", ("PYTORCH_CUDA_ALLOC_CONF",)),
        Setting("TORCH_FR_BUFFER_SIZE", str(RECORDED_COLLECTIVES), ("TORCH_NCCL_TRACE_BUFFER_SIZE",)),
        Setting("TORCH_FR_DUMP_TEMP_FILE", str(dumps.absolute()), ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE",)),
        Setting("TORCH_NCCL_DUMP_ON_TIMEOUT", "1"),
    ]
    if layout.tp > 1 or layout.cp > 1:
        # megatron-core's linears start a collective and then the product that hides it, and count on the device to
        # start them in this order (tensor_parallel/layers.py, 0.16.1): up to Hopper it does with one queue alone.
        settings.append(Setting("CUDA_DEVICE_MAX_CONNECTIONS", "1"))
    if deterministic:
        settings += [
            Setting("CUBLAS_WORKSPACE_CONFIG", _WORKSPACES[0]),
            Setting("NCCL_ALGO", _NO_SWITCHES),
            Setting("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0"),
        ]
    return settings


def choose(settings: list[Setting], environment: Mapping[str, str]) -> dict[str, str]:
    """What of the settings is to be set in this environment: all that the user has not."""
    return {
        one.name: one.value for one in settings if not any(name in environment for name in (one.name, *one.aliases))
    }


def check(environment: Mapping[str, str], *, deterministic: bool) -> None:
    """Refuses what a user has set and what cannot work with --deterministic; ValueError in one sentence."""
    if not deterministic:
        return
    workspace = environment.get("CUBLAS_WORKSPACE_CONFIG", _WORKSPACES[0])
    if workspace not in _WORKSPACES:
        raise ValueError(
            f"--deterministic: CUBLAS_WORKSPACE_CONFIG is {workspace}, with which cuBLAS does not repeat its sums; "
            f"unset it or set {' or '.join(_WORKSPACES)}"
        )
    if environment.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0") != "0":
        raise ValueError(
            "--deterministic: NVTE_ALLOW_NONDETERMINISTIC_ALGO is "
            f"{environment['NVTE_ALLOW_NONDETERMINISTIC_ALGO']}, with which Transformer Engine's attention does not "
            "repeat its sums; unset it or set 0"
        )
    algorithms = environment.get("NCCL_ALGO", _NO_SWITCHES)
    named = set(re.split(r"[^A-Z]+", algorithms.upper())) & _SWITCHES
    if named != (_SWITCHES if algorithms.startswith("^") else set()):
        raise ValueError(
            f"--deterministic: NCCL_ALGO is {algorithms}, with which switches add in the order in which parts arrive; "
            f"unset it or set {_NO_SWITCHES}"
        )


def apply(layout: Layout, *, deterministic: bool, dumps: Path) -> None:
    """Sets this process's environment; call it before torch is imported. ValueError for what cannot work."""
    check(os.environ, deterministic=deterministic)
    chosen = choose(wanted(layout, deterministic=deterministic, dumps=dumps), os.environ)
    os.environ.update(chosen)
    _set.update(chosen)


def switch(*, deterministic: bool) -> None:
    """Sets torch's own switches; call it before the first product.

    Products in bf16 and fp16 are summed in fp32 throughout, also where they are split: torch's default lets cuBLAS add
    the parts in the products' own dtype. deterministic: operators that cannot repeat their sums raise an error.
    """
    import torch  # takes seconds, and the environment is set before

    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    if deterministic:
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)


def setup_line(layout: Layout, *, deterministic: bool, dumps: Path) -> str:
    """What is set, and what was left as the user has it, for the start of a run."""
    settings = wanted(layout, deterministic=deterministic, dumps=dumps)
    names = [name for one in settings for name in (one.name, *one.aliases)]
    own = [f"{name}={_set[name]}" for name in names if name in _set]
    given = [f"{name}={os.environ[name]}" for name in names if name in os.environ and name not in _set]
    said = [f"set {' '.join(own)}"] * bool(own) + [f"left as given {' '.join(given)}"] * bool(given)
    return f"environment: {'; '.join(said)}"
