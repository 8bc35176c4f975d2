"""A warp's row of logits: read in whole chunks where rows are aligned, made comparable, and turned into scores.

A key is an unsigned integer ordered as the logits are, every bit of the mantissa included: a warp finds the greatest of
its lanes' integers by one instruction. NaN counts as -inf, +inf as the largest finite number, and 0.0 equals -0.0.
"""

import math
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float32, Int32, Int64, Uint32

from ..groups import ceil_div
from ..ptx import reciprocal
from .access import CHUNK, DTYPES, address, chunk_of, load_chunk, numbers, reinterpret
from .team import WARP

# Below every key: what is not there, or no longer.
ABSENT = 0
LOWEST_KEY = 0x007FFFFF  # of -inf
LARGEST = 3.4028234663852886e38


def working(logit: Float32) -> Float32:
    """NaN becomes -inf, +inf the largest finite number."""
    return cute.arch.inline_ptx(
        "{.reg .f32 f; max.f32 f, {$r0}, 0fFF800000; min.f32 {$w0}, f, 0f7F7FFFFF;}",
        write_only_types=[Float32],
        read_only_args=[logit],
    )


def key_of(number: Float32) -> Uint32:
    """Of any number but NaN."""
    return cute.arch.inline_ptx(
        "{.reg .f32 f; .reg .b32 b, s; add.f32 f, {$r0}, 0f00000000; mov.b32 b, f;"
        " shr.s32 s, b, 31; or.b32 s, s, 0x80000000; xor.b32 {$w0}, b, s;}",
        write_only_types=[Uint32],
        read_only_args=[number],
    )


def number_of(key: Uint32) -> Float32:
    """The number whose key it is."""
    return cute.arch.inline_ptx(
        "{.reg .b32 b, s; shr.s32 s, {$r0}, 31; not.b32 s, s; or.b32 s, s, 0x80000000; xor.b32 b, {$r0}, s;"
        " mov.b32 {$w0}, b;}",
        write_only_types=[Float32],
        read_only_args=[key],
    )


def greater(a: Uint32, b: Uint32) -> Uint32:
    """The greater of two keys. cutlass.max compares signed integers where the first operand is a constant."""
    return cute.arch.inline_ptx("max.u32 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[a, b])


def less(a: Uint32, b: Uint32) -> Uint32:
    """The less of two keys."""
    return cute.arch.inline_ptx("min.u32 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[a, b])


def choose(condition: Boolean, value, other):
    """One of two of the same type."""
    return type(value)(cutlass.select_(condition, value, other))


def exp(x: Float32) -> Float32:
    return cute.math.exp(x)


def sigmoid(z: Float32) -> Float32:
    return reciprocal(Float32(1.0) + exp(-z))


def warp_sum(value: Float32) -> Float32:
    """The same in all lanes, and in the same order whatever they hold."""
    return cute.arch.warp_reduction_sum(value)


def warp_greatest(key: Uint32) -> Uint32:
    return cute.arch.warp_redux_sync(key, "max")


def without_nan(number: Float32) -> Float32:
    """NaN becomes -inf."""
    return cute.arch.fmax(number, Float32(-math.inf))


def finite(number: Float32) -> Float32:
    """-inf, the greatest of nothing, becomes the least finite number, from which -inf may be subtracted."""
    return cute.arch.fmax(number, Float32(-LARGEST))


@dataclass(frozen=True)
class Row:
    """A row of `size` numbers over the lanes of a warp: chunks of 16 bytes if it is a multiple of that, else singly."""

    size: int
    dtype: str  # "bf16" | "fp16" | "fp32"

    @property
    def bytes(self) -> int:
        return self.size * self.number_bytes

    @property
    def number_bytes(self) -> int:
        return 4 if self.dtype == "fp32" else 2

    @property
    def together(self) -> int:
        """Neighbours that one lane reads at once"""
        return CHUNK // self.number_bytes if self.bytes % CHUNK == 0 else 1

    @property
    def pieces(self) -> int:
        """What a lane reads, `together` at a time"""
        return ceil_div(self.size, WARP * self.together)

    def first(self, piece, lane):
        """The column of a lane's piece"""
        return (piece * WARP + lane) * self.together

    def piece_of(self, values: list, piece: int) -> list:
        """Those of all of a lane's numbers that are of a piece"""
        return values[piece * self.together : (piece + 1) * self.together]

    def load(self, t: cute.Tensor, index, piece, lane) -> list:
        """A lane's piece of row `index` in fp32; -inf past the end."""
        column = self.first(piece, lane)
        valid = Boolean(column < self.size)
        source = address(t, index, self.bytes) + column * self.number_bytes
        if self.together == 1:
            return [load_number(DTYPES[self.dtype], source, valid)]
        values = numbers(DTYPES[self.dtype], load_chunk(source, valid))
        if (piece + 1) * WARP * self.together <= self.size:
            return values
        return [choose(valid, v, Float32(-math.inf)) for v in values]

    def store(self, t: cute.Tensor, index, piece, lane, values) -> None:
        """A lane's piece, rounded once."""
        column = self.first(piece, lane)
        target = address(t, index, self.bytes) + column * self.number_bytes
        dtype, valid = DTYPES[self.dtype], Boolean(column < self.size)
        if self.together == 1:
            store_number(dtype, target, values[0], valid)
        elif self.dtype == "fp32":
            store_chunk_if(target, [reinterpret(v, Int32) for v in values], valid)
        else:
            store_chunk_if(target, chunk_of(dtype, values), valid)

    def load_one(self, t: cute.Tensor, index, column, valid: Boolean) -> Float32:
        """One number; -inf, and no access, where not valid."""
        source = address(t, index, self.bytes) + column * self.number_bytes
        return load_number(DTYPES[self.dtype], source, valid)

    def store_one(self, t: cute.Tensor, index, column, value: Float32, valid: Boolean) -> None:
        target = address(t, index, self.bytes) + column * self.number_bytes
        store_number(DTYPES[self.dtype], target, value, valid)


def load_number(dtype, source: Int64, valid: Boolean) -> Float32:
    """A number in fp32; -inf, and no access, where not valid."""
    if dtype is Float32:
        code = "mov.b32 {$w0}, 0fFF800000; @p ld.global.f32 {$w0}, [{$r0}];"
    elif dtype is BFloat16:
        code = "mov.b16 h, 0xFF80; @p ld.global.b16 h, [{$r0}]; mov.b16 z, 0; mov.b32 {$w0}, {z, h};"
    else:
        code = "mov.b16 h, 0xFC00; @p ld.global.b16 h, [{$r0}]; cvt.f32.f16 {$w0}, h;"
    return cute.arch.inline_ptx(
        "{.reg .pred p; .reg .b16 h, z; setp.ne.s32 p, {$r1}, 0; %s}" % code,
        write_only_types=[Float32],
        read_only_args=[source, Int32(valid)],
    )


def store_number(dtype, target: Int64, value: Float32, valid: Boolean) -> None:
    """A number, rounded to nearest even, where valid."""
    if dtype is Float32:
        code = "@p st.global.f32 [{$r0}], {$r2};"
    else:
        name = "bf16" if dtype is BFloat16 else "f16"
        code = "cvt.rn.%s.f32 h, {$r2}; @p st.global.b16 [{$r0}], h;" % name
    cute.arch.inline_ptx(
        "{.reg .pred p; .reg .b16 h; setp.ne.s32 p, {$r1}, 0; %s}" % code,
        read_only_args=[target, Int32(valid), value],
    )


def store_chunk_if(target: Int64, chunk, valid: Boolean) -> None:
    """16 bytes, where valid."""
    cute.arch.inline_ptx(
        "{.reg .pred p; setp.ne.s32 p, {$r5}, 0; @p st.global.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};}",
        read_only_args=[target, *chunk, Int32(valid)],
    )


def load_row(row: Row, t: cute.Tensor, index, lane: Int32) -> list:
    """All of a lane's numbers of a row, as they are."""
    return [value for piece in range(row.pieces) for value in row.load(t, index, piece, lane)]


def softmax_terms(logits) -> tuple:
    """(exp(z - top) of a lane's logits, top, reciprocal of the sum of the whole warp's terms).

    A row of -inf has the terms 0 and the reciprocal 1.
    """
    greatest = Float32(-math.inf)
    for logit in logits:
        greatest = cute.arch.fmax(greatest, working(logit))
    top = finite(number_of(warp_greatest(key_of(greatest))))
    terms = [exp(working(logit) - top) for logit in logits]
    total = Float32(0.0)
    for term in terms:
        total = total + term
    return terms, top, reciprocal(cute.arch.fmax(warp_sum(total), Float32(1.0)))
