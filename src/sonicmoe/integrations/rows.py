"""Rows that were dispatched by somebody else: sorted by expert, with counts that stay on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from sonicmoe.activations import Activation
from sonicmoe.errors import InvalidArgument
from sonicmoe.functional import as_autocast, check_operand, moe_experts, scores_for
from sonicmoe.routing import route_rows

PLACEMENTS = ("after", "before")


def experts_of_rows(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    rows_per_expert: Tensor,
    scores: Tensor | None = None,
    placement: str = "after",
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    activation: str | Activation = "swiglu",
    w1_layout: str = "concat",
    backend: str = "auto",
    w1_grad: Tensor | None = None,
    w2_grad: Tensor | None = None,
) -> Tensor:
    """Each row through its expert; nothing is gathered, summed or synchronised.

    Args:
        x: (R, H), sorted by expert. R may be 0, and may exceed the sum of the counts.
        rows_per_expert: (E,) int32 or int64, on x's device.
        scores: (R,) of any floating dtype, used in fp32 (fp64 where x is); differentiable. None: 1.
        placement: where a row's score s multiplies: "after": s * (a w2^T + b2); "before": (s * a) w2^T + b2. The two
            differ only by b2.
        others: of `moe_experts`.

    Returns:
        (R, H) in x's dtype; 0 for rows beyond the counts, which get no gradient either. Every expert's weight gets its
        gradient, 0 if it has no rows.
    """
    if placement not in PLACEMENTS:
        raise InvalidArgument("placement", repr(placement), f"one of {', '.join(PLACEMENTS)}")
    if x.dim() != 2:
        raise InvalidArgument("x.shape", tuple(x.shape), "(R, H)")
    x, w1, w2, b1, b2 = as_autocast(x, w1, w2, b1, b2)
    routing = route_rows(rows_per_expert, num_rows=x.shape[0])
    if scores is not None:
        if scores.shape != routing.scores.shape:
            raise InvalidArgument("scores.shape", tuple(scores.shape), f"({x.shape[0]},), one for each row of x")
        routing = routing._replace(scores=scores_for(x, scores).masked_fill(routing.slot_row < 0, 0))
    unweighted_bias = b2 is not None and scores is not None and placement == "before"
    if b2 is not None and unweighted_bias:
        check_operand("b2", b2, (rows_per_expert.shape[0], x.shape[1]), x.dtype, x.device)
    o = moe_experts(
        x,
        w1,
        w2,
        routing,
        b1,
        None if unweighted_bias else b2,
        activation=activation,
        w1_layout=w1_layout,
        backend=backend,
        w1_grad=w1_grad,
        w2_grad=w2_grad,
    )
    if b2 is None or not unweighted_bias:
        return o
    row = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
    expert = torch.searchsorted(routing.cu_rows[1:].contiguous(), row, right=True)
    # A zero row at the end, for the rows beyond the counts.
    return o + torch.nn.functional.pad(b2, (0, 0, 0, 1)).index_select(0, expert)
