"""Rows of experts and their biases: placed without asking the device, summed in fp32, rounded once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from models.layers.dispatch import find_places, from_experts, to_experts
from models.layers.experts import ExpertLinear, GroupedExperts, _NoGradientWithoutRows, _Weighted, sums_by_expert

HIDDEN, EXPERTS, TOPK = 16, 8, 3


def choices(tokens: int, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(chosen [tokens, experts], real [tokens]), of which the last `padding` are not; expert 5 is never chosen."""
    generator = torch.Generator().manual_seed(3)
    likes = torch.rand(tokens, EXPERTS, generator=generator)
    likes[:, 5] = -1
    real = torch.arange(tokens) < tokens - padding
    chosen = torch.zeros(tokens, EXPERTS, dtype=torch.bool).scatter_(1, likes.topk(TOPK).indices, True)
    return chosen & real[:, None], real


@pytest.mark.parametrize("padding", [0, 5, 12])
def test_rows_are_sorted_by_expert_and_come_back(padding):
    chosen, real = choices(12, padding)
    places = find_places(chosen, real, topk=TOPK, real_tokens=12 - padding)
    wanted = [(expert, token) for expert in range(EXPERTS) for token in range(12) if chosen[token, expert]]
    assert places.tokens.tolist() == [token for _, token in wanted]
    assert places.tokens_per_expert.tolist() == chosen.sum(0).tolist()
    states, weights = torch.randn(12, HIDDEN), torch.rand(12, EXPERTS)
    rows, row_weights = to_experts(states, weights, places)
    assert row_weights.tolist() == [float(weights[token, expert]) for expert, token in wanted]
    summed = from_experts(rows * row_weights[:, None], places)
    torch.testing.assert_close(summed, states * (weights * chosen).sum(1, keepdim=True))
    assert not summed[~real].any()


def test_gradients_are_those_of_plain_indexing():
    chosen, real = choices(12, 5)
    places = find_places(chosen, real, topk=TOPK, real_tokens=7)
    states = torch.randn(12, HIDDEN, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(12, EXPERTS, dtype=torch.float64, requires_grad=True)

    def output(states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows, row_weights = to_experts(states, weights, places)
        return from_experts(rows.sin() * row_weights[:, None], places)

    assert torch.autograd.gradcheck(output, (states, weights))


def test_a_tokens_outputs_are_rounded_once():
    """In bf16 the sum of 64 outputs is off by no more than its own rounding; added one by one it is off by 3%."""
    tokens = topk = 64
    everything = torch.ones(tokens, topk, dtype=torch.bool)
    places = find_places(everything, everything[:, 0], topk=topk, real_tokens=tokens)
    rows = (torch.randn(tokens * topk, HIDDEN, generator=torch.Generator().manual_seed(1)) + 1).bfloat16()
    exact = torch.zeros(tokens, HIDDEN, dtype=torch.float64).index_add_(0, places.tokens, rows.double())
    worst = ((from_experts(rows, places).double() - exact).abs() / exact.abs()).max()
    assert worst < 2**-8


def expert_linear(width_in: int, width_out: int, experts: int, **where) -> ExpertLinear:
    """One linear layer of experts without the process groups that a model's have."""
    linear = ExpertLinear.__new__(ExpertLinear)
    torch.nn.Module.__init__(linear)
    linear.weight = torch.nn.Parameter(torch.ones(experts, width_out, width_in, **where))
    linear.bias = torch.nn.Parameter(torch.ones(experts, width_out, **where))
    return linear


def bias_gradient(rows: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """The gradient of biases [experts, width] where `rows` is the gradient of their sums."""
    linear = expert_linear(8, rows.shape[1], len(ends), dtype=rows.dtype, device=rows.device)
    bounds = torch.tensor(ends, dtype=torch.int32, device=rows.device)
    expert = torch.bucketize(torch.arange(len(rows), device=rows.device), bounds, right=True).clamp_max(len(ends) - 1)
    linear.add_bias(torch.zeros_like(rows), expert, bounds).backward(rows)
    return linear.bias.grad


def exact_sums(rows: torch.Tensor, ends: list[int]) -> torch.Tensor:
    starts = [0, *ends[:-1]]
    return torch.stack([rows[a:b].double().sum(0) for a, b in zip(starts, ends, strict=True)])


@pytest.mark.parametrize("mean", [0.0, 0.3, 1.0])
def test_bias_gradients_are_summed_in_fp32(mean):
    """8,192 tokens an expert in bf16: within one rounding of the sum in fp64."""
    ends = [8192, 8192, 8192 + 2048, 2 * 8192]
    rows = (torch.randn(ends[-1], 64, generator=torch.Generator().manual_seed(0)) + mean).bfloat16()
    exact = exact_sums(rows, ends)
    assert (bias_gradient(rows, ends).double() - exact).norm() / exact.norm() < 2**-8


def test_bias_gradients_in_fp32_are_those_of_indexing():
    ends = [0, 40, 40, 70]
    rows = torch.randn(70, HIDDEN)
    torch.testing.assert_close(bias_gradient(rows, ends).double(), exact_sums(rows, ends), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_row_beyond_the_last_expert_and_no_empty_expert_has_a_part(dtype):
    ends = [0, 40, 40, 70, 70]
    rows = torch.randn(96, HIDDEN).to(dtype)
    rows[70:] = torch.nan
    found = bias_gradient(rows, ends)
    assert torch.isfinite(found).all() and not found[[0, 2, 4]].any() and found[[1, 3]].all()
    empty = sums_by_expert(rows[:0], torch.zeros(5, dtype=torch.int32))
    assert empty.shape == (5, HIDDEN) and not empty.any()


def test_weights_of_experts_without_rows_get_no_gradient():
    weight = torch.ones(3, 2, 2, requires_grad=True)
    _NoGradientWithoutRows.apply(weight, torch.tensor([4, 4, 6], dtype=torch.int32)).sum().backward()
    assert weight.grad[:, 0, 0].tolist() == [1, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_multiplied_in_fp32_by_one_kernel_each_way(dtype):
    """To the bit what a copy in fp32 gives, forwards and backwards; on the meta device CUDA's kernels are counted."""
    generator = torch.Generator().manual_seed(4)
    values, gradient = (torch.randn(50, HIDDEN, generator=generator).to(dtype) for _ in range(2))
    found, wanted = [], []
    for results, product in (
        (found, _Weighted.apply),
        (wanted, lambda rows, weights: (rows * weights[:, None]).to(rows.dtype)),
    ):
        rows, weights = values.clone().requires_grad_(), torch.linspace(0, 1, 50).requires_grad_()
        output = product(rows, weights)
        output.backward(gradient)
        results += [output, rows.grad, weights.grad]
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert found[0].dtype == dtype
    rows, above = values.to("meta").requires_grad_(), gradient.to("meta")
    with Recorded() as operators:
        _Weighted.apply(rows, torch.ones(50, device="meta", requires_grad=True)).backward(above)
    assert [name for name, _ in operators.seen if "product" in name] == ["experts_product", "experts_product_gradients"]
    assert not {"mul", "_to_copy", "sum"} & {name for name, _ in operators.seen}


class Recorded(TorchDispatchMode):
    """The operators that ran, each with the dtype of its first tensor."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [argument for argument in args if isinstance(argument, torch.Tensor)]
        self.seen += [(func.overloadpacket.__name__, tensors[0].dtype)] if tensors else []
        return func(*args, **(kwargs or {}))


def layer_on_meta(operators: Recorded) -> tuple[torch.Tensor, GroupedExperts]:
    """(states, experts) after a forward and backward pass in bf16 on the meta device, on which nothing can be read."""
    shape = {"device": "meta", "dtype": torch.bfloat16}
    unit = {"activation_func": F.silu, "activation_func_clamp_value": 7.0, "glu_linear_offset": 1.0}
    experts = GroupedExperts.__new__(GroupedExperts)
    torch.nn.Module.__init__(experts)
    experts.config, experts.tp_group = (
        SimpleNamespace(**unit, recompute_granularity=None),
        SimpleNamespace(rank=lambda: 0),
    )
    experts.linear_fc1 = expert_linear(HIDDEN, 48, EXPERTS, **shape)
    experts.linear_fc2 = expert_linear(24, HIDDEN, EXPERTS, **shape)
    chosen = torch.ones(12, EXPERTS, dtype=torch.bool, device="meta")
    states = torch.ones(12, HIDDEN, requires_grad=True, **shape)
    weights = torch.ones(12, EXPERTS, device="meta", requires_grad=True)
    with operators:
        places = find_places(chosen, chosen[:, 0], topk=TOPK, real_tokens=7)
        rows, row_weights = to_experts(states, weights, places)
        outputs, _ = experts(rows, places.tokens_per_expert, row_weights)
        from_experts(outputs, places).sum().backward()
    assert weights.grad.shape == weights.shape
    return states, experts


def test_no_step_of_a_layer_asks_the_device():
    states, experts = layer_on_meta(Recorded())
    assert states.grad.shape == states.shape
    assert all(parameter.grad.shape == parameter.shape for parameter in experts.parameters())


def test_nothing_in_bf16_is_added_one_by_one():
    """On CUDA these operators are atomic additions, rounded at each; the host sums them in fp32 and would not tell."""
    operators = Recorded()
    layer_on_meta(operators)
    names = {name for name, dtype in operators.seen if dtype == torch.bfloat16}
    one_by_one = ("index_add", "index_put", "scatter_add", "scatter_reduce", "embedding_dense_backward")
    assert {name for name in names if name.strip("_").startswith(one_by_one)} == set()
    assert "_grouped_mm" in names
