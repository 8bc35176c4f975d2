"""The load balancing loss on the GPU: value and gradient against fp64."""

from __future__ import annotations

import math

import pytest
import torch
from routing_cases import skewed_logits
from torch import Tensor

from sonicmoe import load_balancing_loss, ops, reference, route_topk

DEVICE = "cuda"
INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = 2e-6


def counts_of(experts: int, rows: int = 50) -> Tensor:
    """cu_rows of experts with 0 to `rows` rows."""
    counts = torch.randint(0, rows + 1, (experts,), generator=torch.Generator().manual_seed(4))
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()


def truth_of(logits: Tensor, cu_rows: Tensor, k: int, dloss: float) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, its gradient, the norm of what cancels in each token's gradient), in fp64."""
    leaf = logits.double().requires_grad_()
    # As in fp32: there the largest finite number is what +inf counts as.
    z = leaf.nan_to_num(nan=-INF, posinf=torch.finfo(torch.float32).max, neginf=-INF)
    loss = reference.load_balance(z, cu_rows, k)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.tensor(dloss, dtype=torch.float64))
    tokens, experts = logits.shape
    p = reference.topk(z.detach(), experts, None, "softmax_topk", False, 1, 1, 1.0)[0].norm(dim=1)
    share = cu_rows.diff().double() * abs(dloss) * experts / max(tokens * tokens * k, 1)
    return loss.detach(), gradient, p * share.max()


def check(logits: Tensor, cu_rows: Tensor, k: int, dloss: float = -1.7) -> None:
    loss, gradient, cancelled = truth_of(logits, cu_rows, k, dloss)
    on_gpu, cu = logits.to(DEVICE), cu_rows.to(DEVICE)
    actual = ops.load_balance(on_gpu, cu, k, "cute")
    assert actual.dtype == torch.float32 and actual.shape == ()
    assert torch.equal(actual, ops.load_balance(on_gpu, cu, k, "cute"))
    assert abs(actual.item() - loss.item()) <= TOLERANCE * loss.item() < max(loss.item(), 1e-300)

    def good(t: Tensor) -> bool:
        error = (t.double() - gradient).norm(dim=1)
        # The smallest steps of fp16 are 6e-8.
        steps = 6e-8 * logits.shape[1] ** 0.5 if logits.dtype == torch.float16 else 0.0
        allowed = torch.finfo(logits.dtype).eps * gradient.norm(dim=1) + TOLERANCE * cancelled + steps
        return bool((error <= allowed).all())

    arguments = (torch.tensor(dloss, device=DEVICE), on_gpu, cu, k)
    dlogits = ops.load_balance_backward(*arguments, "cute")
    assert torch.equal(dlogits, ops.load_balance_backward(*arguments, "cute")) and dlogits.dtype == logits.dtype
    if gradient.norm() > 1e-3:
        assert not good(torch.zeros_like(gradient)) and not good(-gradient) and not good(gradient.roll(1, 1))
    assert good(dlogits.cpu())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts", [1, 2, 3, 31, 32, 33, 64, 100, 128, 256, 257, 512, 1000, 4095, 4096])
def test_experts(experts: int, dtype: torch.dtype) -> None:
    check(skewed_logits(77, experts).to(dtype), counts_of(experts), min(experts, 4))


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 1000, 8191, 8193, 20000])
def test_tokens(tokens: int) -> None:
    check(skewed_logits(tokens, 64), counts_of(64, rows=tokens), 8)


def test_no_tokens() -> None:
    empty = torch.zeros(0, 8, device=DEVICE, requires_grad=True)
    loss = load_balancing_loss(empty, route_topk(empty, 2), 2)
    assert loss == 0
    loss.backward()
    assert empty.grad is not None and empty.grad.shape == (0, 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts", [6, 33, 256])
def test_not_finite(experts: int, dtype: torch.dtype) -> None:
    logits = skewed_logits(9, experts).to(dtype)
    logits[0] = -INF
    logits[1] = NAN
    logits[2] = INF
    logits[3, 1:] = -INF
    logits[4, ::2] = NAN
    logits[5, 1] = INF
    check(logits, counts_of(experts), 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_public_function(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = skewed_logits(500, 32).to(dtype).to(DEVICE).requires_grad_()
    routing = route_topk(logits, 3)
    loss, gradient, _ = truth_of(logits.detach().cpu(), routing.cu_rows.cpu(), 3, 0.25)
    assert loss > 1.1
    monkeypatch.delattr(reference, "load_balance")
    actual = load_balancing_loss(logits, routing, 3)
    torch.testing.assert_close(actual.cpu().double(), loss, rtol=TOLERANCE, atol=0)
    (dlogits,) = torch.autograd.grad(0.25 * actual, logits, create_graph=True)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(dlogits.cpu().double(), gradient, rtol=2 * eps + 1e-4, atol=1e-7)
    assert gradient.abs().max() > 1e-5
    with pytest.raises(RuntimeError, match="load_balancing_loss has no second derivative"):
        dlogits.sum().backward()


def test_fp64_is_computed_by_torch() -> None:
    logits = skewed_logits(50, 16).double()
    losses = [load_balancing_loss(z, route_topk(z, 2), 2).cpu() for z in (logits, logits.to(DEVICE))]
    assert losses[0].dtype == torch.float64
    torch.testing.assert_close(*losses)


def test_writes_nothing_else() -> None:
    from sonicmoe import jit
    from sonicmoe.cute_kernels.balance import BalanceBackwardSpec, BalanceSpec

    tokens, experts, guard = 37, 33, 16
    inside = slice(guard, -guard)
    logits, cu_rows = skewed_logits(tokens, experts).to(DEVICE), counts_of(experts).to(DEVICE)
    spec = BalanceSpec(experts, 2, "fp32")
    parts = torch.full((spec.num_parts(tokens) + 2 * guard,), NAN, device=DEVICE)
    loss = torch.full((1 + 2 * guard,), NAN, device=DEVICE)
    dlogits = torch.full((tokens + 2 * guard, experts), NAN, device=DEVICE)
    jit.launch(spec, logits, cu_rows, parts[inside], loss[inside])
    jit.launch(BalanceBackwardSpec(experts, 2, "fp32"), loss[inside], logits, cu_rows, dlogits[inside])
    for t in (parts, loss, dlogits):
        assert not t[inside].isnan().any()
        assert t[:guard].isnan().all() and t[-guard:].isnan().all()
