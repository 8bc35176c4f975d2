"""The layer's one autograd Function: three launches forward, five backward, and the biases' sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sonicmoe import ops
from sonicmoe.ops._once import once
from sonicmoe.reference.forward import scores_grad


class Form(NamedTuple):
    """What of a layer is not a tensor."""

    activation: str
    w1_layout: str
    backend: str


class Kept(NamedTuple):
    """What the backward needs of the forward. x and w1 are None where the gradients that need them are not needed."""

    x: Tensor | None
    w1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    h: Tensor
    scores: Tensor
    cu_rows: Tensor
    row_token: Tensor
    row_slot: Tensor
    slot_row: Tensor
    cu_slots: Tensor | None


def forward_steps(
    run: Any,
    x: Tensor,
    weights: Sequence[Any],
    scores: Tensor,
    plan: Sequence[Any],
    form: Form,
    keep_h: bool,
) -> tuple[Tensor, Tensor]:
    """o (T, H), and h (R, G*I) if kept. run: the ops, or their bodies; weights: w1, w2, b1, b2; plan: of a Routing,
    cu_rows to cu_slots."""
    w1, w2, b1, b2 = weights
    cu_rows, row_token, _, slot_row, cu_slots = plan
    h, a = run.up_proj(x, w1, b1, cu_rows, row_token, form.activation, form.w1_layout, keep_h, form.backend)
    y = run.down_proj(a, w2, b2, cu_rows, form.backend)
    del a  # before o is allocated
    o, _ = run.aggregate(y, scores, None, slot_row, cu_slots, x.shape[0], form.backend)
    return o, h


class MoEExperts(torch.autograd.Function):
    """Experts of a MoE layer, from routed tokens to their weighted sum.

    Keeps x and h (2*T*H + 4*R*I bytes in bf16 with a gated activation), the weights and the routing; a, y and every
    gathered copy are recomputed or never exist. What no argument requires is neither kept nor computed. With w1_grad or
    w2_grad, an fp32 buffer, the weight's gradient is added to the buffer and autograd sees none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        w2: Tensor,
        b1: Tensor | None,
        b2: Tensor | None,
        scores: Tensor,
        cu_rows: Tensor,
        row_token: Tensor,
        row_slot: Tensor,
        slot_row: Tensor,
        cu_slots: Tensor | None,
        w1_grad: Tensor | None,
        w2_grad: Tensor | None,
        form: Form,
    ) -> Tensor:
        plan = (cu_rows, row_token, row_slot, slot_row, cu_slots)
        run = ops.steps(x, w1, w2, b1, b2, scores, *plan)
        o, h = forward_steps(run, x, (w1, w2, b1, b2), scores, plan, form, keep_h=True)
        needs_x, needs_w1 = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_w1 else None, w1 if needs_x else None, w2, b2, h, scores, *plan)
        ctx.form, ctx.w1_grad, ctx.w2_grad = form, w1_grad, w2_grad
        ctx.private = saves_privately()
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        return once("moe_experts", MoEExperts._gradients, ctx, do)

    @staticmethod
    def _gradients(ctx: Any, kept: list[Tensor | None], do: Tensor) -> tuple[Tensor | None, ...]:
        needs, sums = ctx.needs_input_grad[:6], (ctx.w1_grad, ctx.w2_grad)
        run = ops.steps(do, *kept, *sums)
        own_h = ctx.private and is_last(run)
        return *backward_steps(run, ops.as_read(do), kept, needs, ctx.form, *sums, own_h), *(None,) * 8


def saves_privately() -> bool:
    """Whether a Function alone sees what it saves now: no hooks pack it, as for checkpoints or the host's memory.

    Not seen here: who reads `grad_fn.saved_tensors` or registers hooks for them there, and finds dh after the backward.
    """
    return not torch.compiler.is_compiling() and torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def is_last(run: Any) -> bool:
    """Whether this backward is the last one of its graph (no retain_graph), and one that nobody watches or traces."""
    return run is ops.bodies and not torch._C._autograd._get_current_graph_task_keep_graph()


def backward_steps(
    run: Any,
    do: Tensor,
    kept: list[Tensor | None],
    needs: tuple[bool, ...],
    form: Form,
    w1_grad: Tensor | None = None,
    w2_grad: Tensor | None = None,
    own_h: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w1, w2, b1, b2 and scores where needed; run as in `forward_steps`, do contiguous.

    kept: a `Kept` as a list, which is emptied: what nobody else holds is freed once it is read. own_h: nobody will read
    h again, so dh takes its place.
    """
    x, w1, w2, b2, h, scores, cu_rows, row_token, row_slot, slot_row, cu_slots = Kept(*kept)  # type: ignore[arg-type]
    kept.clear()
    needs_x, needs_w1, needs_w2, needs_b1, needs_b2, needs_scores = needs
    activation, w1_layout, backend = form
    dx = dw1 = dw2 = db1 = db2 = dscores = None

    if needs_b2:
        db2 = run.bias_grad(do, cu_rows, row_token, scores, row_slot, backend).to(do.dtype)
    if not (needs_x or needs_w1 or needs_w2 or needs_b1 or needs_scores):
        return None, None, None, None, db2, None
    of_rows = (scores, cu_rows, row_token, row_slot)
    if own_h:
        dh = h
        a_s, parts = run.down_dgrad_(do, w2, b2, h, *of_rows, activation, backend)
    else:
        dh, a_s, parts = run.down_dgrad(do, w2, b2, h, *of_rows, activation, backend)
    del h
    of_scores = parts if needs_scores else None
    if not needs_w2:
        a_s = None
    if needs_x:
        dx_rows = run.up_dgrad(dh, w1, cu_rows, w1_layout, backend)
    if needs_x and needs_w2:
        dw2 = do.new_empty(*w2.shape) if w2_grad is None else None
        target, adds = (w2_grad, True) if dw2 is None else (dw2, False)
        dx, dscores = run.down_wgrad_aggregate_(
            target, adds, do, a_s, cu_rows, row_token, dx_rows, of_scores, slot_row, cu_slots, backend
        )
    elif needs_x:
        dx, dscores = run.aggregate(dx_rows, None, of_scores, slot_row, cu_slots, do.shape[0], backend)
    elif needs_w2 and w2_grad is not None:
        run.down_wgrad_add_(w2_grad, do, a_s, cu_rows, row_token, backend)
    elif needs_w2:
        dw2 = run.down_wgrad(do, a_s, cu_rows, row_token, backend)
    if needs_scores and not needs_x:
        dscores = scores_grad(parts, slot_row)
    a_s = dx_rows = None  # before dw1 is allocated
    if needs_w1 and w1_grad is not None:
        run.up_wgrad_add_(w1_grad, x, dh, cu_rows, row_token, w1_layout, backend)
    elif needs_w1:
        dw1 = run.up_wgrad(x, dh, cu_rows, row_token, w1_layout, backend)
    if needs_b1:
        db1 = run.bias_grad(dh, cu_rows, None, None, None, backend).to(do.dtype)
        if w1_layout == "interleaved":
            db1 = db1.unflatten(1, (2, -1)).transpose(1, 2).flatten(1)
    return dx, dw1, dw2, db1, db2, dscores if needs_scores else None
