"""The walk over a warpgroup's sub-tiles, the same for every epilogue."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ..copies import ragged_start
from ..groups import Tile, ceil_div
from ..operands import TmaTensor
from ..pipelines import Feed
from ..ptx import stmatrix_x4
from .driver import BOX, Buffers, Lane, Place, barrier, box_layout, store_box, wait_stores


@dataclass(frozen=True)
class Epilogue:
    """Subclasses give `visit` and `targets`."""

    dtype: type
    buffer_count: int  # 64x64 buffers of one warpgroup
    blocks: int  # 64-row blocks of one warpgroup
    subtiles: int  # 64-column sub-tiles of a block

    ring_steps = 0  # steps of the ring, after a tile's k steps, that the epilogue works in
    ring_bytes = 0  # that such a step brings
    transpose = False  # buffers hold the tile's columns as rows

    def feed(self, args, tile: Tile, ring_smem, schedule, tile_m: int):
        """load(step, stage, barrier): the loads of a ring step, called by one warp of the producer."""
        return lambda step, stage, barrier: None

    @property
    def outs(self) -> int:
        """Buffers written per sub-tile"""
        raise NotImplementedError

    @property
    def buffers(self) -> Buffers:
        return Buffers(self.dtype, self.buffer_count, self.blocks * self.subtiles * self.outs)

    @property
    def buffer_elements(self) -> int:
        """Of shared memory, of both consumer warpgroups; a range of it cannot be empty"""
        return cute.cosize(self.buffers.layout()) if self.buffer_count else BOX

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
                self.begin(lane, index)
                fed = self.fed(feed, index)
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
    def begin(self, lane: Lane, index: cutlass.Constexpr):
        """All warps: the places of a sub-tile's outputs may be written."""
        if lane.warp == 0:
            wait_stores(self.pending(index))
        barrier(lane.consumer)

    def fed(self, feed: Feed, index: int):
        """What a sub-tile has of the ring."""

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


def box_of_rows(target: TmaTensor, tile: Tile, block: Int32, column: Int32, half: int = 0):
    """What `targets` gives for a 64-row block of a tile, in a ragged view. It may lie past the group's rows."""
    rows = tile.rows - block * BOX
    return target, ragged_start(tile.row + block * BOX, rows, column, half), rows > 0


@dataclass(frozen=True)
class RingEpilogue(Epilogue):
    """One whose outputs leave from stages of the ring, in steps that follow the tile's k steps; without `in_ring`
    outputs it is as any other.

    A sub-tile of each warpgroup, or several, go into a step's stage, a 64x64 box for each output. A stage goes back to
    the producer when the copy engine has read it; meanwhile the others take the next tile's operands.
    """

    sharers: int  # warpgroups that work on a tile
    stages: int  # of the ring
    boxes: tuple  # of a stage: (of B, of A)

    @property
    def in_ring(self) -> int:
        """Outputs of a sub-tile that leave from the ring: all, unless there are buffers."""
        return 0 if self.buffer_count else self.outs

    @property
    def per_step(self) -> int:
        """Sub-tiles of a warpgroup in a stage: the fewest that make the fewest steps"""
        count = self.blocks * self.subtiles
        room = sum(boxes // self.sharers for boxes in self.boxes)
        return ceil_div(count, ceil_div(count, room // self.in_ring))

    @property
    def ring_steps(self) -> int:
        return ceil_div(self.blocks * self.subtiles, self.per_step) if self.in_ring else 0

    @property
    def buffers(self) -> Buffers:
        return Buffers(self.dtype, self.buffer_count, self.blocks * self.subtiles * (self.outs - self.in_ring))

    def pending(self, index: int) -> int:
        # With outputs in the ring, of the tile before none; of this one those of the sub-tiles since the buffer was
        # last used: `finish_subtile` leaves those of one.
        return self.outs * (self.buffer_count - 1) if self.in_ring else super().pending(index)

    def box(self, number: int) -> tuple[int, int]:
        """(0: in B, 1: in A; first box) of an output of a stage's sub-tiles, one box for each warpgroup"""
        in_b = self.boxes[0] // self.sharers
        return (0, number * self.sharers) if number < in_b else (1, (number - in_b) * self.sharers)

    def ring_layout(self, region: int):
        return box_layout(self.dtype, self.stages * self.boxes[region])

    def ring_places(self, fed, consumer: Int32, numbers) -> list[Place]:
        found = []
        for number in numbers:
            region, first = self.box(number)
            box = fed.stage * self.boxes[region] + first + (consumer if self.sharers > 1 else 0)
            found.append(Place(fed.smem[region], self.ring_layout(region), box))
        return found

    def places(self, smem: cute.Pointer, fed, consumer: Int32, index: int) -> list[Place]:
        if not self.in_ring:
            return super().places(smem, fed, consumer, index)
        first, own, buffers = index % self.per_step * self.in_ring, self.outs - self.in_ring, self.buffers
        used = [consumer * self.buffer_count + buffers.index(index * own + i) for i in range(own)]
        in_ring = self.ring_places(fed, consumer, range(first, first + self.in_ring))
        return in_ring + [Place(smem, buffers.layout(), box) for box in used]

    @cute.jit
    def begin(self, lane: Lane, index: cutlass.Constexpr):
        if cutlass.const_expr(self.in_ring < self.outs):  # in the ring nothing is written twice in a tile
            if lane.warp == 0:
                wait_stores(self.pending(index))
            barrier(lane.consumer)

    def fed(self, feed: Feed, index: int):
        return feed.wait(index // self.per_step) if self.in_ring else None

    @cute.jit
    def finish_subtile(self, feed: Feed, lane: Lane, index: cutlass.Constexpr):
        """Warp 0, whose stores read them, holds each stage for a step longer, and the last as `Late` says."""
        if cutlass.const_expr(self.in_ring > 0):
            step, within = index // self.per_step, index % self.per_step
            if cutlass.const_expr(within == self.per_step - 1 or index == self.blocks * self.subtiles - 1):
                if lane.warp > 0:
                    feed.release(step)
                elif cutlass.const_expr(step > 0):
                    wait_stores(self.outs * (within + 1))
                    feed.release(step - 1)
