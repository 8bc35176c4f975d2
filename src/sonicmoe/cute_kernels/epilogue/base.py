"""The walk over a warpgroup's sub-tiles, the same for every epilogue."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ..groups import Tile
from ..pipelines import Feed
from ..ptx import stmatrix_x4
from .driver import BOX, Buffers, Lane, Place, barrier, store_box, wait_stores


@dataclass(frozen=True)
class Epilogue:
    """Subclasses give `visit` and `targets`; one with inputs of its own declares `ring_steps` and gives `feed`."""

    dtype: type
    buffer_count: int  # 64x64 buffers of one warpgroup
    blocks: int  # 64-row blocks of one warpgroup
    subtiles: int  # 64-column sub-tiles of a block

    ring_steps = 0  # steps of the ring, after a tile's k steps, that bring inputs of the epilogue
    ring_bytes = 0  # of such a step
    transpose = False  # buffers hold the tile's columns as rows

    def feed(self, args, tile: Tile, ring_smem, schedule, tile_m: int):
        """load(step, stage, barrier): the loads of a ring step, called by one warp of the producer."""

    @property
    def outs(self) -> int:
        """Buffers written per sub-tile"""
        raise NotImplementedError

    @property
    def buffers(self) -> Buffers:
        return Buffers(self.dtype, self.buffer_count, self.blocks * self.subtiles * self.outs)

    @property
    def buffer_elements(self) -> int:
        """Of shared memory, of both consumer warpgroups"""
        return cute.cosize(self.buffers.layout())

    def pending(self, index: int) -> int:
        """How many stores of warp 0 may still be reading when sub-tile `index` is written."""
        return self.buffers.pending(index * self.outs, self.outs)

    def places(self, smem: cute.Pointer, fed, consumer: Int32, index: int) -> list[Place]:
        """Where the outputs of a sub-tile go."""
        buffers, first = self.buffers, consumer * self.buffer_count
        return [Place(smem, buffers.layout(), first + buffers.index(index * self.outs + i)) for i in range(self.outs)]

    @cute.jit
    def run(self, args, state, smem: cute.Pointer, feed: Feed, tile: Tile, lane: Lane, accumulators):
        """One warpgroup, one tile."""
        for mb in cutlass.range_constexpr(self.blocks):
            for nb in cutlass.range_constexpr(self.subtiles):
                index = cutlass.const_expr(mb * self.subtiles + nb)
                if lane.warp == 0:
                    wait_stores(self.pending(index))
                barrier(lane.consumer)
                fed = feed.wait(index) if self.ring_steps else None
                places = self.places(smem, fed, lane.consumer, index)
                for q in cutlass.range_constexpr(4):
                    values = self.visit(args, state, lane, fed, accumulators[mb], mb, nb, q)
                    for place, value in zip(places, values, strict=True):
                        stmatrix_x4(lane.matrix_address(place.address(), q, self.transpose), value, self.transpose)
                cute.arch.fence_proxy("async.shared", space="cta")
                barrier(lane.consumer)
                if lane.warp == 0:
                    self.store(args, state, places, tile, mb, nb)
                self.finish_subtile(feed, lane, index)
            self.finish_block(args, state, tile, lane, mb)

    @cute.jit
    def store(self, args, state, places, tile: Tile, mb: cutlass.Constexpr, nb: cutlass.Constexpr):
        """One warp: each box of a sub-tile to global memory, one commit group each."""
        for place, (target, start, inside) in zip(places, self.targets(args, state, tile, mb, nb), strict=True):
            if inside:
                store_box(target, place, start)
            cute.arch.cp_async_bulk_commit_group()

    def finish_subtile(self, feed: Feed, lane: Lane, index: int):
        """All warps, after the stores of a sub-tile are issued."""

    def finish_block(self, args, state, tile: Tile, lane: Lane, mb: int):
        """All warps, after the sub-tiles of a 64-row block."""

    def drain(self, lane: Lane):
        """All stores of this thread have read shared memory: it may go away."""
        wait_stores(0)


def clamped_rows(tile: Tile, block: Int32) -> Int32:
    """Rows of the group from a 64-row block on (may be zero or negative)."""
    return tile.rows - block * BOX
