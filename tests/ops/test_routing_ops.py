"""The ops of routing as torch sees them, and their references' backward steps against autograd."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from routing_cases import skewed_logits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sonicmoe import InvalidArgument, ops, reference
from sonicmoe.ops._once import once
from sonicmoe.routing import SCORINGS

T, E, K = 7, 12, 3
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _calls(dtype: torch.dtype = torch.float32) -> dict[str, tuple[Any, ...]]:
    """For each op the arguments of one call, without the backend."""
    logits = skewed_logits(T, E).to(dtype)
    bias = torch.linspace(-0.1, 0.1, E)
    scores, ids = reference.topk(logits, K, None, "sigmoid", True, 1, 1, 1.0)
    cu_rows = torch.arange(E + 1, dtype=torch.int32) * 2
    loss = reference.load_balance(logits, cu_rows, K)
    return {
        "topk": (logits, K, None, "topk_softmax", False, 1, 1, 1.0),
        "topk biased": (logits, K, bias, "sigmoid", True, 4, 2, 2.5),
        "topk_backward": (scores, ids, logits, "softmax_topk", True, 2.5),
        "topk_backward_add_": (logits.clone(), scores, ids, logits, "softmax_topk", False, 2.5),
        "load_balance": (logits, cu_rows, K),
        "load_balance_backward": (loss, logits, cu_rows, K),
    }


@pytest.mark.unpoisoned
@pytest.mark.parametrize("call", list(_calls()))
def test_opcheck(call: str) -> None:
    torch.library.opcheck(getattr(ops, call.split()[0]), (*_calls()[call], "torch"))


@pytest.mark.parametrize("call", list(_calls()))
@pytest.mark.parametrize("dtype", DTYPES)
def test_fakes_give_the_shapes_and_dtypes_of_the_reference(call: str, dtype: torch.dtype) -> None:
    op, arguments = getattr(ops, call.split()[0]), (*_calls(dtype)[call], "torch")
    real = op(*arguments)
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
    if real is None:
        assert fake is None
        return
    for r, f in zip(*((t,) if isinstance(t, Tensor) else t for t in (real, fake)), strict=True):
        assert (r.shape, r.dtype) == (f.shape, f.dtype)


@pytest.mark.parametrize("call", list(_calls()))
def test_an_unknown_backend_raises(call: str) -> None:
    with pytest.raises(InvalidArgument, match="backend: got 'triton'"):
        getattr(ops, call.split()[0])(*_calls()[call], "triton")


@pytest.mark.parametrize("scale", [1.0, 2.5, 0.0])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_topk_backward_is_the_gradient(scoring: str, renormalize: bool, scale: float) -> None:
    logits = skewed_logits(40, E).double()
    logits[0], logits[1, ::2], logits[2, 0], logits[3, :2] = -torch.inf, -torch.inf, torch.nan, torch.inf
    logits.requires_grad_()
    scores, ids = reference.topk(logits, K, None, scoring, renormalize, 1, 1, scale)
    dscores = torch.randn(40, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (truth,) = torch.autograd.grad(scores, logits, dscores)
    actual = reference.topk_backward(dscores, ids, logits.detach(), scoring, renormalize, scale)
    torch.testing.assert_close(actual, truth, rtol=1e-9, atol=1e-14)
    assert bool(truth.abs().max() > 0.01) is (scale != 0) and not truth[0].any() and not truth[3, :2].any()
    there = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)
    both = there.clone()
    ops.topk_backward_add_(both, dscores, ids, logits.detach(), scoring, renormalize, scale, "torch")
    torch.testing.assert_close(both, there + truth, rtol=1e-9, atol=1e-14)


def test_load_balance_backward_is_the_gradient() -> None:
    logits = skewed_logits(40, E).double()
    logits[0], logits[1, ::2], logits[2, 0], logits[3, :2] = -torch.inf, -torch.inf, torch.nan, torch.inf
    logits.requires_grad_()
    cu_rows = torch.cat([torch.zeros(1), torch.arange(E).cumsum(0)]).int()
    dloss = torch.tensor(-1.7, dtype=torch.float64)
    (truth,) = torch.autograd.grad(reference.load_balance(logits, cu_rows, K), logits, dloss)
    actual = reference.load_balance_backward(dloss, logits.detach(), cu_rows, K)
    torch.testing.assert_close(actual, truth, rtol=1e-9, atol=1e-14)
    assert truth.abs().max() > 0.001 and not truth[0].any() and not truth[3, :2].any()


def test_which_calls_have_a_kernel() -> None:
    logits = torch.zeros(2, 4096)
    assert ops.topk_has_kernel(logits, 128, 32, 4) and ops.topk_has_kernel(logits.bfloat16(), 1, 64, 64)
    assert not ops.topk_has_kernel(logits.double(), 1, 1, 1)
    assert not ops.topk_has_kernel(torch.zeros(2, 4097), 1, 1, 1)
    assert not ops.topk_has_kernel(logits, 129, 1, 1)
    assert not ops.topk_has_kernel(logits, 1, 64, 4)
    assert ops.load_balance_has_kernel(logits.half()) and not ops.load_balance_has_kernel(logits.double())
    assert not ops.load_balance_has_kernel(torch.zeros(2, 4097))


def test_once_raises_where_it_is_differentiated() -> None:
    def gradients(_: Any, saved: list[Tensor], incoming: Tensor) -> tuple[Tensor | None, ...]:
        assert not torch.is_grad_enabled()
        return saved.pop() * incoming, None

    kept, incoming, argument = (torch.ones(2, requires_grad=True) for _ in range(3))
    node = (2 * argument).grad_fn.next_functions[0][0]
    of = ("f", gradients, SimpleNamespace(saved_tensors=(kept,), next_functions=((None, 0), (node, 0))), incoming)
    with torch.no_grad():
        assert not once(*of)[0].requires_grad
    with pytest.raises(RuntimeError, match="sonicmoe.f has no second derivative"):
        once(*of)[0].sum().backward()
    for leaf in (kept, incoming, argument):
        passed, nothing = once(*of)
        assert nothing is None
        # grad visits only what leads to the leaf; the other way there would be all that it finds.
        with pytest.raises(RuntimeError, match="sonicmoe.f has no second derivative"):
            torch.autograd.grad(passed.sum() + leaf.square().sum(), leaf)


def test_what_the_other_kernels_take() -> None:
    """What they count in 32 bits ends before 2^31."""

    def logits(tokens: int, experts: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(tokens, experts, dtype=dtype, device="meta")

    assert ops.token_rounding_has_kernel(logits(1 << 20, 2040), 128, 1 << 26)
    assert ops.token_rounding_has_kernel(logits(1 << 20, 8), 1 << 19, 1 << 23)
    for refused in (
        (logits(9, 2049), 128, 9),
        (logits(9, 8, torch.float64), 128, 9),
        (logits(1 << 21, 1024), 128, 1 << 26),
        (logits(1 << 20, 8), (1 << 19) + 1, 1 << 23),
        (logits(1 << 20, 8), 128, 1 << 30),
        (logits((1 << 28) - (1 << 15), 8), 1, 1 << 28),  # slots and 8 for each token
    ):
        assert not ops.token_rounding_has_kernel(*refused)
    ids = torch.empty((1 << 24) - 32, 128, dtype=torch.int32, device="meta")
    assert ops.plan_has_kernel(ids, 16384) and not ops.plan_has_kernel(ids, 16385)
    assert not ops.plan_has_kernel(torch.empty(1 << 24, 128, dtype=torch.int32, device="meta"), 4)
