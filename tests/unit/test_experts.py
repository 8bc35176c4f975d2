"""moe_experts against the dense oracle, on the reference backend: forward and every gradient."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    Weights,
    assignments,
    build_routing,
    build_weights,
    oracle,
    ragged_assigned,
    top_k_assigned,
)
from torch import Tensor

from sonicmoe import GPT_OSS, Routing, moe_experts
from sonicmoe.activations import NAMES

HIDDEN, INTER = 6, 5
CLAMPED = "swiglu(alpha=1.702,limit=0.8,up_offset=1.0)"


def _run(weights: Weights, routing: Routing, **options: str) -> Tensor:
    x, w1, w2, b1, b2 = weights
    return moe_experts(x, w1, w2, routing, b1, b2, backend="torch", **options)


def _gradients(o: Tensor, do: Tensor, weights: Weights, routing: Routing) -> list[Tensor]:
    leaves = [t for t in (*weights, routing.scores) if t is not None]
    return list(torch.autograd.grad(o, leaves, do, allow_unused=True, materialize_grads=True))


def _check(
    assigned: Sequence[Sequence[int]],
    num_experts: int,
    activation: str = "swiglu",
    w1_layout: str = "concat",
    bias: bool = True,
    padding: int = 0,
    seed: int = 0,
) -> None:
    weights = build_weights(len(assigned), num_experts, HIDDEN, INTER, activation, bias=bias, seed=seed)
    routing = build_routing(assigned, num_experts, padding=padding, seed=seed, dtype=torch.float64)
    routing.scores.requires_grad_()
    o = _run(weights, routing, activation=activation, w1_layout=w1_layout)
    expected = oracle(weights, routing, assigned, activation, w1_layout)
    do = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(o, expected)
    if expected.requires_grad:
        actual = _gradients(o, do, weights, routing)
        torch.testing.assert_close(actual, _gradients(expected, do, weights, routing))


@pytest.mark.parametrize("activation", [*NAMES, CLAMPED, str(GPT_OSS)])
@pytest.mark.parametrize("bias", [False, True])
def test_every_activation(activation: str, bias: bool) -> None:
    _check(ragged_assigned(9, 4), 4, activation, bias=bias, padding=5)


@pytest.mark.parametrize("activation", ["swiglu", "geglu", CLAMPED])
def test_interleaved_w1(activation: str) -> None:
    _check(top_k_assigned(8, 4, 2), 4, activation, w1_layout="interleaved")


@pytest.mark.parametrize("k", [1, 2, 4])
def test_top_k(k: int) -> None:
    _check(top_k_assigned(8, 4, k), 4)


@pytest.mark.parametrize(
    "assigned",
    [
        pytest.param([], id="no tokens"),
        pytest.param([[0]], id="one token"),
        pytest.param([[], [], []], id="no rows"),
        pytest.param([[2]] * 7, id="one expert takes all"),
        pytest.param([[3, 0], [0, 3], [3, 0]], id="experts in the middle are empty"),
        pytest.param([[0, 1, 2, 3], [], [1]], id="none or every expert"),
        pytest.param([[4, 1], [2, 4], [4, 4]], id="sentinel ids"),
        pytest.param([[4, 4], [4, 4]], id="sentinel ids only"),
        pytest.param([[1, 1], [2, 2]], id="an expert twice"),
    ],
)
def test_corners(assigned: list[list[int]]) -> None:
    _check(assigned, 4)


@settings(deadline=None, max_examples=40)
@given(assignments(), st.integers(0, 4), st.integers(0, 2**16))
def test_any_assignment(assignment: tuple[list[list[int]], int], padding: int, seed: int) -> None:
    assigned, num_experts = assignment
    _check(assigned, num_experts, padding=padding, seed=seed)


def test_the_oracle_notices_zeros_and_a_flipped_sign() -> None:
    assigned = top_k_assigned(8, 4, 2)
    weights = build_weights(8, 4, HIDDEN, INTER, "swiglu")
    routing = build_routing(assigned, 4, dtype=torch.float64)
    expected = oracle(weights, routing, assigned, "swiglu").detach()
    o = _run(weights, routing).detach()
    flipped = o.clone()
    flipped[3] *= -1
    for wrong in (torch.zeros_like(o), -o, flipped):
        with pytest.raises(AssertionError):
            torch.testing.assert_close(wrong, expected)


def test_x_of_any_number_of_dimensions() -> None:
    weights = build_weights(12, 4, HIDDEN, INTER, "swiglu")
    routing = build_routing(top_k_assigned(12, 4, 2), 4, dtype=torch.float64)
    flat = _run(weights, routing)
    cube = _run(weights._replace(x=weights.x.view(2, 3, 2, HIDDEN)), routing)
    assert cube.shape == (2, 3, 2, HIDDEN)
    torch.testing.assert_close(cube.view(12, HIDDEN), flat)
    one = _run(weights._replace(x=weights.x[0]), build_routing([[1, 2]], 4, dtype=torch.float64))
    assert one.shape == (HIDDEN,)


def test_non_contiguous_x_and_do() -> None:
    assigned = top_k_assigned(8, 4, 2)
    weights = build_weights(8, 4, HIDDEN, INTER, "swiglu")
    routing = build_routing(assigned, 4, dtype=torch.float64)
    wide = torch.stack((weights.x, weights.x), dim=2)[..., 0].detach().requires_grad_()
    assert not wide.is_contiguous()
    o, expected = _run(weights._replace(x=wide), routing), _run(weights, routing)
    torch.testing.assert_close(o, expected)
    do = torch.ones(HIDDEN, 8, dtype=torch.float64).T
    (dx,) = torch.autograd.grad(o, wide, do)
    (expected_dx,) = torch.autograd.grad(expected, weights.x, do.contiguous())
    torch.testing.assert_close(dx, expected_dx)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_storage_dtypes_round_once_per_tensor(dtype: torch.dtype) -> None:
    """The error against fp64 is that of a few roundings: three to five halves of an ulp, relative to unit scale."""
    assigned = top_k_assigned(32, 4, 2)
    exact = build_weights(32, 4, 32, 16, "swiglu", bias=True)
    rounded = Weights(*(None if t is None else t.detach().to(dtype).requires_grad_() for t in exact))
    exact = Weights(*(None if t is None else t.detach().double().requires_grad_() for t in rounded))
    routing = build_routing(assigned, 4)
    routing.scores.requires_grad_()
    wide = routing._replace(scores=routing.scores.detach().double().requires_grad_())
    o, expected = _run(rounded, routing), _run(exact, wide)
    assert o.dtype == dtype
    do = torch.randn(32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    pairs = [(o, expected)]
    pairs += zip(_gradients(o, do, rounded, routing), _gradients(expected, do.double(), exact, wide), strict=True)
    for actual, truth in pairs:
        assert (actual.double() - truth).norm() <= 2.5 * torch.finfo(dtype).eps * truth.norm()
        assert (torch.zeros_like(truth) - truth).norm() > 2.5 * torch.finfo(dtype).eps * truth.norm()
