"""Pure functions of a few tensors that run as one kernel on CUDA, and operation by operation on the host.

On CUDA torch.compile fuses the function, and rounds in between wherever the operations by themselves would. On
the meta device the function is one operator, `torch.ops.lathe`, so that who counts kernels and bytes there counts
what runs on CUDA.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_OPTIONS: dict[str, Any] = {
    "emulate_precision_casts": True,
    # A reduction over tokens in the same kernel as one over each token, however few the tokens are.
    "triton.mix_order_reduction_non_strict_mode": True,
}


class Fused:
    """A function that is called as it is on the host, and as one kernel on CUDA."""

    def __init__(self, function: Callable[..., Any], *, fixed: str, mutates: str, kernels: int, scratch: float):
        self.eager = function
        self.kernels, self.scratch = kernels, scratch
        self.mutates = tuple(mutates.split())
        names = list(inspect.signature(function).parameters)
        self.fixed = {names.index(name) for name in fixed.split()}
        module = function.__module__.rpartition(".")[2]
        self.name = f"{module}_{function.__name__.strip('_')}"

    def __call__(self, *arguments: Any) -> Any:
        device = arguments[0].device.type
        if device == "cuda":
            return self.compiled(*arguments)
        return self.operator(*arguments) if device == "meta" else self.eager(*arguments)

    def compiled(self, *arguments: Any) -> Any:
        """The function as one kernel, on any device."""
        return self._compile(*self._marked(arguments))

    @cached_property
    def _compile(self) -> Callable[..., Any]:
        known = torch._inductor.list_options()
        options = {name: value for name, value in _OPTIONS.items() if name in known}  # torch 2.11 may lack one
        return torch.compile(self.eager, fullgraph=True, options=options)

    def _marked(self, arguments: tuple[Any, ...]) -> Iterator[Any]:
        """The arguments with their first size marked as one that changes from call to call, and no other.

        A width that the compiler knows makes a faster kernel; without the marks each number of tokens, or once two
        models' widths were seen each width, would be compiled anew. Detached, so that it does not compile once for
        what wants gradients and once for what does not.
        """
        for place, argument in enumerate(arguments):
            if not isinstance(argument, Tensor):
                yield argument
                continue
            argument = argument.detach()
            changes = place not in self.fixed
            if changes and argument.ndim:
                torch._dynamo.maybe_mark_dynamic(argument, 0)
            for dimension in range(changes, argument.ndim):
                torch._dynamo.mark_static(argument, dimension)
            yield argument

    @cached_property
    def operator(self) -> Callable[..., Any]:
        """The function as one operator, which a `TorchDispatchMode` sees in place of its parts."""
        operator = torch.library.custom_op(f"lathe::{self.name}", self.eager, mutates_args=self.mutates)
        operator.register_fake(self.eager)
        FUSED[self.name] = self
        return operator


def compiler_fault() -> str | None:
    """What keeps the functions from being compiled for CUDA, in a sentence, or None.

    Triton (3.7) builds its launchers with CC, gcc or clang and Python's headers, when the first kernel is called.
    """
    needed = "on a GPU the first step compiles kernels with Triton"
    if importlib.util.find_spec("triton") is None:
        return f"{needed}, which is not installed: install torch for CUDA, which brings it"
    given = os.environ.get("CC")
    if given is not None and shutil.which(given) is None:
        return f"{needed} and the C compiler that CC names, and {given!r} is none: set CC to one or unset it"
    if given is None and not (shutil.which("gcc") or shutil.which("clang")):
        return f"{needed} and a C compiler, and neither gcc nor clang is on PATH: install gcc, or name a compiler by CC"
    headers = sysconfig.get_path("include", "posix_prefix")
    elsewhere = os.environ.get("CPATH") or os.environ.get("C_INCLUDE_PATH")
    if not elsewhere and not Path(headers, "Python.h").is_file():
        return f"{needed} and Python's headers, which {headers} lacks: install them (python3-dev or python3-devel)"
    return None


FUSED: dict[str, Fused] = {}  # by the name of the operator, once it was called


def fused(*, fixed: str = "", mutates: str = "", kernels: int = 1, scratch: float = 0.0) -> Callable[..., Fused]:
    """Decorates a function of tensors, floats and flags; tensors of all arguments share the size of dimension 0.

    fixed: names of arguments that do not, as weights; mutates: of those that it writes to. kernels: how many CUDA
    needs, more than one where sums over tokens end in a second stage; scratch: fp32 numbers between the stages, each
    written and read once, for each element of the first argument.
    """
    return lambda function: Fused(function, fixed=fixed, mutates=mutates, kernels=kernels, scratch=scratch)
