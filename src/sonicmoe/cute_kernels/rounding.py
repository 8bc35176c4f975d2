"""What the token rounding kernels are compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..configs.tile import TILE_M
from .variants import ARCH

# A token's logits are in the registers of a warp.
MAX_EXPERTS = 2048
# What is counted in 32 bits: pairs of tokens and experts; twice the slots and a tile; slots and 8 for each token.
MAX_PAIRS = (1 << 31) - (1 << 18)
MAX_SLOTS = (1 << 30) - (1 << 18)
MAX_TILE_M = 1 << 19
TILE = 32  # tokens in a mask
RULES = ("nearest", "stochastic", "stochastic_mass", "balanced", "up", "down")
DTYPES = ("bf16", "fp16", "fp32")


def masks(size: int) -> int:
    """Words of one bit for each of so many."""
    return -(-size // TILE)


@dataclass(frozen=True)
class RoundingSpec:
    """Token rounding of logits for `experts` experts; tokens and slots are counted at the launch.

    The launch takes logits (T, experts), draws (experts,) fp32 for the stochastic rules or None; as scratch softmax
    (T, 4) fp32, tiles (experts, W, 4) with W = masks(T), state (2 * experts + W,), zero where `counted`, and marks
    (W, experts, 2); the results scores (S,) fp32, cu_rows (experts + 1,), row_token, row_slot and slot_row (S,),
    cu_slots (T + 1,), and, one bit per pair, chosen and kept (T, masks(experts)). What is not fp32 is int32.
    """

    experts: int
    top: int
    dtype: str  # "bf16" | "fp16" | "fp32", of the logits
    rule: str = "nearest"
    tile_m: int = TILE_M

    @property
    def name(self) -> str:
        return f"token_rounding_{ARCH}"

    @property
    def draws(self) -> bool:
        return self.rule.startswith("stochastic")

    @property
    def counted(self) -> bool:
        """Whether an expert's rounding needs the counts of others."""
        return self.rule == "balanced"

    def why_invalid(self) -> str | None:
        """None, or what is wrong."""
        if self.rule not in RULES:
            return f"rule = {self.rule!r} must be one of {', '.join(RULES)}"
        if not 1 <= self.tile_m <= MAX_TILE_M:
            return f"tile_m = {self.tile_m} must be 1 to {MAX_TILE_M}"
        if not 1 <= self.top <= self.experts:
            return f"top = {self.top} must be 1 to {self.experts}"
        return _why_invalid(self.experts, self.dtype)

    def build(self) -> tuple[Any, tuple[Any, ...]]:
        """(kernel, fake arguments)"""
        reason = self.why_invalid()
        if reason:
            raise ValueError(f"token_rounding: {reason}")
        import cutlass
        import cutlass.cute as cute

        from .assembly import fake
        from .memory_bound.access import DTYPES
        from .memory_bound.rounding import TokenRounding
        from .memory_bound.rounding_choose import Choose, TokenRow
        from .memory_bound.rounding_pairs import Pairs
        from .memory_bound.rounding_select import Select

        e = self.experts
        tokens, slots, words = cute.sym_int(), cute.sym_int(), cute.sym_int()

        def index(*shape: Any, alignment: int = 4) -> Any:
            return fake(cutlass.Int32, *shape, alignment=alignment)

        row = TokenRow(e, self.dtype)
        kernel = TokenRounding(Choose(row, self.top, self.counted), Select(row, self.rule, self.tile_m), Pairs(row))
        return kernel, (
            fake(DTYPES[self.dtype], tokens, e, alignment=4 if self.dtype == "fp32" else 2),
            fake(cutlass.Float32, e, alignment=4) if self.draws else None,
            fake(cutlass.Float32, tokens, 4, alignment=16),
            index(e, words, 4, alignment=16),
            index(cute.sym_int()),
            index(words, e, 2, alignment=16),
            fake(cutlass.Float32, slots, alignment=4),
            index(e + 1),
            index(slots),
            index(slots),
            index(slots),
            index(cute.sym_int()),
            index(tokens, masks(e)),
            index(tokens, masks(e)),
        )


@dataclass(frozen=True)
class RoundingBackwardSpec:
    """Gradients of all logits from those of the slots' scores.

    adds: to what dlogits holds.

    The launch takes dscores (S,) fp32, logits (T, experts), cu_slots (T + 1,), chosen and kept (T, masks(experts)), and
    dlogits (T, experts).
    """

    experts: int
    dtype: str  # of the logits and of their gradients
    adds: bool = False

    @property
    def name(self) -> str:
        return f"token_rounding_backward_{ARCH}"

    def why_invalid(self) -> str | None:
        """None, or what is wrong."""
        return _why_invalid(self.experts, self.dtype)

    def build(self) -> tuple[Any, tuple[Any, ...]]:
        """(kernel, fake arguments)"""
        reason = self.why_invalid()
        if reason:
            raise ValueError(f"token_rounding_backward: {reason}")
        import cutlass
        import cutlass.cute as cute

        from .assembly import fake
        from .memory_bound.access import DTYPES
        from .memory_bound.rounding_backward import RoundingBackward
        from .memory_bound.rounding_choose import TokenRow

        tokens = cute.sym_int()

        def of_pairs() -> Any:
            return fake(DTYPES[self.dtype], tokens, self.experts, alignment=4 if self.dtype == "fp32" else 2)

        def index(*shape: Any) -> Any:
            return fake(cutlass.Int32, *shape, alignment=4)

        return RoundingBackward(TokenRow(self.experts, self.dtype), self.adds), (
            fake(cutlass.Float32, cute.sym_int(), alignment=4),
            of_pairs(),
            index(cute.sym_int()),
            index(tokens, masks(self.experts)),
            index(tokens, masks(self.experts)),
            of_pairs(),
        )


def _why_invalid(experts: int, dtype: str) -> str | None:
    if not 1 <= experts <= MAX_EXPERTS:
        return f"experts = {experts} must be 1 to {MAX_EXPERTS}"
    return None if dtype in DTYPES else f"dtype = {dtype!r} must be one of {', '.join(DTYPES)}"


def aot_specs() -> list[RoundingSpec | RoundingBackwardSpec]:
    """Every rule and dtype, few and many experts, tiles that are no power of two."""
    forward = [
        RoundingSpec(128, 8, "fp32"),
        RoundingSpec(256, 16, "fp32"),
        RoundingSpec(512, 8, "bf16", "balanced"),
        RoundingSpec(128, 2, "bf16", "stochastic"),
        RoundingSpec(256, 4, "fp32", "stochastic_mass"),
        RoundingSpec(64, 40, "fp16", "up", 64),
        RoundingSpec(100, 3, "fp32", "down", 200),
        RoundingSpec(2048, 64, "fp32"),
        RoundingSpec(1, 1, "bf16", "nearest", 1),
    ]
    backward = [
        RoundingBackwardSpec(128, "fp32"),
        RoundingBackwardSpec(256, "bf16"),
        RoundingBackwardSpec(100, "fp16"),
        RoundingBackwardSpec(2048, "fp32"),
        RoundingBackwardSpec(100, "fp32", adds=True),
        RoundingBackwardSpec(256, "bf16", adds=True),
    ]
    return [*forward, *backward]
