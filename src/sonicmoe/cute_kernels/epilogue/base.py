"""What the skeleton asks of an epilogue, and what all of them do that hand their results out by boxes of 64x64."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from ..copies import ragged_start
from ..groups import Tile
from ..operands import TmaTensor
from ..pipelines import Feed
from ..ptx import stmatrix_x4
from .driver import BOX, Buffers, Lane, Place, barrier, packed, store_box, wait_stores

QUARTERS = 4  # of a box, 16 columns each
REGISTERS = 4 * QUARTERS  # of a thread, for a box of 16-bit values
PLACE = 6  # numbers that say where a tile is


class Epilogue:
    """What is the same for one that does everything at a tile's end, and nothing in the ring.

    Beside it the skeleton asks for `dtype` and `buffer_elements`, `describe` (host: what the kernel receives), `open`
    (a tile's state, before its products) and `finish`; for `piece`, if there are any.
    """

    ring_steps = 0  # steps of the ring, after a tile's k steps, that the epilogue works in
    ring_bytes = 0  # that such a step brings
    pieces = ()  # what is left to do beside the next tile's first k steps, one in each

    def feed(self, args, tile: Tile, ring_smem, schedule, tile_m: int):
        """load(step, stage, barrier): the loads of a ring step, called by one warp of the producer."""
        return lambda step, stage, barrier: None

    def nothing(self):
        """What is held before the first tile"""

    def drain(self, lane: Lane):
        """All stores of this thread have read shared memory: it may go away."""
        wait_stores(0)


class Held(NamedTuple):
    """Registers with a tile's results, rounded, until the next tile's end."""

    packed: cute.Tensor  # REGISTERS for each box
    place: cute.Tensor  # PLACE numbers, and whether there is a tile

    def there(self):
        return self.place[PLACE] > 0

    def tile(self) -> Tile:
        row, rows, m, n, half, group = (self.place[i] for i in range(PLACE))
        return Tile(group, row, rows, m, n, half, Int32(0))

    def quarter(self, box: int, q: int) -> list[Int32]:
        return [self.packed[box * REGISTERS + 4 * q + i] for i in range(4)]

    def keep(self, tile: Tile, boxes: int, quarter: Callable):
        for box in range(boxes):
            for q in range(QUARTERS):
                for i, register in enumerate(quarter(box, q)):
                    self.packed[box * REGISTERS + 4 * q + i] = register
        place = (tile.row, tile.rows, tile.m, tile.n, tile.half, tile.group, Int32(1))
        for i, number in enumerate(place):
            self.place[i] = number


class AtOnce(NamedTuple):
    """The same of the tile at hand, made of its accumulators where it is asked for."""

    whole: Tile
    quarter: Callable

    def tile(self) -> Tile:
        return self.whole


class Piece(NamedTuple):
    store: int  # number of a stored box
    first: int  # of its quarters
    end: int


@dataclass(frozen=True)
class BoxEpilogue(Epilogue):
    """Subclasses give `open`, `target` and, if more is stored than is held, `outs`, `boxes`, `pack` and `values`.

    Deferred, a warpgroup at a tile's end only rounds its accumulators, to half as many registers, and goes on to the
    next tile; beside each of its first k steps, while the products are under way, it stores a piece. Where the
    warpgroups take turns it stores all at once, while the other multiplies.
    """

    dtype: type
    buffer_count: int  # 64x64 buffers of one warpgroup
    blocks: int  # 64-row blocks of one warpgroup
    subtiles: int  # 64-column sub-tiles of a block, of one half
    deferred: bool

    transpose = False  # buffers hold the tile's columns as rows
    outs = 1  # boxes stored of a sub-tile

    @property
    def boxes(self) -> int:
        """Held of a tile"""
        return self.blocks * self.subtiles

    @property
    def stores(self) -> int:
        """Boxes stored of a tile"""
        return self.blocks * self.subtiles * self.outs

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return self.whole_boxes if self.deferred else ()

    @property
    def whole_boxes(self) -> tuple[Piece, ...]:
        return tuple(Piece(i, 0, QUARTERS) for i in range(self.stores))

    @property
    def buffers(self) -> Buffers:
        return Buffers(self.dtype, self.buffer_count, self.stores)

    @property
    def buffer_elements(self) -> int:
        """Of shared memory, of both consumer warpgroups"""
        return cute.cosize(self.buffers.layout())

    def nothing(self):
        if not self.deferred:
            return None
        held = Held(*(cute.make_rmem_tensor(cute.make_layout(n), Int32) for n in (self.boxes * REGISTERS, PLACE + 1)))
        for registers in held:
            registers.fill(0)
        return held

    @cute.jit
    def finish(self, args, state, held, smem: cute.Pointer, feed: Feed, tile: Tile, lane: Lane, first_block,
               accumulators):  # fmt: skip
        """One warpgroup, after a tile's products."""

        def quarter(box: int, q: int):
            return self.pack(state, accumulators, box, q)

        if cutlass.const_expr(self.deferred):
            held.keep(tile, self.boxes, quarter)
        else:
            for piece in self.whole_boxes:
                self.put(args, AtOnce(tile, quarter), smem, lane, first_block, piece)

    @cute.jit
    def piece(self, args, held: Held, smem: cute.Pointer, lane: Lane, first_block, index: cutlass.Constexpr):
        if held.there():
            self.put(args, held, smem, lane, first_block, self.pieces[index])

    @cute.jit
    def put(self, args, held, smem: cute.Pointer, lane: Lane, first_block, piece: cutlass.Constexpr):
        """Quarters of a box into its buffer; with the last one the box is on its way to global memory."""
        buffers, (subtile, out) = self.buffers, divmod(piece.store, self.outs)
        place = Place(smem, buffers.layout(), lane.consumer * self.buffer_count + buffers.index(piece.store))
        if cutlass.const_expr(piece.first == 0):
            if lane.warp == 0:
                wait_stores(buffers.pending(piece.store))
            barrier(lane.consumer)
        for q in cutlass.range_constexpr(piece.first, piece.end):
            to = lane.matrix_address(place.address(), q, self.transpose)
            stmatrix_x4(to, self.values(held, subtile, out, q), self.transpose)
        if cutlass.const_expr(piece.end == QUARTERS):
            cute.arch.fence_proxy("async.shared", space="cta")
            barrier(lane.consumer)
            mb, nb = divmod(subtile, self.subtiles)
            target, start, inside = self.target(args, held.tile(), first_block + mb, nb, out)
            if lane.warp == 0:
                if inside:
                    store_box(target, place, start)
                cute.arch.cp_async_bulk_commit_group()

    def pack(self, bias, accumulators, box: int, q: int) -> list[Int32]:
        """A quarter of a held box, in the order of stmatrix; bias: what `open` gave"""
        mb, nb = divmod(box, self.subtiles)
        return packed(self.dtype, accumulators[mb], nb, q, bias)

    def values(self, held, subtile: int, out: int, q: int) -> list[Int32]:
        """A quarter of a stored box, likewise"""
        return held.quarter(subtile, q)


def box_of_rows(target: TmaTensor, tile: Tile, block: Int32, column: Int32, half: int = 0):
    """What `target` gives for a 64-row block of a tile, in a ragged view. It may lie past the group's rows."""
    rows = tile.rows - block * BOX
    return target, ragged_start(tile.row + block * BOX, rows, column, half), rows > 0
