"""What the bias_grad kernel is compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .variants import ARCH


@dataclass(frozen=True)
class BiasGradSpec:
    """Per expert the sum of its rows of `width` 16-bit numbers; experts, tokens and rows are counted at the launch.

    gathered: row r is rows[row_token[r]], else rows[r]. weighted: times scores[row_slot[r]].

    The launch takes rows (R or T, width), cu_rows (E+1,), row_token (R,) or None, scores (S,) or None, row_slot (R,) or
    None, out (E, width) fp32.
    """

    width: int
    dtype: str  # "bf16" | "fp16"
    gathered: bool
    weighted: bool

    @property
    def name(self) -> str:
        return f"bias_grad_{ARCH}"

    def why_invalid(self) -> str | None:
        """None, or what is wrong."""
        return None if self.width > 0 and self.width % 8 == 0 else f"width = {self.width} must be a multiple of 8"

    def build(self) -> tuple[Any, tuple[Any, ...]]:
        """(kernel, fake arguments)"""
        reason = self.why_invalid()
        if reason:
            raise ValueError(f"bias_grad: {reason}")
        import cutlass
        import cutlass.cute as cute

        from .assembly import DTYPES, fake
        from .memory_bound.bias_grad import BiasGrad

        rows = cute.sym_int()

        def index(size: Any) -> Any:
            return fake(cutlass.Int32, size, alignment=4)

        return BiasGrad(self.width, self.dtype, self.gathered, self.weighted), (
            fake(DTYPES[self.dtype], cute.sym_int(), self.width),
            index(cute.sym_int()),
            index(rows) if self.gathered else None,
            fake(cutlass.Float32, cute.sym_int(), alignment=4) if self.weighted else None,
            index(rows) if self.weighted else None,
            fake(cutlass.Float32, cute.sym_int(), self.width),
        )


def aot_specs() -> list[BiasGradSpec]:
    """db1 and db2 of gpt-oss, and a width with a tail."""
    return [
        BiasGradSpec(5760, "bf16", gathered=False, weighted=False),
        BiasGradSpec(2880, "bf16", gathered=True, weighted=True),
        BiasGradSpec(72, "fp16", gathered=True, weighted=False),
    ]
