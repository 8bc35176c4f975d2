"""Store: the accumulators, rounded, plus an optional bias per column."""

from dataclasses import dataclass
from typing import NamedTuple

from ..copies import grouped_weight, ragged_rows
from ..groups import Tile
from ..operands import TmaTensor
from .base import BoxEpilogue, box_of_rows
from .bias import column_bias, no_bias
from .driver import BOX, Lane, tma_store


class StoreArgs(NamedTuple):
    target: TmaTensor
    bias: object  # (groups, n) or None


@dataclass(frozen=True)
class StoreRows(BoxEpilogue):
    """To the rows of a group: result (rows, n), rows past the group clipped."""

    columns: int  # of the tile
    n: int

    def describe(self, tensors) -> StoreArgs:
        target, bias = tensors
        return StoreArgs(tma_store(ragged_rows(target, 1), self.dtype), bias)

    def open(self, args: StoreArgs, tile: Tile, lane: Lane, first_block):
        return column_bias(args.bias, tile.group, tile.n * self.columns, lane, self.n)

    def target(self, args: StoreArgs, tile: Tile, block, nb: int, out: int):
        return box_of_rows(args.target, tile, block, tile.n * self.columns + nb * BOX)


@dataclass(frozen=True)
class StoreWeight(BoxEpilogue):
    """To a group's weight gradient (groups, m, n)."""

    rows: int  # of the tile
    columns: int
    halves: int
    interleaved: bool

    def describe(self, tensors) -> StoreArgs:
        view = grouped_weight(tensors[0], self.halves, self.interleaved)
        return StoreArgs(tma_store(view, self.dtype), None)

    def open(self, args: StoreArgs, tile: Tile, lane: Lane, first_block):
        return no_bias

    def target(self, args: StoreArgs, tile: Tile, block, nb: int, out: int):
        row = tile.m * self.rows + block * BOX
        column = tile.n * self.columns + nb * BOX
        start = (column, row) if self.transpose else (row, column)
        return args.target, start + (tile.half, tile.group), True


@dataclass(frozen=True)
class StoreWeightTransposed(StoreWeight):
    """To a group's weight gradient (groups, halves * n, m)."""

    transpose = True
