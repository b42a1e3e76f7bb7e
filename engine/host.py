"""What lets megatron-core 0.16.1 train without CUDA, over gloo.

The only file of Lathe that replaces anything of torch or megatron-core, and `enable` does nothing where CUDA
is present. `tests/engine/test_host.py` holds the contract: it fails when megatron-core moves what is leaned on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from typing import Any

import torch
from packaging.version import Version
from torch.overrides import TorchFunctionMode

from engine.layout import world_from_environment

_TE, _LEAST_TE = "transformer_engine", "2.10"
_place = torch.device("cpu")  # where "cuda" goes
_enabled: _HostMode | None = None


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _HostMode(TorchFunctionMode):
    """Sends what megatron-core places on "cuda" to the host's memory."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizers accept a parameter by the string "torch.cuda.FloatTensor".
            return "torch.cuda." + func(*args).rpartition(".")[2]
        if func is torch.Tensor.to and args[0].device.type == _place.type == "meta":  # it has nothing to move
            args = tuple(_place if isinstance(argument, torch.device) else argument for argument in args)
            kwargs = {name: _place if name == "device" else value for name, value in kwargs.items()}
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _place}
        if func is torch.Tensor.to and any(map(_is_cuda, args)):
            args = tuple(_place if _is_cuda(argument) else argument for argument in args)
        return func(*args, **kwargs)


class _Event:
    """An event that has happened: work on the host is in order."""

    def __init__(self, *args, **kwargs):
        pass

    record = wait = synchronize = __init__

    def query(self) -> bool:
        return True


class _Stream(_Event):
    """The only stream of the host."""

    wait_stream = wait_event = _Event.__init__

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()


def _replace_cuda_runtime() -> None:
    stream = _Stream()
    replacements = {
        "current_device": lambda: _place,
        "synchronize": lambda device=None: None,
        "Stream": _Stream,
        "Event": _Event,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)


def _replace_rng_access() -> None:
    """Activation recomputation saves and restores one generator here, not two."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda device=None, clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def _replace_collectives() -> None:
    """Gloo wants split sizes as ints, where megatron-core hands over tensors that only CUDA turns to lists.

    And it gathers and scatters parts of one length only: of uneven ones (experts' tokens under expert tensor
    parallelism) it gets as many rows as the longest has.
    """
    from torch import distributed

    all_to_all_single = distributed.all_to_all_single
    all_gather, reduce_scatter = distributed.all_gather, distributed.reduce_scatter

    def with_int_splits(
        output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op: bool = False
    ):
        def ints(sizes):
            return sizes if sizes is None else [int(size) for size in sizes]

        return all_to_all_single(output, input, ints(output_split_sizes), ints(input_split_sizes), group, async_op)

    def gather_uneven(tensor_list, tensor, group=None, async_op: bool = False):
        if len({part.shape for part in tensor_list}) <= 1:
            return all_gather(tensor_list, tensor, group, async_op)
        longest = max(map(len, tensor_list))
        rows = [_lengthened(part, longest) for part in tensor_list]
        all_gather(rows, _lengthened(tensor, longest), group)
        for part, row in zip(tensor_list, rows, strict=True):
            part.copy_(row[: len(part)])

    def scatter_uneven(output, input_list, op=distributed.ReduceOp.SUM, group=None, async_op: bool = False):
        if len({part.shape for part in input_list}) <= 1:
            return reduce_scatter(output, input_list, op, group, async_op)
        longest = max(map(len, input_list))
        row = _lengthened(output, longest)
        reduce_scatter(row, [_lengthened(part, longest) for part in input_list], op, group)
        output.copy_(row[: len(output)])

    distributed.all_to_all_single = with_int_splits
    distributed.all_gather, distributed.reduce_scatter = gather_uneven, scatter_uneven


def _replace_gloo() -> None:
    """Gives each gloo group one thread.

    By default it has two, which write the name of the last finished operation without a lock (torch 2.13,
    ProcessGroupGloo::runLoop, lastCompletedWorkName): where two gathers of one group end at the same moment, as when
    weights are gathered beside the computation, memory is freed twice and the process dies of it, at once or later.
    """
    from torch.distributed import ProcessGroupGloo, distributed_c10d

    c10d: Any = distributed_c10d

    class OneThread(ProcessGroupGloo):
        def __init__(self, store, rank: int, size: int, timeout: timedelta):
            options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
            devices = [ProcessGroupGloo.create_device(interface=name) for name in names]
            options._devices = devices or [ProcessGroupGloo.create_default_device()]
            options._timeout, options._threads = timeout, 1
            super().__init__(store, rank, size, options)

    c10d.ProcessGroupGloo = OneThread


def _lengthened(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """The tensor with zero rows below, up to `rows`."""
    return torch.cat((tensor, tensor.new_zeros((rows - len(tensor), *tensor.shape[1:]))))


def _replace_fused_kernels() -> None:
    """Where Transformer Engine is installed but no GPU is visible, its CUDA kernels are bound all the same."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    clip_grads.multi_tensor_applier = utils.local_multi_tensor_applier
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    clip_grads.multi_tensor_scale_impl = utils.local_multi_tensor_scale


@cache
def transformer_engine_fault() -> str | None:
    """Why Transformer Engine cannot be used here, or None; what is there and does not import is hidden.

    Call it before megatron-core is imported, which imports it wherever it lies and would end with its error.
    """
    if sys.modules.get(_TE) is None and importlib.util.find_spec(_TE) is None:
        return "Transformer Engine is not installed"
    try:
        found = importlib.import_module(_TE)
        importlib.import_module(f"{_TE}.pytorch")
    except Exception as error:  # a library that is missing, or built for another torch, may raise anything
        for name in [name for name in sys.modules if name == _TE or name.startswith(f"{_TE}.")]:
            del sys.modules[name]
        sys.modules[_TE] = None  # type: ignore[assignment]  # whoever imports it now finds none
        return f"Transformer Engine is installed and does not import ({type(error).__name__}: {error})"
    if Version(str(found.__version__)) < Version(_LEAST_TE):
        return f"Transformer Engine {found.__version__} is older than {_LEAST_TE}"
    return None


def device_versions() -> tuple[tuple[int, int], tuple[int, int]]:
    """(compute capability, version of CUDA that torch was built for) of this rank's GPU."""
    number = world_from_environment()[2]  # asking for the first would occupy it for every rank
    major, minor = (torch.version.cuda or "0.0").split(".")[:2]
    return torch.cuda.get_device_capability(number), (int(major), int(minor))


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Puts all that is allocated meanwhile on torch's meta device: shapes without memory. Call `enable` first."""
    global _place
    assert _enabled is not None, "enable() comes first"
    kept, _place = _place, torch.device("meta")
    try:
        with _place:
            yield
    finally:
        _place = kept


def enable() -> bool:
    """Prepares this process for training on the host; returns False, changing nothing, where CUDA is present.

    Call it once, before a model is built. Calling it again does nothing.
    """
    global _enabled
    if torch.cuda.is_available():
        return False
    if _enabled is None:
        _replace_cuda_runtime()
        _replace_rng_access()
        _replace_collectives()
        _replace_gloo()
        _replace_fused_kernels()
        from megatron.core.transformer.moe import moe_utils

        # Defined by Transformer Engine alone, read without it (megatron-core 0.16.1: NameError).
        if not hasattr(moe_utils, "te_general_gemm"):
            moe_utils.te_general_gemm = None
        _enabled = _HostMode()
        _enabled.__enter__()
    return True


transformer_engine_fault()  # whoever imports this file imports megatron-core next
