"""The PTX instructions that the DSL has no short name for, one function each."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64

WARPGROUP = 128
# A fractional evict-first policy over all of an access, encoded as createpolicy would.
EVICT_FIRST = 0x12F0000000000000


@cute.jit
def cp_async_16(smem: Int32, gmem: Int64, offset: cutlass.Constexpr):
    """16 bytes from global to shared memory past L1; `offset` is a literal added to the shared address."""
    cute.arch.inline_ptx(
        "cp.async.cg.shared.global.L2::128B [{$r0}+%d], [{$r1}], 16;" % offset, read_only_args=[smem, gmem]
    )


@cute.jit
def cp_async_16_or_zero(smem: Int32, gmem: Int64, valid: cutlass.Boolean, offset: cutlass.Constexpr):
    """As cp_async_16, but writes zeros and reads nothing where `valid` is false."""
    cute.arch.inline_ptx(
        "cp.async.cg.shared.global.L2::128B [{$r0}+%d], [{$r1}], 16, {$r2};" % offset,
        read_only_args=[smem, gmem, Int32(valid) * 16],
    )


@cute.jit
def cp_async_chunk_or_zero(smem: Int32, gmem: Int64, chunk: Int32, valid: cutlass.Boolean, offset: cutlass.Constexpr):
    """As cp_async_16_or_zero, `chunk` (unsigned) times 16 bytes further in global memory.

    The address is added up in halves, by shifts that ptxas does not turn back into a 64-bit multiply-add: eight of
    these a k step cost the products 3 to 6% (docs/notes/2026-11-24-gathers.md).
    """
    cute.arch.inline_ptx(
        "{.reg .b32 lo, hi, by, up; .reg .b64 from;"
        " mov.b64 {lo, hi}, {$r1}; shf.l.wrap.b32 up, {$r2}, 0, 4; shf.l.wrap.b32 by, 0, {$r2}, 4;"
        " add.cc.u32 lo, lo, by; addc.u32 hi, hi, up; mov.b64 from, {lo, hi};"
        " cp.async.cg.shared.global.L2::128B [{$r0}+%d], [from], 16, {$r3};}" % offset,
        read_only_args=[smem, gmem, chunk, Int32(valid) * 16],
    )


def stmatrix_x4(smem: Int32, r, transpose: bool = False):
    """Four 8x8 matrices of 16-bit values from registers to shared memory; lane i gives row i % 8 of matrix i // 8."""
    cute.arch.inline_ptx(
        "stmatrix.sync.aligned.m8n8.x4%s.shared.b16 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};"
        % (".trans" if transpose else ""),
        read_only_args=[smem, r[0], r[1], r[2], r[3]],
    )


def ldmatrix_x4(smem: Int32):
    return cute.arch.inline_ptx(
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Int32, Int32, Int32, Int32],
        read_only_args=[smem],
    )


def pack(dtype, lo: Float32, hi: Float32) -> Int32:
    """Two floats, rounded to nearest even, in one register."""
    name = "bf16x2" if dtype is BFloat16 else "f16x2"
    return cute.arch.inline_ptx(
        "cvt.rn.%s.f32 {$w0}, {$r0}, {$r1};" % name, write_only_types=[Int32], read_only_args=[hi, lo]
    )


def unpack(dtype, packed: Int32):
    """The two 16-bit floats of a register as (lo, hi) in fp32."""
    if dtype is BFloat16:
        return (
            _to_f32("shl.b32 {$w0}, {$r0}, 16;", packed),
            _to_f32("and.b32 {$w0}, {$r0}, 0xffff0000;", packed),
        )
    return (
        _to_f32("{.reg .b16 l, h; mov.b32 {l, h}, {$r0}; cvt.f32.f16 {$w0}, l;}", packed),
        _to_f32("{.reg .b16 l, h; mov.b32 {l, h}, {$r0}; cvt.f32.f16 {$w0}, h;}", packed),
    )


def _to_f32(code: str, packed: Int32) -> Float32:
    return cute.arch.inline_ptx(code, write_only_types=[Float32], read_only_args=[packed])


def add_global(address: Int64, value: Float32):
    """Add to a float of global memory, without waiting for it."""
    cute.arch.inline_ptx("red.global.add.f32 [{$r0}], {$r1};", read_only_args=[address, value])


def add_global_pair(address: Int64, lo: Float32, hi: Float32):
    """Add to two neighbouring floats, at an address that is a multiple of 8."""
    cute.arch.inline_ptx("red.global.add.v2.f32 [{$r0}], {{$r1}, {$r2}};", read_only_args=[address, lo, hi])


def add_count(address: Int64, value: Int32):
    """Add to an integer of global memory, without waiting for it and in no order with other accesses."""
    cute.arch.inline_ptx("red.relaxed.gpu.global.add.u32 [{$r0}], {$r1};", read_only_args=[address, value])


def read_relaxed(address: Int64) -> Int32:
    """An integer of global memory that others are changing."""
    return cute.arch.inline_ptx(
        "ld.relaxed.gpu.global.u32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address]
    )


def sleep(nanoseconds: cutlass.Constexpr):
    """Suspend the warp for up to twice this time."""
    cute.arch.inline_ptx("nanosleep.u32 %d;" % nanoseconds)


def tanh(x: Float32) -> Float32:
    return cute.arch.inline_ptx("tanh.approx.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])


def exp2(x: Float32) -> Float32:
    return cute.arch.inline_ptx("ex2.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])


def reciprocal(x: Float32) -> Float32:
    return cute.arch.inline_ptx("rcp.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])
