"""Keeps the CTAs of a GEMM at nearly the same k step, so that each byte that they share is read from DRAM once.

The tiles of one round of CTAs read some 8 kB for each element of k, A and B together: of a long k more than the L2
cache holds, or nearly. CTAs left to themselves drift apart, by whole tiles in the end, and then find little there of
what others have read. So each counts its steps in global memory, and one that is ahead of the mean rests for a moment.

Only time depends on it, and nobody waits for anybody. Where some of the CTAs do not run, since other kernels hold SMs,
the others come to be FAR ahead of the mean, which then says nothing, and rest no more. CTAs without a tile in the last
round count one all the same, at once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32

from .ptx import add_count, read_relaxed, sleep

TICK = 8  # k steps from one look at the counter to the next: some 7 us
LEAD, FAR = 16, 48  # steps ahead of the mean between which a CTA rests
REST = 3000  # ns, or up to twice that


@dataclass(frozen=True)
class Paced:
    """Of tiles that all have so many steps: k steps, then those of the epilogue."""

    k_steps: int
    ring_steps: int

    @property
    def between(self) -> int:
        """Steps from a tile's last tick to the next tile's first"""
        return (self.k_steps - 1) % TICK + 1 + self.ring_steps

    def open(self, counter: cute.Tensor) -> Callable:
        """`keep(k, step, seen)`, called by one warp before it loads k step k of a tile.

        counter: one int32, zero before the launch: the steps of all CTAs. seen: what the warp last saw there, at first
        zero; `keep` returns that of the next step. It is read a tick ahead, so that nobody waits for it.
        """
        address = counter.iterator.toint()
        return lambda k, step, seen: self.keep(address, k, step, seen)

    @cute.jit
    def keep(self, address: Int64, k: Int32, step: Uint32, seen: Int32):
        # Without a loop, in which ptxas would compute the gathered rows' addresses anew at every step.
        if k % TICK == 0:
            with cute.arch.elect_one():
                add_count(address, TICK if k > 0 else self.between)
            ctas = cute.arch.grid_dim()[0]
            ahead = Int32(step) * ctas - seen
            if (ahead > LEAD * ctas) & (ahead < FAR * ctas):
                sleep(REST)
            seen = read_relaxed(address)
        return seen

    def leave(self, counter: cute.Tensor, turn: Int32, turns: Int32):
        """One warp, after its last tile: `turn` would be its next one, past all `turns`."""
        ctas = cute.arch.grid_dim()[0]
        missed = Int32(turn < (turns + ctas - 1) // ctas * ctas)
        with cute.arch.elect_one():
            add_count(counter.iterator.toint(), missed * (self.k_steps + self.ring_steps))


@dataclass(frozen=True)
class Unpaced:
    """Every CTA at its own pace; there is no counter."""

    def open(self, counter: None) -> Callable:
        return lambda k, step, seen: seen

    def leave(self, counter: None, turn: Int32, turns: Int32):
        pass
