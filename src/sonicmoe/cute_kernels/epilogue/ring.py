"""The walk over a warpgroup's sub-tiles of an epilogue that works in stages of the ring."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute

from ..groups import Tile
from ..pipelines import Feed
from ..ptx import stmatrix_x4
from ..scheduler import CONSUMERS
from .base import QUARTERS, Epilogue
from .driver import BOX, Buffers, Lane, Place, barrier, box_layout, store_box, wait_stores


@dataclass(frozen=True)
class RingEpilogue(Epilogue):
    """One whose inputs come in stages of the ring, in steps that follow the tile's k steps, for a sub-tile of each
    warpgroup in each, and whose outputs leave from there, a 64x64 box each. What a stage has no room for leaves from
    buffers.

    A stage goes back to the producer when the copy engine has read it; meanwhile the others take the next tile's
    operands. Subclasses give `outs` and `in_ring`, `visit` and `targets`, `feed` and `ring_bytes`.
    """

    dtype: type
    buffer_count: int  # 64x64 buffers of one warpgroup
    blocks: int  # 64-row blocks of one warpgroup
    subtiles: int  # 64-column sub-tiles of a block
    stages: int  # of the ring
    boxes: tuple  # of a stage: (of B, of A)

    @property
    def ring_steps(self) -> int:
        return self.blocks * self.subtiles

    @property
    def buffers(self) -> Buffers:
        return Buffers(self.dtype, self.buffer_count, self.blocks * self.subtiles * (self.outs - self.in_ring))

    @property
    def buffer_elements(self) -> int:
        """Of shared memory, of both consumer warpgroups; a range of it cannot be empty"""
        return cute.cosize(self.buffers.layout()) if self.buffer_count else BOX

    def box(self, number: int) -> tuple[int, int]:
        """(0: in B, 1: in A; first box) of an output in a stage, one box for each warpgroup"""
        in_b = self.boxes[0] // CONSUMERS
        return (0, number * CONSUMERS) if number < in_b else (1, (number - in_b) * CONSUMERS)

    def ring_layout(self, region: int):
        return box_layout(self.dtype, self.stages * self.boxes[region])

    def ring_places(self, fed, consumer, numbers) -> list[Place]:
        found = []
        for number in numbers:
            region, first = self.box(number)
            box = fed.stage * self.boxes[region] + first + consumer
            found.append(Place(fed.smem[region], self.ring_layout(region), box))
        return found

    def places(self, smem: cute.Pointer, fed, consumer, index: int) -> list[Place]:
        """Where the outputs of a sub-tile go."""
        own, buffers = self.outs - self.in_ring, self.buffers
        used = [consumer * self.buffer_count + buffers.index(index * own + i) for i in range(own)]
        in_ring = self.ring_places(fed, consumer, range(self.in_ring))
        return in_ring + [Place(smem, buffers.layout(), box) for box in used]

    @cute.jit
    def finish(self, args, state, held, smem: cute.Pointer, feed: Feed, tile: Tile, lane: Lane, first_block,
               accumulators):  # fmt: skip
        """One warpgroup, after a tile's products."""
        for mb in cutlass.range_constexpr(self.blocks):
            for nb in cutlass.range_constexpr(self.subtiles):
                index = cutlass.const_expr(mb * self.subtiles + nb)
                self.begin(lane)
                fed = feed.wait(index)
                places = self.places(smem, fed, lane.consumer, index)
                for q in cutlass.range_constexpr(QUARTERS):
                    values = self.visit(args, state, lane, fed, accumulators[mb], mb, nb, q)
                    for place, value in zip(places, values, strict=True):
                        stmatrix_x4(lane.matrix_address(place.address(), q, False), value)
                cute.arch.fence_proxy("async.shared", space="cta")
                barrier(lane.consumer)
                if lane.warp == 0:
                    self.store(args, places, tile, first_block, mb, nb)
                self.finish_subtile(feed, lane, index)
            self.finish_block(args, state, tile, lane, first_block, mb)

    @cute.jit
    def begin(self, lane: Lane):
        """All warps: the buffers may be written. In the ring nothing is written twice in a tile, which begins with no
        store under way; in it `finish_subtile` has left those of one sub-tile."""
        if cutlass.const_expr(self.in_ring < self.outs):
            if lane.warp == 0:
                wait_stores(self.outs * (self.buffer_count - 1))
            barrier(lane.consumer)

    @cute.jit
    def store(self, args, places, tile: Tile, first_block, mb: cutlass.Constexpr, nb: cutlass.Constexpr):
        """One warp: each box of a sub-tile to global memory, one commit group each."""
        for place, (target, start, inside) in zip(places, self.targets(args, tile, first_block + mb, nb), strict=True):
            if inside:
                store_box(target, place, start)
            cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def finish_subtile(self, feed: Feed, lane: Lane, index: cutlass.Constexpr):
        """Warp 0, whose stores read them, holds each stage for a step longer, and the last as `Late` says."""
        if lane.warp > 0:
            feed.release(index)
        elif cutlass.const_expr(index > 0):
            wait_stores(self.outs)
            feed.release(index - 1)

    def finish_block(self, args, state, tile: Tile, lane: Lane, first_block, mb: int):
        """All warps, after the sub-tiles of a 64-row block."""
