"""Keeps the CTAs of a GEMM at nearly the same k step, so that each byte that they share is read from DRAM once.

The tiles of one round of CTAs read some 8 KiB for each element of k, A and B together: of a long k more than the L2
cache holds. CTAs left to themselves drift apart, by whole tiles in the end, and then find little there of what others
have read. So each counts its ticks, of TICK k steps, in global memory, and one that is ahead of the mean waits.

Only time depends on it. A CTA that has waited in vain, since other kernels hold SMs that this one's CTAs need, does not
wait again: nothing can hang.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Int32, Int64

from .groups import ceil_div
from .ptx import count_global, read_relaxed

TICK = 8  # k steps
LEAD = 2  # ticks ahead of the mean
PATIENCE = 128  # looks of a wait, each of about a microsecond
GIVEN_UP = 0x7FFFFFFF


@dataclass(frozen=True)
class Paced:
    """Of tiles that all have k_steps."""

    k_steps: int

    def open(self, counter: cute.Tensor, number: Int32, ctas: Int32, lane: Int32) -> Callable:
        """For a CTA's tile of that number: `keep(k, seen)`, called by one warp before it loads k step k.

        counter: one int32, zero before the launch: the ticks of all CTAs. seen: what the warp knows of it, at first
        zero; `keep` returns that of the next step.
        """
        address = counter.iterator.toint()
        first = number * ceil_div(self.k_steps, TICK)
        return lambda k, seen: self.keep(address, first, ctas, lane, k, seen)

    @cute.jit
    def keep(self, address: Int64, first: Int32, ctas: Int32, lane: Int32, k: Int32, seen: Int32):
        if k % TICK == 0:
            if lane == 0:
                count_global(address)
            needed = (first + k // TICK - LEAD) * ctas
            looks = Int32(0)
            while (seen < needed) & (looks < PATIENCE):
                seen = read_relaxed(address)
                looks += 1
            if looks == PATIENCE:
                seen = Int32(GIVEN_UP)
            if seen < GIVEN_UP:  # for the next tick: who need not wait then, does not wait for this either
                seen = read_relaxed(address)
        return seen


@dataclass(frozen=True)
class Unpaced:
    """Every CTA at its own pace; there is no counter."""

    def open(self, counter: None, number: Int32, ctas: Int32, lane: Int32) -> Callable:
        return lambda k, seen: seen
