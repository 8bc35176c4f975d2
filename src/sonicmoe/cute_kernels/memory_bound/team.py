"""What threads of a warp or of a CTA find out together: counts, ranks, sums. Of integers only, so no order matters."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint32

from ..groups import ceil_div

WARP = 32


def shared(dtype, *shape):
    """A row-major tensor in dynamic shared memory."""
    order = tuple(reversed(range(len(shape))))
    return cutlass.memory.SmemAllocator().allocate_tensor(dtype, cute.make_ordered_layout(shape, order=order), 16)


def lanes_below(lane: Int32) -> Uint32:
    """The mask of a warp's lanes before this one."""
    return (Uint32(1) << Uint32(lane)) - Uint32(1)


def count_bits(mask) -> Int32:
    return Int32(cute.arch.popc(Uint32(mask)))


def change_shared(operation: str, t: cute.Tensor, index, value, condition=True):
    """Atomically change an Int32 of shared memory, where the condition holds. The order does not matter."""
    cute.arch.inline_ptx(
        "{.reg .pred p; setp.ne.s32 p, {$r2}, 0; @p red.shared.%s [{$r0}], {$r1};}" % operation,
        read_only_args=[(t.iterator + index).toint(), Int32(value), Int32(condition)],
    )


@cute.jit
def warp_scan(value: Int32, lane: Int32) -> Int32:
    """Sum of the values of the lanes up to and with this one."""
    total = value
    for i in cutlass.range_constexpr(5):
        below = cute.arch.shuffle_sync_up(total, 1 << i, mask_and_clamp=0)
        if lane >= (1 << i):
            total += below
    return total


@cute.jit
def scan_in_place(values: cute.Tensor, size: cutlass.Constexpr, sums: cute.Tensor, threads: cutlass.Constexpr):
    """values[i] becomes the sum of all values before it; returns the sum of all. Every thread of the CTA calls it.

    sums: scratch, one Int32 per warp.
    """
    tid, _, _ = cute.arch.thread_idx()
    lane, warp = tid % WARP, tid // WARP
    carry = Int32(0)
    for first in cutlass.range(0, size, threads, unroll=1):
        i = first + tid
        value = Int32(0)
        if i < size:
            value = values[i]
        up_to = warp_scan(value, lane)
        if lane == WARP - 1:
            sums[warp] = up_to
        cute.arch.sync_threads()
        before = carry
        for w in cutlass.range_constexpr(ceil_div(threads, WARP)):
            of_warp = sums[w]
            if w < warp:
                before += of_warp
            carry += of_warp
        if i < size:
            values[i] = before + up_to - value
        cute.arch.sync_threads()
    return carry


@cute.jit
def team_sum(value: Int32, sums: cute.Tensor, turn: Int32, warps: cutlass.Constexpr) -> Int32:
    """Sum over the CTA's threads, all of which call it.

    sums: scratch, (2, warps) Int32. turn: 0 and 1 in turns from call to call, so that one barrier is enough.
    """
    tid, _, _ = cute.arch.thread_idx()
    lane, warp = tid % WARP, tid // WARP
    of_warp = cute.arch.warp_redux_sync(value, "add")
    if lane == 0:
        sums[turn, warp] = of_warp
    cute.arch.sync_threads()
    found = Int32(0)
    if lane < warps:
        found = sums[turn, lane]
    return cute.arch.warp_redux_sync(found, "add")


def transpose_bits(word: Uint32, lane: Int32) -> Uint32:
    """Bit j of the result in lane i is bit i of the word in lane j."""
    for distance, low in ((16, 0x0000FFFF), (8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        other = cute.arch.shuffle_sync_bfly(word, distance)
        upper = (word & Uint32(low ^ 0xFFFFFFFF)) | ((other >> Uint32(distance)) & Uint32(low))
        lower = (word & Uint32(low)) | ((other & Uint32(low)) << Uint32(distance))
        word = Uint32(cutlass.select_((lane & distance) != 0, upper, lower))
    return word
