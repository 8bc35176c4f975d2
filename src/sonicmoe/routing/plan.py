"""The plan of a routing: rows sorted by expert, and the index arrays between rows, slots and tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from sonicmoe import ops
from sonicmoe.jit.target import is_hopper
from sonicmoe.routing.checks import check


class Routing(NamedTuple):
    """Which token goes to which expert, as the kernels read it.

    A slot is a (token, expert) pair in the tokens' order, a row the same pair in the experts' order. R and S are sizes
    of buffers; how much of them is used only the device knows: `cu_rows[E]` rows and `cu_slots[T]` slots. Everything
    but scores is int32, everything is contiguous and on one device. `check_invariants` states the rest exactly.

    scores      (S,) float32 (float64 for the reference), differentiable: the weight of a slot's row in its token's sum
    cu_rows     (E+1,): expert e has the rows cu_rows[e] to cu_rows[e+1], ordered by token
    row_token   (R,): the row's token; 0 in the padding, the rows from cu_rows[E] on
    row_slot    (R,): the row's slot; 0 in the padding
    slot_row    (S,): the slot's row, -1 if it has none
    cu_slots    (T+1,): token t has the slots cu_slots[t] to cu_slots[t+1]; None: every token has S // T
    num_tokens  T
    """

    scores: Tensor
    cu_rows: Tensor
    row_token: Tensor
    row_slot: Tensor
    slot_row: Tensor
    cu_slots: Tensor | None
    num_tokens: int

    @property
    def num_experts(self) -> int:
        """E."""
        return self.cu_rows.shape[0] - 1


def check_routed(routing: Routing, logits: Tensor) -> None:
    """A routing of as many tokens to as many experts, on their device."""
    check("routing", type(routing).__name__, isinstance(routing, Routing), "a sonicmoe.Routing")
    tokens, experts = logits.shape
    check("routing.num_experts", routing.num_experts, routing.num_experts == experts, f"{experts}, as logits")
    # T stays out of the text: under torch.compile formatting it would fix it.
    check("routing.num_tokens", routing.num_tokens, routing.num_tokens == tokens, "T, as logits")
    device = routing.cu_rows.device
    check("routing.cu_rows.device", device, device == logits.device, f"{logits.device}, as logits")


class Plan(NamedTuple):
    """The index arrays of a `Routing` that follow from the experts of its slots."""

    cu_rows: Tensor
    row_token: Tensor
    row_slot: Tensor
    slot_row: Tensor


def plan(expert_ids: Tensor, num_experts: int, slot_token: Tensor | None = None) -> Plan:
    """Sort slots by expert, keeping their order within one.

    Args:
        expert_ids: int32 or int64, the experts of the slots: (T, K), or (S,) together with slot_token. A slot whose id
            is negative or >= num_experts gets no row.
        num_experts: E.
        slot_token: (S,), the slots' tokens in ascending order. None: slot s belongs to token s // K.

    Returns:
        The index arrays, with as many rows as there are slots; int32.
    """
    cute = is_hopper(expert_ids.device) and ops.plan_has_kernel(expert_ids, num_experts)
    return Plan(
        *ops.steps(expert_ids, slot_token).plan(expert_ids, slot_token, num_experts, "cute" if cute else "torch")
    )
