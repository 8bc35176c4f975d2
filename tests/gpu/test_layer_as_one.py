"""`sonicmoe.MoE` as one autograd Function on the kernels: what it gives step by step, bit for bit but for sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sonicmoe import MoE, layer

DEVICE = "cuda"
E, K, H, I, T = 8, 2, 256, 128, 300  # noqa: E741
WEIGHT = 10.0 * T  # of the loss, so that an error of its gradients is seen


def _problem(**settings: Any) -> tuple[MoE, Tensor, Tensor]:
    torch.manual_seed(0)
    moe = MoE(E, K, H, I, std=0.06, device=DEVICE, dtype=torch.bfloat16, **settings)
    x = torch.randn(3, T // 3, H, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    return moe, x, torch.randn_like(x)


def _results(moe: MoE, x: Tensor, do: Tensor) -> list[Tensor]:
    o, loss = moe(x)
    gradients = torch.autograd.grad([o, loss], [x, *moe.parameters()], [do, torch.full_like(loss, WEIGHT)])
    return [o.detach(), loss.detach(), *gradients]


@pytest.mark.parametrize(
    "settings",
    [{}, {"add_bias": True, "w1_layout": "interleaved"}, {"routing": "token_rounding"}, {"scoring": "sigmoid"}],
)
def test_as_one_and_step_by_step_are_the_same(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    moe, x, do = _problem(**settings)
    run, runs = layer.run, []

    def counted(*arguments: Any) -> tuple[Tensor, Tensor]:
        runs.append(arguments)
        return run(*arguments)

    monkeypatch.setattr(layer, "run", counted)
    as_one = _results(moe, x, do)
    assert len(runs) == 1
    moe.router.register_forward_hook(lambda *_: None)
    by_steps = _results(moe, x, do)
    assert len(runs) == 1
    # Step by step, parts of the gradients of x and router, the first and the last, are rounded before they are added.
    assert [name for name, _ in moe.named_parameters()][-1] == "router.weight"
    for one, other in ((as_one.pop(2), by_steps.pop(2)), (as_one.pop(), by_steps.pop())):
        assert one.any()
        torch.testing.assert_close(one, other, rtol=0, atol=2**-7 * float(one.abs().max()))
    for one, other in zip(as_one, by_steps, strict=True):
        assert one.isfinite().all() and one.any() and torch.equal(one, other)


def test_in_a_cuda_graph() -> None:
    moe, x, do = _problem(add_bias=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _results(moe, x, do)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _results(moe, x, do)
    for _ in range(2):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, _results(moe, x, do), strict=True))


def test_as_a_graphed_callable() -> None:
    """`torch.cuda.make_graphed_callables`: forward and backward are graphs of their own, replayed in turns."""
    moe, x, do = _problem()
    eager = _results(moe, x, do)
    graphed = torch.cuda.make_graphed_callables(moe, (torch.randn_like(x).requires_grad_(),))
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(eager, _results(graphed, x, do), strict=True))


@pytest.mark.unpoisoned
def test_nothing_waits_for_the_device() -> None:
    moe, x, do = _problem(routing="token_rounding")
    _results(moe, x, do)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _results(moe, x, do)
    finally:
        torch.cuda.set_sync_debug_mode("default")
