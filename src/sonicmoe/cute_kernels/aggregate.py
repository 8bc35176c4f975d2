"""What the aggregate kernel is compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .variants import ARCH

MAX_WIDTH = 1 << 16


@dataclass(frozen=True)
class AggregateSpec:
    """Sums of gathered rows of `width` 16-bit numbers; tokens, rows and slots are counted at the launch.

    slots_per_token: None for a variable number, given by cu_slots. weighted: with scores. parts: columns of the partial
    gradients of the scores; 0: there are none. beside: it runs beside the launch before it, of which it reads nothing.

    The launch takes rows (R, width), scores (S,) or None, parts (R, parts) or None, slot_row (S,), cu_slots (T+1,) or
    None, o (T, width), dscores (S,) or None.
    """

    width: int
    dtype: str  # "bf16" | "fp16"
    slots_per_token: int | None
    weighted: bool
    parts: int = 0
    beside: bool = False

    @property
    def name(self) -> str:
        return f"aggregate_{ARCH}"

    def why_invalid(self) -> str | None:
        """None, or what is wrong."""
        if self.width % 8 or not 8 <= self.width <= MAX_WIDTH:
            return f"width = {self.width} must be a multiple of 8, 8 to {MAX_WIDTH}"
        return None

    def build(self) -> tuple[Any, tuple[Any, ...]]:
        """(kernel, fake arguments)"""
        reason = self.why_invalid()
        if reason:
            raise ValueError(f"aggregate: {reason}")
        import cutlass
        import cutlass.cute as cute

        from .assembly import DTYPES, fake
        from .memory_bound.aggregate import Aggregate

        kernel = Aggregate(self.width, self.dtype, self.slots_per_token, self.weighted, self.parts, self.beside)
        rows, tokens, slots = cute.sym_int(), cute.sym_int(), cute.sym_int()

        def vector(size: Any, dtype: Any = cutlass.Float32) -> Any:
            return fake(dtype, size, alignment=4)

        return kernel, (
            fake(DTYPES[self.dtype], rows, self.width),
            vector(slots) if self.weighted else None,
            fake(cutlass.Float32, rows, self.parts, alignment=4) if self.parts else None,
            vector(slots, cutlass.Int32),
            vector(cute.sym_int(), cutlass.Int32) if self.slots_per_token is None else None,
            fake(DTYPES[self.dtype], tokens, self.width),
            vector(slots) if self.parts else None,
        )


def aot_specs() -> list[AggregateSpec]:
    """Forward and backward, also beside a launch, fixed and variable slots, rows of one and of more pieces."""
    return [
        AggregateSpec(1536, "bf16", 8, weighted=True),
        AggregateSpec(1536, "bf16", 8, weighted=False, parts=2),
        AggregateSpec(4096, "bf16", 16, weighted=True),
        AggregateSpec(2880, "fp16", 4, weighted=True),
        AggregateSpec(2048, "bf16", 10, weighted=False, parts=4),
        AggregateSpec(1536, "bf16", None, weighted=True),
        AggregateSpec(4096, "bf16", None, weighted=False, parts=8),
        AggregateSpec(64, "fp16", 64, weighted=True),
        AggregateSpec(1536, "bf16", 8, weighted=False, parts=2, beside=True),
        AggregateSpec(4096, "bf16", None, weighted=False, parts=8, beside=True),
    ]
