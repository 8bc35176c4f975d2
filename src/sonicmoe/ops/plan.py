"""plan: slots sorted by expert, and the index arrays between rows and slots."""

from __future__ import annotations

import torch
from torch import Tensor

from sonicmoe import reference
from sonicmoe.cute_kernels.plan import MAX_EXPERTS, MAX_SLOTS, PlanSpec
from sonicmoe.ops._cute import kernel
from sonicmoe.ops._op import define

Plan = tuple[Tensor, Tensor, Tensor, Tensor]

_IDS = {torch.int32: "i32", torch.int64: "i64"}


def plan_has_kernel(expert_ids: Tensor, num_experts: int) -> bool:
    """Whether backend "cute" takes these arguments; the reference takes all."""
    return num_experts <= MAX_EXPERTS and expert_ids.numel() <= MAX_SLOTS


def _fake(expert_ids: Tensor, slot_token: Tensor | None, num_experts: int, backend: str) -> Plan:
    slots, int32 = expert_ids.numel(), torch.int32
    cu_rows, row_token = expert_ids.new_empty(num_experts + 1, dtype=int32), expert_ids.new_empty(slots, dtype=int32)
    return cu_rows, row_token, torch.empty_like(row_token), torch.empty_like(row_token)


def _cute(expert_ids: Tensor, slot_token: Tensor | None, num_experts: int) -> Plan:
    cu_rows, row_token, row_slot, slot_row = _fake(expert_ids, slot_token, num_experts, "cute")
    ids = expert_ids.reshape(-1).contiguous()
    slots = ids.shape[0]
    if slots == 0:
        return cu_rows.zero_(), row_token, row_slot, slot_row
    per_token = expert_ids.shape[1] if slot_token is None else None
    spec, function = kernel(ids, PlanSpec, num_experts, per_token, _IDS[ids.dtype])
    counts = cu_rows.new_empty(spec.chunks(slots), spec.columns)
    token = None if slot_token is None else slot_token.to(torch.int32).contiguous()
    function(ids, token, counts, cu_rows, row_token, row_slot, slot_row)
    return cu_rows, row_token, row_slot, slot_row


plan = define(
    "plan(Tensor expert_ids, Tensor? slot_token, int num_experts, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    reference=reference.plan,
    cute=_cute,
)
