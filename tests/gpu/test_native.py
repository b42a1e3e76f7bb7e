"""The native backend on CUDA: exact in fp32, close in bf16, isolated, frugal, and resumable on either side."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import gpu
from tests.support.tiny import EXPERTS, MODELS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(gpu.NO_GPU, reason="no CUDA device is visible")]

DENSE = [name for name in MODELS if name not in EXPERTS]
CURVE_STEPS = 50
# Where a curve can be followed: with these weights and sinks fp32 itself leaves another fp32's course at 5e-4.
CURVE_RATES = {"gpt_oss": 1e-4}
BATCHING = {
    "two bins a microbatch": {"micro_batch_size": 2},
    "eight small bins a microbatch": {"micro_batch_size": 8, "seq_len": 48},
    "batches of bins": {"batch_unit": "sequences", "global_batch_size": 3, "seq_len": 96, "pad_documents_to": 4},
    "much padding": {"pad_documents_to": 16, "seq_len": 192},
}
MEGABYTE = 1e6


def optim(**changes):
    from engine.config import OptimConfig

    return OptimConfig(**({"lr": 1e-3, "weight_decay": 0.1, "clip_grad": 1.0, "schedule": "constant"} | changes))


def check_exact(folder, options: dict, **settings) -> None:
    """Four steps in fp32 against the plain model on the host: losses, norms and every gradient to 1e-4."""
    from tests.support.tiny import conversations

    # At higher rates Adam's first steps, by gradients' signs, make a ten-thousandth of nothing.
    index, slow = conversations(30), optim(lr=2e-4)
    wanted = gpu.reference(folder, index, 4, slow, options)
    found = gpu.train(folder, "native", "fp32", index, 4, slow, options, **settings)
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=1e-4)
    np.testing.assert_allclose(found.norms, wanted.norms, rtol=1e-4)
    error, name = gpu.worst_gradient(found, wanted)
    assert error < 1e-4, f"{name}: {error:.2e}"


@pytest.mark.parametrize("name", MODELS)
def test_fp32_matches_plain_model(folders, name):
    check_exact(folders(name), {})


@pytest.mark.parametrize("batching", BATCHING)
def test_batching_matches_plain_model(folders, batching):
    check_exact(folders("qwen2_tied"), BATCHING[batching])


@pytest.mark.parametrize(
    ("name", "recompute"),
    [("qwen2_untied", "selective"), ("qwen2_untied", "mlp"), ("qwen2_untied", "full"), ("gpt_oss", "selective")],
)
def test_recomputation_changes_nothing(folders, name, recompute):
    check_exact(folders(name), {}, recompute=recompute)


@pytest.mark.parametrize("name", MODELS)
def test_bf16_curve_follows_fp32(folders, name):
    slow = optim(lr=CURVE_RATES.get(name, 5e-4))
    wanted = gpu.curve_reference(folders(name), CURVE_STEPS, slow)
    found = gpu.train(folders(name), "native", "bf16", gpu.curve_data(), CURVE_STEPS, slow)
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=2e-2)
    assert found.losses[-1] < 0.95 * found.losses[0]  # the curve goes somewhere
    if name in DENSE:  # a router's choice turns over by rounding alone, and an expert's gradient with it
        error, tensor = gpu.worst_gradient(found, wanted)
        assert error < 0.1, f"{tensor}: {error:.2e}"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["qwen2_untied", "qwen3_windows", "olmo2", "olmo3"])
def test_other_documents_do_not_notice(folders, name, precision):
    with gpu.one_rank():
        gpu.check_isolation(gpu.build(folders(name), "native", precision))


@pytest.mark.parametrize("name", EXPERTS)
def test_other_documents_hardly_notice_with_experts(folders, name):
    """Another document's tokens go to other experts, whose groups change in size: rounding may differ, no more."""
    with gpu.one_rank():
        gpu.check_isolation(gpu.build(folders(name), "native", "fp32"), tolerance=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["qwen2_tied", "gpt_oss"])
def test_memory_does_not_grow_over_steps(folders, name, precision):
    from tests.support.tiny import conversations

    # Equal lengths and a batch of whole bins: every step holds the same.
    index = conversations(64, longest=44)
    options = {"batch_unit": "sequences", "global_batch_size": 2, "micro_batch_size": 2}
    held = gpu.train(folders(name), "native", precision, index, 12, optim(), options).held
    # What a step leaves behind differs by its own small tensors, rounded up to blocks of 512 bytes.
    assert max(held[4:]) - min(held[4:]) < 64 * 1024, held


@pytest.mark.parametrize("name", ["qwen2_untied", "olmo3", "qwen3_moe", "gpt_oss"])
def test_layers_never_wait_for_the_device(folders, name):
    from tests.support.tiny import conversations

    with gpu.one_rank():
        part = gpu.build(folders(name), "native", "bf16")
        (_, batch), *_ = gpu.first_batches(part, conversations(8))

        def forward_and_backward() -> None:
            arguments = (batch.tokens, batch.packed.positions[None], None)
            part.chunks[0](*arguments, labels=batch.targets, packed_seq_params=batch.packed).backward()

        forward_and_backward()  # the rotary tables are made, once a microbatch, and kernels are loaded
        torch.cuda.set_sync_debug_mode("error")
        try:
            forward_and_backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def loss_head(vocabulary: int, tokens: int, dtype: torch.dtype) -> tuple[float, float, float]:
    """(loss, the plain loss, peak megabytes above the inputs and the weight's gradient) at hidden size 1,024."""
    from models.layers.loss import loss_sum

    generator = torch.Generator("cuda").manual_seed(1)
    shape = {"generator": generator, "device": "cuda", "dtype": dtype}
    hidden = torch.randn(tokens, 1024, **shape).requires_grad_()
    weight = torch.randn(vocabulary, 1024, **shape).mul_(0.02).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), generator=generator, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    total = loss_sum(hidden, weight, labels, vocab_size=vocabulary)
    total.backward()
    torch.cuda.synchronize()
    # fp32 sums are the gradient itself; bf16 has them beside the gradient that they are rounded to.
    gradient = weight.numel() * (4 if dtype == torch.float32 else 6)
    above = torch.cuda.max_memory_allocated() - before - gradient
    with torch.no_grad():
        plain = sum(
            torch.nn.functional.cross_entropy((rows.float() @ weight.float().t()), targets, reduction="sum").double()
            for rows, targets in zip(hidden.split(512), labels.split(512), strict=True)
        )
    return float(total), float(plain), above / MEGABYTE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_loss_head_memory_is_flat_in_the_vocabulary(dtype):
    from models.layers.loss import CUDA_CHUNK_BYTES

    peaks = {}
    for vocabulary in (50_000, 200_000):
        loss, plain, peaks[vocabulary] = loss_head(vocabulary, 16_384, dtype)  # several chunks of either
        assert loss == pytest.approx(plain, rel=1e-5 if dtype == torch.float32 else 1e-3)
    # A chunk's logits, which become their gradient in place; the hidden states' gradient; workspaces.
    assert peaks[200_000] < 1.75 * CUDA_CHUNK_BYTES / MEGABYTE
    assert peaks[200_000] < 1.1 * peaks[50_000] + 8


@pytest.mark.slow
def test_saved_on_the_gpu_and_resumed_on_either_side(inputs, tmp_path):
    flags = ("--precision", "fp32", "--backend", "native")
    whole = gpu.pretrain(inputs, tmp_path / "whole", *flags)
    again = gpu.resume(inputs, tmp_path / "whole", tmp_path / "gpu", *flags)
    gpu.assert_same_course(again, whole, loss=1e-5, norm=1e-4)
    host = gpu.resume(inputs, tmp_path / "whole", tmp_path / "host", *flags, on_host=True)
    gpu.assert_same_course(host, whole, loss=1e-4, norm=1e-3)


@pytest.mark.slow
def test_saved_on_the_host_and_resumed_on_the_gpu(inputs, tmp_path):
    flags = ("--precision", "fp32", "--backend", "native")
    whole = gpu.pretrain(inputs, tmp_path / "whole", *flags, on_host=True)
    found = gpu.resume(inputs, tmp_path / "whole", tmp_path / "gpu", *flags)
    gpu.assert_same_course(found, whole, loss=1e-4, norm=1e-3)


@pytest.mark.slow
def test_bf16_resumes_on_the_gpu(inputs, tmp_path):
    flags = ("--precision", "bf16", "--backend", "native")
    whole = gpu.pretrain(inputs, tmp_path / "whole", *flags)
    found = gpu.resume(inputs, tmp_path / "whole", tmp_path / "gpu", *flags)
    # Flash attention's gradient is summed in an order that changes from run to run.
    gpu.assert_same_course(found, whole, loss=2e-3, norm=2e-2)
