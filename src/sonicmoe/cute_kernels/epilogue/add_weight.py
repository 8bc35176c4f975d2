"""AddWeight: the accumulators are added to a group's fp32 weight gradient in global memory, straight from registers.

One red.add per element, by the one CTA that owns it: nothing races, so the result does not depend on timing. Four or
eight lanes cover 32 contiguous bytes, a whole sector, and no shared memory is taken from the stages.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from ..copies import grouped_weight
from ..groups import Tile
from ..ptx import add_global, add_global_pair
from .base import Epilogue
from .driver import BOX, Lane


class AddArgs(NamedTuple):
    view: cute.Tensor  # (n of a half or m, the other, half, group), fp32


class AddState(NamedTuple):
    base: Int64  # address of the tile's half of the group
    row: Int32  # of the lane's first accumulator, along m
    column: Int32  # likewise along n


@dataclass(frozen=True)
class AddWeight(Epilogue):
    """To (groups, m, n), or transposed to (groups, halves * n, m)."""

    dtype: type
    blocks: int
    subtiles: int
    tile_m: int
    tile_n: int
    m: int
    n: int  # of one half
    halves: int
    interleaved: bool
    transpose: bool

    buffer_elements = BOX  # none is used, but a range of shared memory cannot be empty

    def describe(self, tensors) -> AddArgs:
        return AddArgs(grouped_weight(tensors[0], self.halves, self.interleaved))

    def open(self, args: AddArgs, tile: Tile, lane: Lane, first_block) -> AddState:
        view = args.view
        half, group = Int64(tile.half) * view.stride[2], Int64(tile.group) * view.stride[3]
        return AddState(
            view.iterator.toint() + (half + group) * 4,
            tile.m * self.tile_m + first_block * BOX + lane.row,
            tile.n * self.tile_n + lane.column,
        )

    @cute.jit
    def finish(self, args: AddArgs, state: AddState, held, smem, feed, tile: Tile, lane: Lane, first_block,
               accumulators):  # fmt: skip
        """One warpgroup, one tile. An empty group has nothing to add."""
        stride = args.view.stride[0]  # of the view's first mode: n if transposed, else m
        for mb in cutlass.range_constexpr(self.blocks):
            for r in cutlass.range_constexpr(2):
                row = state.row + (mb * BOX + 8 * r)
                for j in cutlass.range_constexpr(self.subtiles * (BOX // 8)):
                    column = state.column + 8 * j
                    lo, hi = accumulators[mb][(0, r, j), 0, 0], accumulators[mb][(1, r, j), 0, 0]
                    if row < self.m and column < self.n and tile.k_steps > 0:
                        if cutlass.const_expr(self.transpose):
                            target = state.base + (Int64(column) * stride + row) * 4
                            add_global(target, lo)
                            add_global(target + Int64(stride) * 4, hi)
                        else:
                            add_global_pair(state.base + (Int64(row) * stride + column) * 4, lo, hi)
