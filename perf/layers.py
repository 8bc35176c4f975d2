"""Whole layers, sonicmoe's and its peers', with the router or from given experts and scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import sonicmoe
from perf import check
from perf.problem import Problem
from perf.protocol import Case
from sonicmoe import Routing
from sonicmoe.reference.activation import act


class Layer(NamedTuple):
    """An implementation, ready to run on a problem.

    forward     () -> o (T, H)
    leaves      what gradients are taken of, x first
    weights     whether the gradients of w1 and w2, taken as `leaves` say, can be compared: None if not, else a
                function of (list of gradients, expert) -> (dw1[e], dw2[e]) in the concatenated layout
    scores      position in `leaves` of the scores (T*K or (T, K)), None if they are not a leaf
    given       what of the routing it is given and keeps for its backward
    """

    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    weights: Callable[[list[Tensor], int], tuple[Tensor, Tensor]] | None
    scores: int | None = None
    given: tuple[Tensor, ...] = ()


def _same_layout(gradients: list[Tensor], e: int) -> tuple[Tensor, Tensor]:
    return gradients[1][e], gradients[2][e]


# What routes by sonicmoe's functions; all else gets what `torch_router` chooses.
OWN_ROUTER = ("sonicmoe", "sonicmoe.MoE")


def torch_router(problem: Problem) -> tuple[Tensor, Tensor]:
    """(ids, scores in fp32), both (T, K): what every peer gets, none has a router of its own."""
    values, ids = problem.router_logits().topk(problem.shape.K, dim=1)
    return ids, torch.softmax(values, dim=1, dtype=torch.float32)


def of_experts(
    problem: Problem,
    router: bool,
    experts: Callable[[Tensor, Tensor, Tensor], Tensor],
    leaves: list[Tensor] | None = None,
    weights: Callable[[list[Tensor], int], tuple[Tensor, Tensor]] | None = None,
) -> Layer:
    """The layer of a peer that computes experts(x, ids, scores (T, K) fp32) -> o."""
    own = problem.experts_leaves if leaves is None else leaves
    weights = weights or _same_layout
    if router:
        return Layer(lambda: experts(problem.x, *torch_router(problem)), [*own, problem.router], weights)
    scores, ids = problem.scores, problem.ids
    return Layer(lambda: experts(problem.x, ids, scores), [*own, scores], weights, scores=len(own), given=(ids, scores))


def ours(problem: Problem, router: bool, routing: str) -> Layer:
    """sonicmoe: routing from the router's logits, then moe_experts. Without router, routing and plan are given."""
    form, shape = problem.form, problem.shape
    leaves = problem.experts_leaves

    def experts(routed: Routing) -> Tensor:
        return sonicmoe.moe_experts(
            problem.x, problem.w1, problem.w2, routed, problem.b1, problem.b2, form.kind, backend=form.backend
        )

    def routed() -> Routing:
        logits = problem.router_logits()
        if routing == "token_rounding":
            return sonicmoe.route_token_rounding(logits, shape.K, tile_m=form.tile_m, rule=form.rule)
        return sonicmoe.route_topk(logits, shape.K)

    if router:
        return Layer(lambda: experts(routed()), [*leaves, problem.router], _same_layout)
    fixed = problem.routing(routing)
    scores = fixed.scores.detach().requires_grad_()
    fixed = fixed._replace(scores=scores)
    given = tuple(t for t in fixed if isinstance(t, Tensor))
    return Layer(lambda: experts(fixed), [*leaves, scores], _same_layout, scores=len(leaves), given=given)


def module(problem: Problem, routing: str) -> Layer:
    """sonicmoe.MoE as users call it, the load balancing loss included."""
    form, shape = problem.form, problem.shape
    if form.skew:
        raise ValueError("sonicmoe.MoE adds no bias to its logits: skewed routing is for the other layers")
    moe = sonicmoe.MoE(
        shape.E,
        shape.K,
        shape.H,
        shape.I,
        form.kind,
        add_bias=form.bias,
        routing=routing,
        rule=form.rule,
        tile_m=form.tile_m,
        backend=form.backend,
        device="meta",
        dtype=form.torch_dtype,
    )
    moe.router.weight = torch.nn.Parameter(problem.router.detach())
    moe.w1, moe.w2 = torch.nn.Parameter(problem.w1.detach()), torch.nn.Parameter(problem.w2.detach())
    if problem.b1 is not None and problem.b2 is not None:
        moe.b1, moe.b2 = torch.nn.Parameter(problem.b1.detach()), torch.nn.Parameter(problem.b2.detach())
    leaves = [problem.x, moe.w1, moe.w2, *(t for t in (moe.b1, moe.b2) if t is not None), moe.router.weight]
    return Layer(lambda: moe(problem.x)[0], leaves, _same_layout)


def training(layer: Layer, do: Tensor) -> Case:
    """Forward and backward as the laps of one case."""

    def run(lap: Callable[[], None]) -> object:
        o = layer.forward()
        lap()
        return torch.autograd.grad(o, layer.leaves, do)

    return Case(run, laps=("forward", "backward"))


def inference(layer: Layer) -> Case:
    """Forward where no gradient is wanted."""

    def run(lap: Callable[[], None]) -> object:
        with torch.no_grad():
            return layer.forward()

    return Case(run)


def _chosen(problem: Problem, lower_id_first: bool) -> check.Pairs:
    """What a router chooses by its rounded logits, of which some are equal: as torch.topk does, or as ours says."""
    with torch.no_grad():
        ids, scores = torch_router(problem)
        if lower_id_first:
            values, order = problem.logits.sort(dim=1, descending=True, stable=True)
            ids, scores = order[:, : problem.shape.K], values[:, : problem.shape.K].softmax(1)
    return check.pairs_of_ids(ids, scores)


def truth(problem: Problem, routing: str, own: bool, router: bool, backward: bool) -> check.Truth:
    """What a layer must give, in fp32, on samples. own: it routes by sonicmoe's functions, not by torch.topk.

    Without backward o alone. What a router adds to dx is known for top-K.
    """
    weights = check.Weights(problem.x, problem.do, problem.w1, problem.w2, problem.b1, problem.b2)
    kind, of_router = problem.form.kind, None
    if routing == "topk" and router:
        pairs, of_router = _chosen(problem, own), check.Router(problem.router, problem.logits)
    elif routing == "topk":
        pairs = check.pairs_of_ids(problem.ids, problem.scores)
    else:
        plan = problem.routing(routing)
        pairs = check.pairs_of_plan(plan.cu_rows, plan.row_token, plan.row_slot, plan.scores)
    found = check.truth_of(weights, lambda h: act(kind, h), pairs, of_router, backward=backward)
    if router and routing != "topk":
        return found._replace(dx=None, slots=found.slots[:0], dscores=found.dscores[:0])
    return found


def errors(layer: Layer, problem: Problem, true: check.Truth, backward: bool) -> dict[str, float]:
    """Relative errors of o and, with backward, of every gradient that the truth has."""
    o = layer.forward()
    found = {"o": check.error(o[true.tokens], true.o)}
    if not backward:
        return found
    gradients = list(torch.autograd.grad(o, layer.leaves, problem.do))
    if true.dx is not None:
        found["dx"] = check.error(gradients[0][true.tokens], true.dx)
    if layer.scores is not None:
        found["dscores"] = check.error(gradients[layer.scores].reshape(-1)[true.slots], true.dscores)
    if layer.weights is not None:
        for position, e in enumerate(true.experts):
            dw1, dw2 = layer.weights(gradients, e)
            found[f"dw1[{e}]"] = check.error(dw1, true.dw1[position])
            found[f"dw2[{e}]"] = check.error(dw2, true.dw2[position])
    return found


def wrong(found: dict[str, float], dtype: torch.dtype) -> list[str]:
    """What is wrong about `errors`; a layer rounds three times to its dtype between x and o."""
    allowed = check.tolerance(dtype, rounded_steps=3)
    return [f"{n}: relative error {e:.2e}, allowed {allowed:.1e}" for n, e in found.items() if not e <= allowed]
