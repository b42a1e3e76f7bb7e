"""--optim.gradients bf16: within bf16's rounding of fp32 sums, and a resume that repeats it to the last bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.index import write_index
from engine.config import OptimConfig
from engine.layout import Layout
from engine.mesh import build_mesh
from engine.optim import build_optimizer, update
from engine.step import wrap_chunks
from models.build import build_chunks, transformer_config
from models.hf_config import describe
from tests.engine.checkpointing.test_resume import interrupt, metrics, run, tensors
from tests.support.marks import slow
from tests.support.parity import INDEX, OPTIM
from tests.support.tiny import VOCABULARY, conversations, save_model
from tests.support.training import relative, train

LAYOUTS = {"dp2": (2, Layout()), "tp2": (2, Layout(tp=2, sp=True)), "pp2": (2, Layout(pp=2)), "ep2": (2, Layout(ep=2))}


@pytest.mark.parametrize(
    ("name", "layout"), [("llama", "dp2"), ("qwen2_tied", "pp2"), ("olmo3", "tp2"), ("gpt_oss", "ep2")]
)
def test_sums_in_bf16_stay_near_those_in_fp32(pool, tmp_path, name, layout):
    """The sum of n summands is off by at most n - 1 roundings of 2**-9, and mostly by far less."""
    folder, (ranks, degrees) = save_model(name, tmp_path), LAYOUTS[layout]
    wide, narrow = (
        pool.run(train, ranks, folder, degrees, INDEX, 4, replace(OPTIM, gradients=kind), {}, "bf16")[0]
        for kind in ("fp32", "bf16")
    )
    assert narrow.losses[0] == wide.losses[0]  # before the first update
    np.testing.assert_allclose(narrow.losses, wide.losses, rtol=5e-3)
    np.testing.assert_allclose(narrow.norms, wide.norms, rtol=2e-2)
    errors = {key: relative(narrow.gradients[key], gradient) for key, gradient in wide.gradients.items()}
    assert np.median(list(errors.values())) > 2**-12 and max(errors.values()) < 2e-2, errors
    assert all(torch.equal(one, one.bfloat16().float()) for one in narrow.gradients.values())


def updated(folder: Path, gradients: str) -> tuple[set, set, torch.Tensor]:
    """Gives every parameter a gradient that bf16 knows and updates once; (dtypes of buffers and states, weights)."""
    description, mesh = describe(folder), build_mesh(Layout())
    config = transformer_config(description, layout=Layout(), precision="bf16")
    chunks = build_chunks(description, config, backend="native", groups=mesh.groups)
    wrapped = wrap_chunks(chunks, mesh, gradients=gradients)
    optimizer = build_optimizer(OptimConfig(gradients=gradients), wrapped, mesh, bf16=True)
    for parameter in chunks[0].parameters():
        parameter.data.fill_(1)
    optimizer.reload_model_params()
    for parameter in chunks[0].parameters():
        parameter.main_grad.copy_(torch.linspace(-1, 1, parameter.numel()).bfloat16().view_as(parameter))
    update(optimizer, lr=0.1, clip_grad=1.0)
    buffers = {buffer.grad_data.dtype for chunk in wrapped for buffer in chunk.buffers}
    state = optimizer.chained_optimizers[0].optimizer.state
    states = {tensor.dtype for moments in state.values() for tensor in moments.values()}
    return buffers, states, torch.cat([parameter.detach().float().flatten() for parameter in chunks[0].parameters()])


def test_moments_and_updates_stay_in_fp32(pool, tmp_path):
    folder = save_model("llama", tmp_path, layers=1)
    wide, narrow = (pool.run(updated, 1, folder, kind)[0] for kind in ("fp32", "bf16"))
    assert (wide[0], narrow[0]) == ({torch.float32}, {torch.bfloat16})
    assert wide[1] == narrow[1] == {torch.float32}
    assert torch.equal(narrow[2], wide[2]) and (wide[2] != 1).any()


@pytest.mark.parametrize("layout", ["--pp 2", *(slow(one) for one in ("--tp 2", ""))])
def test_resume_is_bitwise(pool, tmp_path, layout):
    save_model("qwen2_tied", tmp_path / "model", layers=2)
    write_index(tmp_path / "data", conversations(14, 1).documents, vocab_size=VOCABULARY)

    def arguments(output: Path, *extra: str) -> list[str]:
        paths = ["--model", tmp_path / "model", "--data", tmp_path / "data", "--output", output]
        shape = "--seq-len 96 --global-batch-size 4 --steps 4 --checkpoint.every 2 --precision bf16"
        return [*map(str, paths), *shape.split(), "--optim.lr", "1e-2", *layout.split(), *extra]

    whole, cut, wide = tmp_path / "whole", tmp_path / "cut", tmp_path / "wide"
    pool.run(run, 2, arguments(whole, "--optim.gradients", "bf16"))
    interrupt(whole, cut, 2)
    pool.run(run, 2, arguments(cut, "--optim.gradients", "bf16"))
    assert metrics(cut) == metrics(whole)
    found, wanted = tensors(cut, 4), tensors(whole, 4)
    assert found.keys() == wanted.keys()
    assert [key for key, tensor in wanted.items() if not torch.equal(found[key], tensor)] == []
    pool.run(run, 2, arguments(wide))
    assert metrics(wide)[1:] != metrics(whole)[1:]
