"""Store: the accumulators, rounded, plus an optional bias per column."""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32

from ..copies import grouped_weight, ragged_rows
from ..groups import Tile
from ..operands import TmaTensor
from ..ptx import pack
from .base import Epilogue, box_of_rows
from .bias import column_bias
from .driver import BOX, Lane, registers_of, tma_store


class StoreArgs(NamedTuple):
    target: TmaTensor
    bias: object  # (groups, n) or None


class StoreState(NamedTuple):
    first_block: Int32
    bias: object


@dataclass(frozen=True)
class StoreRows(Epilogue):
    """To the rows of a group: result (rows, n), rows past the group clipped."""

    columns: int  # of the tile
    n: int

    outs = 1

    def describe(self, tensors) -> StoreArgs:
        target, bias = tensors
        return StoreArgs(tma_store(ragged_rows(target, 1), self.dtype), bias)

    def open(self, args: StoreArgs, tile: Tile, lane: Lane, first_block) -> StoreState:
        column = tile.n * self.columns
        return StoreState(first_block, column_bias(args.bias, tile.group, column, lane, self.n))

    def visit(self, args, state: StoreState, lane: Lane, fed, acc: cute.Tensor, mb: int, nb: int, q: int):
        def element(r, j, lo, hi):
            lo, hi = state.bias(j, lo, hi)
            return pack(self.dtype, lo, hi)

        return (registers_of(acc, nb * (BOX // 8) + 2 * q, element),)

    def targets(self, args: StoreArgs, state: StoreState, tile: Tile, mb: int, nb: int):
        return (box_of_rows(args.target, tile, state.first_block + mb, tile.n * self.columns + nb * BOX),)


@dataclass(frozen=True)
class StoreWeight(Epilogue):
    """To a group's weight gradient (groups, m, n)."""

    rows: int  # of the tile
    columns: int
    halves: int
    interleaved: bool

    outs = 1

    def describe(self, tensors) -> StoreArgs:
        view = grouped_weight(tensors[0], self.halves, self.interleaved)
        return StoreArgs(tma_store(view, self.dtype), None)

    def open(self, args: StoreArgs, tile: Tile, lane: Lane, first_block) -> StoreState:
        return StoreState(first_block, None)

    def visit(self, args, state: StoreState, lane: Lane, fed, acc: cute.Tensor, mb: int, nb: int, q: int):
        return (registers_of(acc, nb * (BOX // 8) + 2 * q, lambda r, j, lo, hi: pack(self.dtype, lo, hi)),)

    def targets(self, args: StoreArgs, state: StoreState, tile: Tile, mb: int, nb: int):
        row = tile.m * self.rows + (state.first_block + mb) * BOX
        column = tile.n * self.columns + nb * BOX
        start = (column, row) if self.transpose else (row, column)
        return ((args.target, start + (tile.half, tile.group), True),)


@dataclass(frozen=True)
class StoreWeightTransposed(StoreWeight):
    """To a group's weight gradient (groups, halves * n, m)."""

    transpose = True
