"""The backward's steps (down_dgrad, down_wgrad, up_dgrad, up_wgrad, the biases) in plain torch.

`aggregate`, the fifth step, is the forward's; a layer takes it together with down_wgrad.
"""

from __future__ import annotations

from torch import Tensor

from sonicmoe.activations import Activation
from sonicmoe.reference.activation import act, act_backward
from sonicmoe.reference.forward import aggregate
from sonicmoe.reference.rows import accumulator, from_concat, row_buffer, rows_of_experts, to_concat


def down_dgrad(
    do: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    h: Tensor,
    scores: Tensor,
    cu_rows: Tensor,
    row_token: Tensor,
    row_slot: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """With da'[r] = do[row_token[r]] w2[e], a = act(h) and s = scores[row_slot[r]]:

    dh = act'(h) * s da';  a_s = s a;  the score's gradient <da', a> (+ <do, b2[e]>).

    do (T, H); w2 (E, H, I); b2 (E, H); h (R, G*I); scores (S,). Returns dh (R, G*I) and a_s (R, I) in do's dtype and
    parts (R, 1) in the accumulator's.
    """
    kind, acc = Activation.parse(activation), accumulator(do.dtype)
    num_rows = row_token.shape[0]
    experts = rows_of_experts(cu_rows, num_rows)
    dh = row_buffer(do, h.shape[1], num_rows, experts)
    a_s = row_buffer(do, w2.shape[2], num_rows, experts)
    parts = row_buffer(do.new_empty(0, dtype=acc), 1, num_rows, experts)
    for e, rows in experts:
        do_rows = do.index_select(0, row_token[rows]).to(acc)
        da = do_rows @ w2[e].to(acc)
        h_rows = h[rows].to(acc)
        a = act(kind, h_rows)
        score = scores.index_select(0, row_slot[rows]).to(acc).unsqueeze(1)
        dh[rows] = act_backward(kind, h_rows, score * da)
        a_s[rows] = score * a
        parts[rows] = (da * a).sum(1, keepdim=True)
        if b2 is not None:
            parts[rows] += do_rows @ b2[e].to(acc).unsqueeze(1)
    return dh, a_s, parts


def down_dgrad_(
    do: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    h: Tensor,
    scores: Tensor,
    cu_rows: Tensor,
    row_token: Tensor,
    row_slot: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """`down_dgrad` with dh in the place of h: returns a_s and parts."""
    dh, a_s, parts = down_dgrad(do, w2, b2, h, scores, cu_rows, row_token, row_slot, activation)
    h.copy_(dh)
    return a_s, parts


def down_wgrad(do: Tensor, a_s: Tensor, cu_rows: Tensor, row_token: Tensor) -> Tensor:
    """dw2[e] = sum over e's rows of do[row_token[r]]^T a_s[r]. Returns (E, H, I) in do's dtype, 0 for empty experts."""
    dw2 = do.new_zeros((cu_rows.shape[0] - 1, do.shape[1], a_s.shape[1]))
    down_wgrad_add_(dw2, do, a_s, cu_rows, row_token)
    return dw2


def down_wgrad_add_(dw2: Tensor, do: Tensor, a_s: Tensor, cu_rows: Tensor, row_token: Tensor) -> None:
    """dw2[e] += sum over e's rows of do[row_token[r]]^T a_s[r], in place. dw2 (E, H, I), any float dtype."""
    acc = accumulator(do.dtype)
    for e, rows in rows_of_experts(cu_rows, row_token.shape[0]):
        dw2[e] += do.index_select(0, row_token[rows]).to(acc).T @ a_s[rows].to(acc)


def down_wgrad_aggregate_(
    dw2: Tensor,
    adds: bool,
    do: Tensor,
    a_s: Tensor,
    cu_rows: Tensor,
    row_token: Tensor,
    dx_rows: Tensor,
    parts: Tensor | None,
    slot_row: Tensor,
    cu_slots: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`down_wgrad` into dw2, or added to it, and `aggregate` of dx_rows, without scores: dx and dscores."""
    if not adds:
        dw2.zero_()
    down_wgrad_add_(dw2, do, a_s, cu_rows, row_token)
    return aggregate(dx_rows, None, parts, slot_row, cu_slots, do.shape[0])


def up_dgrad(dh: Tensor, w1: Tensor, cu_rows: Tensor, w1_layout: str) -> Tensor:
    """dx_rows[r] = dh[r] w1[e]. dh (R, G*I), [gate | up]; w1 (E, G*I, H); returns (R, H) in dh's dtype."""
    acc = accumulator(dh.dtype)
    experts = rows_of_experts(cu_rows, dh.shape[0])
    dx_rows = row_buffer(dh, w1.shape[2], dh.shape[0], experts)
    for e, rows in experts:
        dx_rows[rows] = dh[rows].to(acc) @ to_concat(w1[e], w1_layout).to(acc)
    return dx_rows


def up_wgrad(x: Tensor, dh: Tensor, cu_rows: Tensor, row_token: Tensor, w1_layout: str) -> Tensor:
    """dw1[e] = sum over e's rows of dh[r]^T x[row_token[r]]. Returns (E, G*I, H) in x's dtype, 0 for empty experts."""
    dw1 = x.new_zeros((cu_rows.shape[0] - 1, dh.shape[1], x.shape[1]))
    up_wgrad_add_(dw1, x, dh, cu_rows, row_token, w1_layout)
    return dw1


def up_wgrad_add_(dw1: Tensor, x: Tensor, dh: Tensor, cu_rows: Tensor, row_token: Tensor, w1_layout: str) -> None:
    """dw1[e] += sum over e's rows of dh[r]^T x[row_token[r]], in place. dw1 (E, G*I, H), any float dtype."""
    acc = accumulator(x.dtype)
    for e, rows in rows_of_experts(cu_rows, row_token.shape[0]):
        product = dh[rows].to(acc).T @ x.index_select(0, row_token[rows]).to(acc)
        dw1[e] += from_concat(product, w1_layout)


def bias_grad(
    rows: Tensor, cu_rows: Tensor, row_token: Tensor | None, scores: Tensor | None, row_slot: Tensor | None
) -> Tensor:
    """Per expert the sum over its rows r of [scores[row_slot[r]] *] rows[row_token[r], or r].

    db1: rows = dh (R, G*I), alone. db2: rows = do (T, H), with row_token, scores and row_slot. Returns (E, N) in the
    accumulator's dtype, 0 for empty experts.
    """
    acc = accumulator(rows.dtype)
    out = rows.new_zeros((cu_rows.shape[0] - 1, rows.shape[1]), dtype=acc)
    num_rows = rows.shape[0] if row_token is None else row_token.shape[0]
    for e, span in rows_of_experts(cu_rows, num_rows):
        terms = (rows[span] if row_token is None else rows.index_select(0, row_token[span])).to(acc)
        if scores is not None and row_slot is not None:
            terms = terms * scores.index_select(0, row_slot[span]).to(acc).unsqueeze(1)
        out[e] = terms.sum(0)
    return out
