"""Losses that keep a router in shape; differentiable in its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sonicmoe import ops, reference
from sonicmoe.jit.target import is_hopper
from sonicmoe.ops._once import once
from sonicmoe.routing.checks import check_logits
from sonicmoe.routing.plan import Routing, check_routed
from sonicmoe.routing.scores import exponentials, or_one, working


def load_balancing_loss(logits: Tensor, routing: Routing, k: int) -> Tensor:
    """E * sum over e of f_e * P_e: 1 when experts are used evenly, up to E / k when k experts take everything.

    f_e is the expert's share of the T*k assignments, its rows / (T*k), without gradient; P_e the mean over tokens of
    the softmax over all experts. After token rounding f_e counts the rounded rows.

    Args:
        logits: (T, E), any floating dtype.
        routing: of these logits.
        k: experts per token.

    Returns:
        A scalar in fp32 (fp64 for fp64 logits), not yet scaled by a coefficient; 0 for T = 0.

    Raises:
        InvalidArgument: if logits and routing do not fit each other.

    Source: Switch Transformer (arXiv 2101.03961) equation 4, for k experts per token.
    """
    check_logits(logits, k)
    check_routed(routing, logits)
    if is_hopper(logits.device) and ops.load_balance_has_kernel(logits):
        return _LoadBalance.apply(logits, routing.cu_rows, k)
    return reference.load_balance(logits, routing.cu_rows, k)


class _LoadBalance(torch.autograd.Function):
    """The loss by the kernels."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, cu_rows: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(logits, cu_rows)
        ctx.k = k
        return ops.steps(logits, cu_rows).load_balance(logits, cu_rows, k, "cute")

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return once("load_balancing_loss", _LoadBalance._gradients, ctx, dloss)

    @staticmethod
    def _gradients(ctx: Any, saved: list[Tensor], dloss: Tensor) -> tuple[Tensor | None, ...]:
        logits, cu_rows = saved
        run = ops.steps(dloss, logits, cu_rows)
        return run.load_balance_backward(dloss, logits, cu_rows, ctx.k, "cute"), None, None


def router_z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of (log sum exp logits)^2, which keeps logits small.

    Args:
        logits: (T, E), any floating dtype. A token whose logits are all -inf counts 0.

    Returns:
        A scalar in fp32 (fp64 for fp64 logits), not yet scaled by a coefficient; 0 for T = 0.

    Source: ST-MoE (arXiv 2202.08906) equation 5.
    """
    check_logits(logits, 1)
    top, weights = exponentials(working(logits))
    total = weights.sum(dim=1, keepdim=True)
    log_total = torch.where(total > 0, top, 0) + or_one(total).log()
    return log_total.square().sum() / max(logits.shape[0], 1)
