"""What the bias_dot kernel is compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .variants import ARCH


@dataclass(frozen=True)
class BiasDotSpec:
    """Per row the product of its token's `width` 16-bit numbers with its group's bias, in the last of `columns` parts.

    The launch takes tokens (T, width), bias (groups, width), cu_rows (groups+1,), row_token (R,), parts (R, columns)
    fp32.
    """

    width: int
    dtype: str  # "bf16" | "fp16"
    groups: int
    columns: int

    @property
    def name(self) -> str:
        return f"bias_dot_{ARCH}"

    def why_invalid(self) -> str | None:
        """None, or what is wrong."""
        return None if self.width > 0 and self.width % 8 == 0 else f"width = {self.width} must be a multiple of 8"

    def build(self) -> tuple[Any, tuple[Any, ...]]:
        """(kernel, fake arguments)"""
        import cutlass
        import cutlass.cute as cute

        from .assembly import DTYPES, fake
        from .memory_bound.bias_dot import BiasDot

        rows, dtype = cute.sym_int(), DTYPES[self.dtype]
        return BiasDot(self.width, self.dtype, self.groups, self.columns), (
            fake(dtype, cute.sym_int(), self.width),
            fake(dtype, self.groups, self.width),
            fake(cutlass.Int32, self.groups + 1, alignment=4),
            fake(cutlass.Int32, rows, alignment=4),
            fake(cutlass.Float32, rows, self.columns, alignment=4),
        )


def aot_specs() -> list[BiasDotSpec]:
    """gpt-oss, and a width with a tail."""
    return [BiasDotSpec(2880, "bf16", 32, 24), BiasDotSpec(200, "fp16", 8, 2)]
