"""Fused functions: compiled they are the eager ones, for all numbers of tokens; on the meta device one operator."""

from __future__ import annotations

import sys
import sysconfig
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import metrics
from torch.utils._python_dispatch import TorchDispatchMode

from models.layers import gated, loss, norm, rope
from models.layers.fused import compiler_fault

WIDTH, HEADS, VOCABULARY = 64, 3, 131
# Of each function: how many kernels the host's compiler makes of it, which fuses sums less than CUDA's; None where
# that is not telling. In bf16 all results are the same to the bit, but for these, of which sums in fp32 are rounded.
FUNCTIONS = {
    "normed": (norm._normed, None),
    "normed late": (norm._normed, None),
    "norm's gradients": (norm._gradients, None),
    "squares": (norm._squares, 1),
    "scaled": (norm._scaled, 1),
    "products": (norm._products, None),
    "input gradient": (norm._input_gradient, 1),
    "rotated": (rope._rotated, None),
    "rotated back": (rope._rotated, None),
    "silu": (gated._activated, 1),
    "silu's gradient": (gated._gradient, 1),
    "clamped": (gated._activated, 1),
    "clamped's gradient": (gated._gradient, 1),
    "statistics": (loss._row_statistics, None),
    "loss's gradient": (loss._to_gradient, 1),
}
SUMMED = {"norm's gradients", "input gradient"}


def arguments(name: str, tokens: int, dtype: torch.dtype) -> tuple:
    torch.manual_seed(tokens)

    def draw(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(kind)

    fp32 = torch.float32
    states, gains, scale = draw(tokens, 1, WIDTH), draw(WIDTH) * 0.3 + 1, draw(tokens, 1, 1, kind=fp32).abs()
    tables = draw(tokens, 1, WIDTH), draw(tokens, 1, WIDTH)
    kind = (1.0, None, 0.0) if name.startswith("silu") else (1.702, 1.5, 1.0)
    targets, owned = torch.randint(VOCABULARY, (tokens,)), torch.arange(tokens) % 3 > 0
    largest, total = draw(tokens, kind=fp32).abs() + 4, draw(tokens, kind=fp32).abs() + 1
    return {
        "normed": (states, gains, 1e-5, False),
        "normed late": (states, gains, 1e-5, True),
        "norm's gradients": (draw(tokens, 1, WIDTH), states, gains, scale),
        "squares": (states,),
        "scaled": (states, gains, scale, False),
        "products": (draw(tokens, 1, WIDTH), states, gains, scale),
        "input gradient": (draw(tokens, 1, WIDTH), states, gains, scale, draw(tokens, 1, 1, kind=fp32)),
        "rotated": (draw(tokens, HEADS, WIDTH), *tables, False),
        "rotated back": (draw(tokens, HEADS, WIDTH), *tables, True),
        "silu": (2 * draw(tokens, 1, 2 * WIDTH), *kind),
        "silu's gradient": (draw(tokens, 1, WIDTH), 2 * draw(tokens, 1, 2 * WIDTH), *kind),
        "clamped": (2 * draw(tokens, 1, 2 * WIDTH), *kind),
        "clamped's gradient": (draw(tokens, 1, WIDTH), 2 * draw(tokens, 1, 2 * WIDTH), *kind),
        "statistics": (3 * draw(tokens, VOCABULARY), targets),
        "loss's gradient": (draw(tokens, VOCABULARY), targets, owned, largest, total),
    }[name]


def results(call, given: tuple) -> list[torch.Tensor]:
    """What a call returns, or what it writes to its first argument."""
    found = call(*given)
    if found is None:
        return [given[0]]
    return [found] if isinstance(found, torch.Tensor) else list(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_is_eager(name):
    function, kernels = FUNCTIONS[name]
    torch._dynamo.reset()
    for dtype in (torch.bfloat16, torch.float32):
        metrics.reset()
        before = counters["stats"]["unique_graphs"]
        for tokens in (48, 200, 37):
            wanted = results(function.eager, arguments(name, tokens, dtype))
            found = results(function.compiled, arguments(name, tokens, dtype))
            for one, other in zip(found, wanted, strict=True):
                assert one.dtype == other.dtype and one.shape == other.shape
                if dtype == torch.bfloat16 == one.dtype and name not in SUMMED:
                    assert torch.equal(one, other)
                else:
                    error = float((one.double() - other.double()).abs().max() / other.double().abs().max())
                    assert error < (2**-8 if one.dtype == torch.bfloat16 else 1e-6)
        assert counters["stats"]["unique_graphs"] - before == 1, "compiled anew for another number of tokens"
        assert kernels is None or metrics.generated_kernel_count == kernels


class Names(TorchDispatchMode):
    """Notes which operators are called."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_on_the_meta_device_it_is_one_operator(name):
    function, _ = FUNCTIONS[name]
    given = arguments(name, 16, torch.bfloat16)
    on_meta = tuple(one.to("meta") if isinstance(one, torch.Tensor) else one for one in given)
    with Names() as seen:
        found = results(function, on_meta)
    assert seen.names == [f"lathe::{function.name}"]
    wanted = results(function, given)
    assert [(one.shape, one.dtype) for one in found] == [(one.shape, one.dtype) for one in wanted]


def test_on_the_host_its_parts_run():
    states = torch.randn(4, 1, WIDTH)
    with Names() as seen:
        norm._squares(states)
    assert seen.names == ["aten::pow", "aten::sum"]


@pytest.fixture
def complete(monkeypatch, tmp_path):
    """A machine on which everything can be compiled; returns the folder of its compilers."""
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    sys.modules["triton"].__spec__ = ModuleSpec("triton", None)
    (tmp_path / "gcc").touch(mode=0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme=None: str(tmp_path))
    return tmp_path


def test_what_keeps_cuda_from_compiling_is_said(complete, monkeypatch):
    assert compiler_fault() is None
    (complete / "Python.h").unlink()
    assert compiler_fault().endswith(
        f"Python's headers, which {complete} lacks: install them (python3-dev or python3-devel)"
    )
    monkeypatch.setenv("CPATH", "/elsewhere")
    assert compiler_fault() is None
    (complete / "gcc").rename(complete / "clang")
    assert compiler_fault() is None
    (complete / "clang").rename(complete / "other")
    assert "a C compiler, and neither gcc nor clang is on PATH: install gcc" in compiler_fault()
    monkeypatch.setenv("CC", "other")
    assert compiler_fault() is None
    monkeypatch.setenv("CC", "another")
    assert "the C compiler that CC names, and 'another' is none" in compiler_fault()
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "Triton, which is not installed: install torch for CUDA" in compiler_fault()
