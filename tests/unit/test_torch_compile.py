"""torch.compile(fullgraph=True): the same numbers, and no new compilation when only the number of tokens changes."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from strategies import Weights, build_routing, build_weights, ragged_assigned, top_k_assigned
from torch import Tensor

from sonicmoe import GPT_OSS, Activation, Routing, moe_experts

E, K, H, I = 4, 2, 6, 5  # noqa: E741

pytestmark = pytest.mark.unpoisoned

needs_cxx = pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
BACKENDS = ["aot_eager", pytest.param("inductor", marks=needs_cxx)]


def _problem(num_tokens: int, ragged: bool, activation: str) -> tuple[Weights, Routing]:
    assigned = ragged_assigned(num_tokens, E) if ragged else top_k_assigned(num_tokens, E, K)
    routing = build_routing(assigned, E, padding=3 if ragged else 0, dtype=torch.float64)
    routing.scores.requires_grad_()
    return build_weights(num_tokens, E, H, I, activation, bias=True), routing


def _layer(weights: Weights, routing: Routing, activation: str | Activation, **buffers: Tensor) -> Tensor:
    x, w1, w2, b1, b2 = weights
    return moe_experts(x * 1.0, w1, w2, routing, b1, b2, activation=activation, **buffers).sin()


def _gradients(o: Tensor, weights: Weights, routing: Routing) -> list[Tensor]:
    do = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o)
    leaves = [t for t in (*weights, routing.scores) if t is not None]
    return [g for g in torch.autograd.grad(o, leaves, do, allow_unused=True) if g is not None]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("ragged", "activation"), [(False, "swiglu"), (True, GPT_OSS)])
def test_forward_and_gradients_at_any_number_of_tokens(
    backend: str, ragged: bool, activation: str | Activation
) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(_layer, fullgraph=True, dynamic=True, backend=counter)
    for num_tokens in (7, 9, 64):
        weights, routing = _problem(num_tokens, ragged, str(activation))
        o, expected = compiled(weights, routing, activation), _layer(weights, routing, activation)
        torch.testing.assert_close(o, expected)
        actual = _gradients(o, weights, routing)
        assert len(actual) == 6
        torch.testing.assert_close(actual, _gradients(expected, weights, routing))
    assert counter.frame_count == 1


def test_sizes_become_dynamic_by_themselves() -> None:
    """Without dynamic=True torch specialises on the first size, once; the second compilation serves all others."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_layer, fullgraph=True, backend=counter)
    for num_tokens in (7, 9, 12, 33):
        compiled(*_problem(num_tokens, False, "swiglu"), "swiglu")
    assert counter.frame_count <= 2


def test_inference() -> None:
    compiled = torch.compile(_layer, fullgraph=True, dynamic=True, backend="aot_eager")
    weights, routing = _problem(8, True, "geglu")
    with torch.no_grad():
        torch.testing.assert_close(compiled(weights, routing, "geglu"), _layer(weights, routing, "geglu"))


def test_autocast() -> None:
    compiled = torch.compile(_layer, fullgraph=True, dynamic=True, backend="aot_eager")
    weights = build_weights(8, E, H, I, "swiglu", bias=True, dtype=torch.float32)
    routing = build_routing(top_k_assigned(8, E, K), E)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, expected = compiled(weights, routing, "swiglu"), _layer(weights, routing, "swiglu")
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, expected)


def test_gradients_added_into_buffers() -> None:
    compiled = torch.compile(_layer, fullgraph=True, dynamic=True, backend="aot_eager")
    buffers = []
    for layer in (_layer, compiled):
        weights, routing = _problem(8, True, "swiglu")
        w1_grad, w2_grad = torch.ones(E, 2 * I, H), torch.ones(E, H, I)
        for _ in range(2):
            o = layer(weights, routing, "swiglu", w1_grad=w1_grad, w2_grad=w2_grad)
            assert len(_gradients(o, weights, routing)) == 4
        buffers.append((w1_grad, w2_grad))
    torch.testing.assert_close(buffers[1], buffers[0])
    assert all(buffer.std() > 0.1 for buffer in buffers[0])
