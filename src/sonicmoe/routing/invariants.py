"""What holds of every `Routing`, checked value by value: for tests, and for plans from elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from sonicmoe.routing.checks import check
from sonicmoe.routing.plan import Routing


def check_invariants(routing: Routing) -> None:
    """Raise InvalidArgument, naming the array and the rule, unless the routing is as `Routing` says.

    Waits for the device.

    - cu_rows and cu_slots start at 0, never fall, and end within their buffers;
    - rows of an expert are ordered by token; padding rows have token 0 and slot 0;
    - row_slot is one to one, slot_row its inverse, and -1 for all other slots, those past cu_slots[T] among them;
    - a row's token is the token of its slot.
    """
    _check_form(routing)
    r = _on_cpu(routing)
    rows = _check_boundaries("cu_rows", r.cu_rows, r.row_token.shape[0])
    slot_token = _check_slots(r)
    token, slot = r.row_token[:rows].long(), r.row_slot[:rows].long()
    check("routing.row_token", "other tokens", _within(token, r.num_tokens), f"0 to T-1 = {r.num_tokens - 1}")
    check("routing.row_slot", "other slots", _within(slot, r.slot_row.shape[0]), f"0 to S-1 = {len(r.slot_row) - 1}")
    for name, index in (("row_token", r.row_token), ("row_slot", r.row_slot)):
        check(f"routing.{name}", "another value in the padding", not index[rows:].any(), f"0 from row {rows} on")
    expert = torch.searchsorted(r.cu_rows[1:].contiguous(), torch.arange(rows, dtype=torch.int32), right=True)
    ordered = (expert.diff() > 0) | (token.diff() >= 0)
    check("routing.row_token", "another order", bool(ordered.all()), "ordered by token within each expert")
    inverse = torch.full_like(r.slot_row, -1)
    inverse[slot] = torch.arange(rows, dtype=torch.int32)
    check("routing.row_slot", "a slot twice", int((inverse >= 0).sum()) == rows, "one to one")
    check("routing.slot_row", "another map", torch.equal(inverse, r.slot_row), "the inverse of row_slot, else -1")
    check("routing.row_token", "another token", torch.equal(slot_token[slot], token), "the token of the row's slot")


def _on_cpu(r: Routing) -> Routing:
    cu_slots = None if r.cu_slots is None else r.cu_slots.cpu()
    index = (r.cu_rows.cpu(), r.row_token.cpu(), r.row_slot.cpu(), r.slot_row.cpu())
    return Routing(r.scores.detach().cpu(), *index, cu_slots, r.num_tokens)


def _check_form(r: Routing) -> None:
    """Dtypes, dimensions, lengths, and one device."""
    for name, t in r._asdict().items():
        if isinstance(t, Tensor):
            dtypes = (torch.float32, torch.float64) if name == "scores" else (torch.int32,)
            check(f"routing.{name}.shape", tuple(t.shape), t.dim() == 1, "one dimension")
            check(f"routing.{name}.dtype", t.dtype, t.dtype in dtypes, ", ".join(map(str, dtypes)))
            check(f"routing.{name}.device", t.device, t.device == r.scores.device, f"{r.scores.device}, as scores")
            check(f"routing.{name}.stride()", t.stride(), t.is_contiguous(), "contiguous")
    check("routing.cu_rows.shape", tuple(r.cu_rows.shape), r.num_experts >= 1, "(E+1,) with E >= 1")
    check("routing.row_slot.shape", tuple(r.row_slot.shape), r.row_slot.shape == r.row_token.shape, "that of row_token")
    check("routing.slot_row.shape", tuple(r.slot_row.shape), r.slot_row.shape == r.scores.shape, "that of scores")


def _check_boundaries(name: str, cu: Tensor, size: int) -> int:
    """The end of the last part."""
    rising = cu[0] == 0 and not (cu.diff() < 0).any() and cu[-1] <= size
    check(f"routing.{name}", cu.tolist(), bool(rising), f"from 0, never falling, at most {size}")
    return int(cu[-1])


def _check_slots(r: Routing) -> Tensor:
    """The tokens of the slots; T for unused ones."""
    slots = torch.arange(r.slot_row.shape[0], dtype=torch.int32)
    if r.cu_slots is None:
        per_token, rest = divmod(len(slots), max(r.num_tokens, 1))
        even = rest == 0 and (r.num_tokens > 0 or len(slots) == 0)
        check("routing.slot_row.shape", tuple(slots.shape), even, f"a multiple of T = {r.num_tokens} without cu_slots")
        return slots.long() // max(per_token, 1)
    length = r.num_tokens + 1
    check("routing.cu_slots.shape", tuple(r.cu_slots.shape), r.cu_slots.shape[0] == length, f"(T+1,) = ({length},)")
    used = _check_boundaries("cu_slots", r.cu_slots, len(slots))
    unused = r.slot_row[used:] == -1
    check("routing.slot_row", "a row in an unused slot", bool(unused.all()), f"-1 from slot {used} on")
    return torch.searchsorted(r.cu_slots[1:].contiguous(), slots, right=True)


def _within(index: Tensor, size: int) -> bool:
    return bool(((index >= 0) & (index < size)).all())
