"""The ring of shared-memory stages between the producer warps and the consumer warpgroups.

Stage s has two mbarriers. `full[s]` completes when the stage holds a k tile: one arrival that also expects the bytes
coming by TMA, plus, if an operand is gathered, one arrival of each producer thread when its cp.async writes have
landed. `empty[s]` completes when each consumer warp that reads the stage has arrived, of all CTAs of the cluster: any
of them may write into the stage of every other. A step counter says both the stage (step % stages) and the parity of
the lap (step // stages): nothing else is kept.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint32, const_expr

from .ptx import WARPGROUP


class RingBarriers(NamedTuple):
    full: cute.Pointer
    empty: cute.Pointer


@dataclass(frozen=True)
class Ring:
    stages: int
    gathers: bool
    consumer_warps: int
    cluster: int  # CTAs

    def barriers(self, base: cute.Pointer) -> RingBarriers:
        return RingBarriers(base, base + self.stages)

    def init(self, b: RingBarriers):
        for s in range(self.stages):
            cute.arch.mbarrier_init(b.full + s, 1 + (WARPGROUP if self.gathers else 0))
            cute.arch.mbarrier_init(b.empty + s, self.consumer_warps * self.cluster)

    def stage(self, step: Uint32) -> Int32:
        return Int32(step % self.stages)

    def parity(self, step: Uint32) -> Int32:
        return Int32((step // self.stages) & 1)

    def wait_empty(self, b: RingBarriers, step: Uint32):
        cute.arch.mbarrier_wait(b.empty + self.stage(step), self.parity(step) ^ 1)

    def wait_full(self, b: RingBarriers, step: Uint32):
        cute.arch.mbarrier_wait(b.full + self.stage(step), self.parity(step))

    def expect(self, b: RingBarriers, step: Uint32, tma_bytes: int):
        """One thread: the arrival of the TMA bytes."""
        cute.arch.mbarrier_arrive_and_expect_tx(b.full + self.stage(step), tma_bytes)

    def gathered(self, b: RingBarriers, step: Uint32):
        """Each producer thread: its cp.async writes so far belong to the step or to earlier ones."""
        if self.gathers:
            cute.arch.cp_async_mbarrier_arrive_noinc(b.full + self.stage(step))

    def release(self, b: RingBarriers, step: Uint32):
        """A whole consumer warp has read the stage."""
        with cute.arch.elect_one():
            if self.cluster == 1:
                cute.arch.mbarrier_arrive(b.empty + self.stage(step))
            else:
                for rank in range(self.cluster):
                    cute.arch.mbarrier_arrive(b.empty + self.stage(step), peer_cta_rank_in_cluster=rank)

    @cute.jit
    def drain(self, b: RingBarriers, step: Uint32):
        """Producer, at its end: a CTA may leave only when every stage has been read."""
        for j in cutlass.range_constexpr(self.stages):
            self.wait_empty(b, step + j)


@dataclass(frozen=True)
class Late:
    """The last stage that an epilogue works in: warp 0, whose stores read it, keeps it until the next tile's products
    are under way."""

    ring: Ring
    warp: Int32
    used: bool  # whether the epilogue works in stages

    def keeps(self):
        return self.warp == 0 if self.used else False

    @cute.jit
    def release(self, b: RingBarriers, step: Uint32):
        """The stage of the step before `step`, if it is kept."""
        if const_expr(self.used):
            if (self.warp == 0) & (step > 0):
                cute.arch.cp_async_bulk_wait_group(0, read=True)
                self.ring.release(b, step - 1)


class Fed(NamedTuple):
    """A step of the ring that the epilogue works in, with what the producer put there for it."""

    stage: Int32
    smem: tuple  # of B and of A


@dataclass(frozen=True)
class Feed:
    """A tile's steps of the ring after its k steps, as a consumer warp reads them."""

    ring: Ring
    bars: RingBarriers
    step: Uint32
    smem: tuple

    def wait(self, index: int) -> Fed:
        self.ring.wait_full(self.bars, self.step + index)
        return Fed(self.ring.stage(self.step + index), self.smem)

    def release(self, index: int):
        self.ring.release(self.bars, self.step + index)
