"""Loads and stores of global memory with a width, a cache policy and a predicate, and 16-byte chunks of numbers.

Addresses are 64-bit integers, so that no offset wraps; a chunk is four 32-bit registers.
"""

import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float16, Float32, Int32, Int64

from ..ptx import EVICT_FIRST, pack, unpack

DTYPES = {"bf16": BFloat16, "fp16": Float16, "fp32": Float32}
CHUNK = 16  # bytes


def address(t: cute.Tensor, index, row_bytes: int) -> Int64:
    """Of row `index` of a tensor whose rows are row_bytes apart."""
    return t.iterator.toint() + Int64(index) * row_bytes


def load_once(source: Int64, valid: Boolean):
    """16 bytes that are read only now; zeros, and no access, where not valid."""
    return cute.arch.inline_ptx(
        "{.reg .pred p; setp.ne.s32 p, {$r1}, 0;"
        " mov.b32 {$w0}, 0; mov.b32 {$w1}, 0; mov.b32 {$w2}, 0; mov.b32 {$w3}, 0;"
        " @p ld.global.L1::no_allocate.L2::cache_hint.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}], {$r2};}",
        write_only_types=[Int32] * 4,
        read_only_args=[source, Int32(valid), Int64(EVICT_FIRST)],
    )


def load_chunk(source: Int64, valid: Boolean):
    """16 bytes; zeros, and no access, where not valid."""
    return cute.arch.inline_ptx(
        "{.reg .pred p; setp.ne.s32 p, {$r1}, 0;"
        " mov.b32 {$w0}, 0; mov.b32 {$w1}, 0; mov.b32 {$w2}, 0; mov.b32 {$w3}, 0;"
        " @p ld.global.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];}",
        write_only_types=[Int32] * 4,
        read_only_args=[source, Int32(valid)],
    )


def store_chunk(target: Int64, chunk):
    """16 bytes."""
    cute.arch.inline_ptx("st.global.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};", read_only_args=[target, *chunk])


def load_or(source: Int64, valid: Boolean, other, dtype):
    """A 32-bit number, or `other`, and no access, where not valid."""
    name = "f32" if dtype is Float32 else "s32"
    return cute.arch.inline_ptx(
        "{.reg .pred p; setp.ne.s32 p, {$r1}, 0; mov.%s {$w0}, {$r2}; @p ld.global.%s {$w0}, [{$r0}];}" % ("b32", name),
        write_only_types=[dtype],
        read_only_args=[source, Int32(valid), dtype(other)],
    )


def numbers(dtype, chunk) -> list:
    """The numbers of a chunk in fp32: eight of 16 bits or four of 32."""
    if dtype is Float32:
        return [reinterpret(word, Float32) for word in chunk]
    return [value for word in chunk for value in unpack(dtype, word)]


def chunk_of(dtype, values) -> list:
    """The chunk of eight fp32 numbers, rounded to 16 bits to nearest even."""
    return [pack(dtype, values[i], values[i + 1]) for i in range(0, 8, 2)]


def reinterpret(value, dtype):
    """The same 32 bits as another type."""
    return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[dtype], read_only_args=[value])
