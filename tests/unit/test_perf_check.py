"""The check before a speed is reported: it must fail what is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import sonicmoe
from perf import check, kernels, layers
from perf.peers import PEERS
from perf.problem import Form, Problem
from perf.roofline import KERNELS
from perf.shapes import parse_thiek

SHAPE = parse_thiek("70,32,16,8,2")
CPU = Form(device="cpu", backend="torch")

DAMAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "a flipped sign": lambda t: -t,
    "NaN": lambda t: t * float("nan"),
    "twice as much": lambda t: 2 * t,
    "a row of another": lambda t: t.roll(1, 0),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_error_finds(what: str) -> None:
    truth = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    assert check.error(truth.bfloat16(), truth) < check.tolerance(torch.bfloat16)
    assert check.error(DAMAGE[what](truth), truth) > 5 * check.tolerance(torch.bfloat16)


def test_error_finds_one_wrong_row_of_many() -> None:
    truth = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    wrong = truth.clone()
    wrong[1234] = 0
    assert check.error(wrong, truth) > check.tolerance(torch.bfloat16, rounded_steps=3)
    assert check.error(truth[:-1], truth) == float("inf")


@pytest.mark.parametrize("router", [False, True])
def test_a_layer_whose_rows_are_all_rounded_away(router: bool) -> None:
    problem = Problem(SHAPE, dataclasses.replace(CPU, tile_m=128))
    assert int(problem.routing("token_rounding").cu_rows[-1]) == 0
    true = layers.truth(problem, "token_rounding", True, router, backward=True)
    found = layers.errors(layers.ours(problem, router, "token_rounding"), problem, true, backward=True)
    assert found["o"] == found["dw1[0]"] == 0 and not layers.wrong(found, torch.bfloat16)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_kernels_pass_and_damaged_ones_fail(activation: str, bias: bool) -> None:
    form = Form(device="cpu", backend="torch", activation=activation, bias=bias)
    i = kernels.inputs(SHAPE, form, "topk")
    calls = kernels.calls(i)
    assert tuple(calls) == KERNELS
    for name, call in calls.items():
        out = call()
        assert kernels.wrong(kernels.errors(name, i, out), i.x.dtype) == [], name
        for position in range(len(out)):
            for what, damage in DAMAGE.items():
                broken = tuple(damage(t) if p == position else t for p, t in enumerate(out))
                assert kernels.wrong(kernels.errors(name, i, broken), i.x.dtype), f"{name} {position}: {what}"


def test_bounds_do_the_kernels_flops() -> None:
    i = kernels.inputs(SHAPE, CPU, "topk")
    for name, call in kernels.bounds(i).items():
        out = call()
        if name != kernels.COPY:
            assert out.shape[0] == SHAPE.E and kernels.bound_flops(name, i) >= 2 * i.rows * SHAPE.H * SHAPE.I


@pytest.mark.parametrize(
    ("name", "router"),
    [("sonicmoe.MoE", True), *((name, r) for name in ("sonicmoe", "loop", "grouped_mm") for r in (True, False))],
)
def test_layers_are_right(name: str, router: bool) -> None:
    problem = Problem(SHAPE, CPU)
    if name == "sonicmoe.MoE":
        layer = layers.module(problem, "topk")
    elif name == "sonicmoe":
        layer = layers.ours(problem, router, "topk")
    else:
        assert PEERS[name].why_not(problem) is None
        layer = PEERS[name].build(problem, router)
    true = layers.truth(problem, "topk", name.startswith("sonicmoe"), router, backward=True)
    found = layers.errors(layer, problem, true, backward=True)
    assert layers.wrong(found, problem.x.dtype) == []
    assert len(found) == (6 if router else 7)
    assert layers.errors(layer, problem, true, backward=False) == {"o": found["o"]}


class Flip(torch.autograd.Function):
    """The same number, and its gradient with the wrong sign."""

    @staticmethod
    def forward(ctx: object, t: Tensor) -> Tensor:
        return t.clone()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        return -g


@pytest.mark.parametrize(
    ("damaged", "router"),
    [*((d, False) for d in ("o", "dx", "dw1", "dw2", "dscores")), *((d, True) for d in ("o", "dx", "dw1", "dw2"))],
)
def test_a_wrong_layer_is_found(damaged: str, router: bool) -> None:
    problem = Problem(SHAPE, CPU)
    right = layers.ours(problem, router, "topk")
    true = layers.truth(problem, "topk", own=True, router=router, backward=True)
    position = {"dx": 0, "dw1": 1, "dw2": 2, "dscores": 3}.get(damaged)
    tensors = [problem.x, problem.w1, problem.w2, right.leaves[3]]

    def forward() -> Tensor:
        x, w1, w2, last = (Flip.apply(t) if p == position else t for p, t in enumerate(tensors))
        routing = problem.routing("topk")._replace(scores=last)
        if router:
            routing = sonicmoe.route_topk(x @ last.T, SHAPE.K)
        o = sonicmoe.moe_experts(x, w1, w2, routing, activation="swiglu", backend="torch")
        return -o if damaged == "o" else o

    texts = layers.wrong(layers.errors(right._replace(forward=forward), problem, true, True), problem.x.dtype)
    assert any(text.startswith(damaged) for text in texts), texts


@pytest.mark.parametrize("router", [False, True])
def test_token_rounding_is_compared_on_what_it_keeps(router: bool) -> None:
    problem = Problem(SHAPE, dataclasses.replace(CPU, tile_m=8))
    layer = layers.ours(problem, router, "token_rounding")
    true = layers.truth(problem, "token_rounding", own=True, router=router, backward=True)
    found = layers.errors(layer, problem, true, backward=True)
    assert layers.wrong(found, problem.x.dtype) == []
    assert ("dx" in found, "dscores" in found) == (not router, not router) and len(found) == (5 if router else 7)
    # Plain top-K's rows are others.
    other = layers.truth(problem, "topk", own=True, router=router, backward=True)
    assert layers.wrong(layers.errors(layer, problem, other._replace(slots=true.slots[:0]), True), problem.x.dtype)


def test_pairs_of_a_plan_are_those_of_the_ids() -> None:
    problem = Problem(SHAPE, CPU)
    plan = problem.routing("topk")
    ids = check.pairs_of_ids(problem.ids, problem.scores)
    rows = check.pairs_of_plan(plan.cu_rows, plan.row_token, plan.row_slot, plan.scores)
    order = rows.slot.argsort()
    for a, b in zip(ids, rows, strict=True):
        assert torch.equal(a, b[order])
