"""Top-K routing: which experts each token chooses, and with what scores."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sonicmoe import ops, reference
from sonicmoe.jit.target import is_hopper
from sonicmoe.ops._once import once
from sonicmoe.reference.topk import best
from sonicmoe.routing.checks import check, check_like, check_logits, check_no_nan
from sonicmoe.routing.plan import Routing, plan

__all__ = ["SCORINGS", "Scoring", "TopK", "best", "route_topk", "topk"]

SCORINGS = ("topk_softmax", "softmax_topk", "sigmoid")


class Scoring(NamedTuple):
    """What makes scores of logits; see `route_topk`."""

    kind: str = "topk_softmax"
    renormalize: bool = False
    num_groups: int = 1
    top_groups: int = 1
    scale: float = 1.0


def route_topk(
    logits: Tensor,
    k: int,
    *,
    scoring: str = "topk_softmax",
    renormalize: bool = False,
    bias: Tensor | None = None,
    num_groups: int | None = None,
    top_groups: int | None = None,
    scale: float = 1.0,
    validate: bool = False,
) -> Routing:
    """Each token to its k best experts.

    Args:
        logits: (T, E) of the router, any floating dtype. Computed in fp32; fp64 stays fp64.
        k: experts per token, 1 <= k <= E.
        scoring: "topk_softmax": softmax over the k chosen logits; "softmax_topk": softmax over all E, of which the k
            chosen are kept; "sigmoid": of each logit by itself.
        renormalize: divide a token's k scores by their sum ("topk_softmax" has done so already).
        bias: (E,), added for the choice only, never to a score, and without gradient: to the sigmoid or the softmax
            as DeepSeek-V3 does (to the logit with "topk_softmax"). None: logits are compared.
        num_groups, top_groups: experts form num_groups equal groups of neighbours, and a token chooses within its
            top_groups best ones. A group's worth is the sum of its two greatest (biased) scores with "sigmoid"
            (DeepSeek-V3), else the greatest one (DeepSeek-V2).
        scale: factor on the scores, after everything else.
        validate: raise on NaN; this waits for the device. Otherwise NaN counts as -inf.

    Returns:
        S = R = T*k; slot t*k + j is the j-th best expert of token t. `scores` is differentiable in logits. Of equal
        experts the one with the lower id comes first, as in a stable sort. One at -inf is chosen only where nothing
        finite is left (within the token's groups), and has score 0. +inf counts as the largest finite number.

    Raises:
        InvalidArgument: for shapes, dtypes, k, groups or names that are not accepted; with validate, for NaN.

    Source: SonicMoE (arXiv 2512.14080) section 2; DeepSeek-V2 (arXiv 2405.04434) section 2.1.2 and DeepSeek-V3
    (arXiv 2412.19437) section 2.1.2 for groups and bias.
    """
    check_logits(logits, k)
    check("scoring", repr(scoring), scoring in SCORINGS, f"one of {', '.join(SCORINGS)}")
    if bias is not None:
        check_like("bias", bias, "a logits row", logits[0] if logits.shape[0] else logits.new_empty(logits.shape[1]))
    groups = _checked_groups(logits.shape[1], k, num_groups, top_groups)
    if validate:
        check_no_nan("logits", logits)
    scores, ids = topk(logits, k, bias, Scoring(scoring, renormalize, *groups, scale))
    return Routing(scores.reshape(-1), *plan(ids, logits.shape[1]), cu_slots=None, num_tokens=logits.shape[0])


def _checked_groups(experts: int, k: int, num_groups: int | None, top_groups: int | None) -> tuple[int, int]:
    if num_groups is None and top_groups is None:
        return 1, 1
    got = f"{num_groups}, {top_groups}"
    if num_groups is None or top_groups is None:
        check("num_groups, top_groups", got, False, "both or neither")
        return 1, 1
    divides = num_groups >= 1 and experts % num_groups == 0
    check("num_groups", num_groups, divides, f"a divisor of E = {experts}")
    check("top_groups", top_groups, 1 <= top_groups <= num_groups, f"1 to num_groups = {num_groups}")
    within = top_groups * (experts // num_groups)
    check("k", k, k <= within, f"at most {within}, the experts in top_groups = {top_groups} groups")
    return num_groups, top_groups


def topk(logits: Tensor, k: int, bias: Tensor | None, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Scores (T, k), differentiable in logits, and expert ids (T, k) int32, best first; see `route_topk`."""
    kind, renormalize, num_groups, top_groups, scale = scoring
    if is_hopper(logits.device) and ops.topk_has_kernel(logits, k, num_groups, top_groups):
        return _RouteTopK.apply(logits, k, None if bias is None else bias.detach(), scoring)
    return reference.topk(logits, k, bias, kind, renormalize, num_groups, top_groups, scale)


class _RouteTopK(torch.autograd.Function):
    """Top-K by the kernels: keeps logits and ids for the backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, k: int, bias: Tensor | None, scoring: Scoring) -> tuple[Tensor, Tensor]:
        kind, renormalize, num_groups, top_groups, scale = scoring
        scores, ids = ops.steps(logits, bias).topk(
            logits, k, bias, kind, renormalize, num_groups, top_groups, scale, "cute"
        )
        ctx.save_for_backward(logits, ids)
        ctx.scoring = scoring
        ctx.mark_non_differentiable(ids)
        return scores, ids

    @staticmethod
    def backward(ctx: Any, dscores: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return once("route_topk", _RouteTopK._gradients, ctx, dscores)

    @staticmethod
    def _gradients(ctx: Any, saved: list[Tensor], dscores: Tensor) -> tuple[Tensor | None, ...]:
        logits, ids = saved
        kind, renormalize, _, _, scale = ctx.scoring
        run = ops.steps(dscores, ids, logits)
        return run.topk_backward(dscores, ids, logits, kind, renormalize, scale, "cute"), None, None, None


class TopK(NamedTuple):
    """`route_topk` by the kernels, for a layer that keeps by itself what the backward needs."""

    k: int
    scoring: Scoring

    def has_kernels(self, logits: Tensor) -> bool:
        """Whether they take logits of this shape and dtype. False also for what `route_topk` refuses."""
        kind, _, num_groups, top_groups, _ = self.scoring
        tokens, experts = logits.shape
        if kind not in SCORINGS or not 1 <= self.k <= experts:
            return False
        ids = logits.new_empty((tokens, self.k), dtype=torch.int32)
        return ops.topk_has_kernel(logits, self.k, num_groups, top_groups) and ops.plan_has_kernel(ids, experts)

    def forward(self, run: Any, logits: Tensor) -> tuple[Routing, tuple[Tensor, ...]]:
        """The routing, and what to keep for `backward`. run: the ops, or their bodies."""
        kind, renormalize, num_groups, top_groups, scale = self.scoring
        scores, ids = run.topk(logits, self.k, None, kind, renormalize, num_groups, top_groups, scale, "cute")
        tokens, experts = logits.shape
        cu_rows, row_token, row_slot, slot_row = run.plan(ids, None, experts, "cute")
        return Routing(scores.view(-1), cu_rows, row_token, row_slot, slot_row, None, tokens), (ids,)

    def backward(self, run: Any, dlogits: Tensor | None, dscores: Tensor, logits: Tensor, ids: Tensor) -> Tensor:
        """The gradients of logits from those of the routing's scores, added to dlogits if there are any."""
        kind, renormalize, _, _, scale = self.scoring
        arguments = (dscores.view(ids.shape), ids, logits, kind, renormalize, scale, "cute")
        if dlogits is None:
            return run.topk_backward(*arguments)
        run.topk_backward_add_(dlogits, *arguments)
        return dlogits
