"""What the kernels of the load balancing loss are compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .topk import DTYPES, MAX_EXPERTS
from .variants import ARCH

MAX_PARTS = 1024
TOKENS_AT_ONCE = 8  # of a part


@dataclass(frozen=True)
class BalanceSpec:
    """The loss of logits over `experts`, `top` of which each token has; tokens are counted at the launch.

    The launch takes logits (T, experts), cu_rows (experts + 1,), parts (num_parts(T),) fp32 as scratch, loss (1,) fp32.
    """

    experts: int
    top: int
    dtype: str  # "bf16" | "fp16" | "fp32"

    @property
    def name(self) -> str:
        return f"balance_{ARCH}"

    def num_parts(self, num_tokens: int) -> int:
        """Sums that are added at the end: their number decides the order of the additions."""
        return max(1, min(MAX_PARTS, -(-num_tokens // TOKENS_AT_ONCE)))

    def why_invalid(self) -> str | None:
        """None, or what is wrong."""
        return _why_invalid(self.experts, self.dtype)

    def build(self) -> tuple[Any, tuple[Any, ...]]:
        """(kernel, fake arguments)"""
        reason = self.why_invalid()
        if reason:
            raise ValueError(f"balance: {reason}")
        import cutlass
        import cutlass.cute as cute

        from .assembly import fake
        from .memory_bound.access import DTYPES
        from .memory_bound.balance import Balance, Tokens
        from .memory_bound.logits import Row

        return Balance(Tokens(Row(self.experts, self.dtype), self.top)), (
            fake(DTYPES[self.dtype], cute.sym_int(), self.experts),
            fake(cutlass.Int32, self.experts + 1, alignment=4),
            fake(cutlass.Float32, cute.sym_int(), alignment=4),
            fake(cutlass.Float32, 1, alignment=4),
        )


@dataclass(frozen=True)
class BalanceBackwardSpec:
    """The logits' gradients of the loss.

    The launch takes dloss (1,) fp32, logits (T, experts), cu_rows (experts + 1,), dlogits (T, experts).
    """

    experts: int
    top: int
    dtype: str  # of the logits and of their gradients

    @property
    def name(self) -> str:
        return f"balance_backward_{ARCH}"

    def why_invalid(self) -> str | None:
        """None, or what is wrong."""
        return _why_invalid(self.experts, self.dtype)

    def build(self) -> tuple[Any, tuple[Any, ...]]:
        """(kernel, fake arguments)"""
        reason = self.why_invalid()
        if reason:
            raise ValueError(f"balance_backward: {reason}")
        import cutlass
        import cutlass.cute as cute

        from .assembly import fake
        from .memory_bound.access import DTYPES
        from .memory_bound.balance import BalanceBackward, Tokens
        from .memory_bound.logits import Row

        tokens = cute.sym_int()
        return BalanceBackward(Tokens(Row(self.experts, self.dtype), self.top)), (
            fake(cutlass.Float32, 1, alignment=4),
            fake(DTYPES[self.dtype], tokens, self.experts),
            fake(cutlass.Int32, self.experts + 1, alignment=4),
            fake(DTYPES[self.dtype], tokens, self.experts),
        )


def _why_invalid(experts: int, dtype: str) -> str | None:
    if not 1 <= experts <= MAX_EXPERTS:
        return f"experts = {experts} must be 1 to {MAX_EXPERTS}"
    return None if dtype in DTYPES else f"dtype = {dtype!r} must be one of {', '.join(DTYPES)}"


def aot_specs() -> list[BalanceSpec | BalanceBackwardSpec]:
    """Rows in chunks and one by one, few and many experts, every dtype."""
    few = [(128, 8, "fp32"), (256, 16, "bf16"), (512, 10, "fp32"), (33, 2, "fp16")]
    shapes = [*few, (1000, 8, "bf16"), (4095, 8, "bf16"), (4096, 8, "fp32")]
    return [spec(*shape) for shape in shapes for spec in (BalanceSpec, BalanceBackwardSpec)]
