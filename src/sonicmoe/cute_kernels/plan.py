"""What the plan kernels are compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .variants import ARCH

MAX_EXPERTS = 16384
MAX_SLOTS = (1 << 31) - (1 << 12)  # counted in 32 bits, a step past the last one included
# Each CTA reads the counts of all chunks: with many experts fewer chunks keep that small.
MAX_CHUNKS, MIN_CHUNKS = 128, 16
CHUNK_COUNTS = 1 << 17
# Slots that are worth a CTA of their own
MIN_CHUNK = 512


@dataclass(frozen=True)
class PlanSpec:
    """The stable counting sort of slots by expert; slots are counted at the launch.

    slots_per_token: None where the slots' tokens are given. ids: "i32" or "i64".

    The launch takes ids (S,), slot_token (S,) or None, counts (chunks, columns) as scratch, cu_rows (experts + 1,),
    row_token (S,), row_slot (S,), slot_row (S,).
    """

    experts: int
    slots_per_token: int | None
    ids: str

    @property
    def name(self) -> str:
        return f"plan_{ARCH}"

    @property
    def columns(self) -> int:
        """Of counts: one for each expert and one for slots without, in whole 16-byte chunks."""
        return -(-(self.experts + 1) // 4) * 4

    def chunks(self, num_slots: int) -> int:
        """Rows of counts."""
        most = min(MAX_CHUNKS, max(MIN_CHUNKS, CHUNK_COUNTS // self.experts))
        return max(1, min(most, -(-num_slots // MIN_CHUNK)))

    def why_invalid(self) -> str | None:
        """None, or what is wrong."""
        return None if self.experts <= MAX_EXPERTS else f"experts = {self.experts} must be at most {MAX_EXPERTS}"

    def build(self) -> tuple[Any, tuple[Any, ...]]:
        """(kernel, fake arguments)"""
        reason = self.why_invalid()
        if reason:
            raise ValueError(f"plan: {reason}")
        import cutlass
        import cutlass.cute as cute

        from .assembly import fake
        from .memory_bound.plan import Plan

        slots = cute.sym_int()

        def index(*shape: Any, alignment: int = 4) -> Any:
            return fake(cutlass.Int32, *shape, alignment=alignment)

        return Plan(self.experts, self.columns, self.slots_per_token), (
            index(slots) if self.ids == "i32" else fake(cutlass.Int64, slots, alignment=8),
            index(slots) if self.slots_per_token is None else None,
            index(cute.sym_int(), self.columns, alignment=16),
            index(self.experts + 1),
            index(slots),
            index(slots),
            index(slots),
        )


def aot_specs() -> list[PlanSpec]:
    """Few and many experts, both kinds of ids, tokens given or not."""
    return [
        PlanSpec(8, 2, "i32"),
        PlanSpec(128, 8, "i32"),
        PlanSpec(256, 16, "i32"),
        PlanSpec(512, 10, "i64"),
        PlanSpec(128, None, "i64"),
        PlanSpec(4096, 64, "i32"),
    ]
