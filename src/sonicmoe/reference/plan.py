"""The plan of a routing: a stable sort of the slots by expert."""

from __future__ import annotations

import torch
from torch import Tensor


def plan(expert_ids: Tensor, slot_token: Tensor | None, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """cu_rows, row_token, row_slot and slot_row, int32, of slots with these experts; see `sonicmoe.Routing`.

    Args:
        expert_ids: (T, K), or (S,) together with slot_token, int32 or int64. A slot whose id is negative or
            >= num_experts gets no row.
        slot_token: (S,), the slots' tokens in ascending order. None: slot s belongs to token s // K.
        num_experts: E.
    """
    expert = expert_ids.reshape(-1)
    routed = (expert >= 0) & (expert < num_experts)
    slot_expert = torch.where(routed, expert, num_experts).to(torch.int32)
    # What has no expert is sorted behind all that has one: those rows are the padding.
    row_expert, row_slot = slot_expert.sort(stable=True)
    experts = torch.arange(num_experts + 1, dtype=torch.int32, device=expert.device)
    cu_rows = torch.searchsorted(row_expert, experts, out_int32=True)
    rows = torch.arange(expert.shape[0], dtype=torch.int32, device=expert.device)
    slot_row = torch.empty_like(rows).scatter_(0, row_slot, rows)
    row_token = row_slot // expert_ids.shape[1] if slot_token is None else slot_token[row_slot]
    padding = row_expert == num_experts
    return (
        cu_rows,
        row_token.masked_fill(padding, 0).to(torch.int32),
        row_slot.masked_fill(padding, 0).to(torch.int32),
        slot_row.masked_fill(~routed, -1),
    )
