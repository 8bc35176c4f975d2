"""Routings of what others chose: a model's own router, pairs in any order, rows that already lie sorted by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from sonicmoe.routing.checks import check, check_ids, check_like, check_no_nan, check_scores, check_size
from sonicmoe.routing.plan import Plan, Routing, plan


def route_assigned(expert_ids: Tensor, scores: Tensor, *, num_experts: int, validate: bool = False) -> Routing:
    """Each token to k experts that were chosen elsewhere.

    Args:
        expert_ids: (T, K) int32 or int64. An id that is negative or >= num_experts is skipped: no row.
        scores: (T, K), any floating dtype; used in fp32 (fp64 stays fp64).
        num_experts: E.
        validate: raise on NaN in scores; this waits for the device.

    Returns:
        S = R = T*K; slot t*K + j is expert_ids[t, j]. Differentiable in scores; a skipped one has score and gradient 0.

    Raises:
        InvalidArgument: for shapes, dtypes or devices that are not accepted; with validate, for NaN.
    """
    check_ids("expert_ids", expert_ids, 2, "(T, K)")
    check_scores(scores, "expert_ids", expert_ids)
    check_size("num_experts", num_experts, 1)
    if validate:
        check_no_nan("scores", scores)
    index = plan(expert_ids, num_experts)
    values = _of_routed(scores.reshape(-1), index)
    return Routing(values, *index, cu_slots=None, num_tokens=expert_ids.shape[0])


def route_pairs(
    token_ids: Tensor,
    expert_ids: Tensor,
    scores: Tensor,
    *,
    num_tokens: int,
    num_experts: int,
    validate: bool = False,
) -> Routing:
    """(token, expert) pairs in any order, any number per token, also the same one more than once.

    Args:
        token_ids, expert_ids: (P,) int32 or int64. A pair whose expert is negative or >= num_experts gets no row.
        scores: (P,), any floating dtype; used in fp32 (fp64 stays fp64).
        num_tokens, num_experts: T and E.
        validate: raise on NaN in scores and on tokens outside 0 to T-1; this waits for the device. Otherwise such a
            pair is skipped.

    Returns:
        S = R = P, with cu_slots. Slots are sorted by token, pairs of one token in the order given. Differentiable in
        scores, in the order given; a skipped pair has score and gradient 0.

    Raises:
        InvalidArgument: for shapes, dtypes or devices that are not accepted; with validate, for values.
    """
    check_ids("token_ids", token_ids, 1, "(P,)")
    check_ids("expert_ids", expert_ids, 1, "(P,)")
    check_like("expert_ids", expert_ids, "token_ids", token_ids)
    check_scores(scores, "token_ids", token_ids)
    check_size("num_tokens", num_tokens, 0)
    check_size("num_experts", num_experts, 1)
    inside = (token_ids >= 0) & (token_ids < num_tokens)
    if validate:
        check_no_nan("scores", scores)
        check("token_ids", f"{int((~inside).sum())} outside", bool(inside.all()), f"0 to {num_tokens - 1}")
    # A pair without a token is sorted behind all others, past cu_slots[T].
    slot_token, pair = torch.where(inside, token_ids, num_tokens).to(torch.int32).sort(stable=True)
    tokens = torch.arange(num_tokens + 1, dtype=torch.int32, device=token_ids.device)
    cu_slots = torch.searchsorted(slot_token, tokens, out_int32=True)
    slot_expert = expert_ids[pair].masked_fill(slot_token == num_tokens, -1)
    index = plan(slot_expert, num_experts, slot_token)
    values = _of_routed(scores[pair], index)
    return Routing(values, *index, cu_slots=cu_slots, num_tokens=num_tokens)


def route_rows(rows_per_expert: Tensor, *, num_rows: int) -> Routing:
    """Rows that lie sorted by expert, as expert parallelism delivers them: each is a token of its own, with score 1.

    Args:
        rows_per_expert: (E,) int32 or int64, not negative.
        num_rows: R, the rows of x. Those beyond the sum of rows_per_expert are ignored: their output is 0. The sum
            should not exceed R; what does is cut off.

    Returns:
        T = S = R = num_rows; row r is token r and slot r.

    Raises:
        InvalidArgument: for shapes or dtypes that are not accepted.
    """
    check_ids("rows_per_expert", rows_per_expert, 1, "(E,)")
    check_size("E, of rows_per_expert,", rows_per_expert.shape[0], 1)
    check_size("num_rows", num_rows, 0)
    device = rows_per_expert.device
    cu_rows = torch.zeros(rows_per_expert.shape[0] + 1, dtype=torch.int32, device=device)
    cu_rows[1:] = rows_per_expert.cumsum(0).clamp(max=num_rows)
    row = torch.arange(num_rows, dtype=torch.int32, device=device)
    used = row < cu_rows[-1]
    row_token = torch.where(used, row, 0)
    return Routing(
        scores=torch.ones(num_rows, dtype=torch.float32, device=device),
        cu_rows=cu_rows,
        row_token=row_token,
        row_slot=row_token,
        slot_row=torch.where(used, row, -1),
        cu_slots=None,
        num_tokens=num_rows,
    )


def _of_routed(scores: Tensor, index: Plan) -> Tensor:
    """Scores in fp32 or fp64, 0 and without gradient where the slot has no row."""
    dtype = torch.promote_types(scores.dtype, torch.float32)
    return scores.to(dtype).masked_fill(index.slot_row < 0, 0)
