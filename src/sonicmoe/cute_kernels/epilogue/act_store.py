"""ActStore: h = accumulators (+ bias), rounded, a = act(h); stores h (if kept) and a."""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass.cute as cute
from cutlass import BFloat16, Int32

from ..copies import ragged_rows
from ..groups import Tile
from ..operands import TmaTensor
from ..ptx import pack, unpack
from . import math
from .base import BoxEpilogue, Piece, box_of_rows
from .bias import column_bias
from .driver import BOX, Lane, packed, tma_store


class ActStoreArgs(NamedTuple):
    h: object  # TmaTensor or None
    a: TmaTensor
    bias: object


@dataclass(frozen=True)
class ActStore(BoxEpilogue):
    act: object  # sonicmoe.activations.Activation
    half_columns: int  # of the tile, in one half
    n: int  # columns of one half
    interleaved: bool  # of the bias
    keep_h: bool

    @property
    def halves(self) -> int:
        return 2 if self.act.gated else 1

    @property
    def boxes(self) -> int:
        """Those of h"""
        return self.blocks * self.subtiles * self.halves

    @property
    def outs(self) -> int:
        """Those of h, and a as the last one"""
        return 1 + (self.halves if self.keep_h else 0)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """An activation takes longer than a store: two pieces"""
        found = []
        for piece in super().pieces:
            is_a, middle = piece.store % self.outs == self.outs - 1, piece.end // 2
            found += [piece._replace(end=middle), piece._replace(first=middle)] if is_a else [piece]
        return tuple(found)

    def describe(self, tensors) -> ActStoreArgs:
        h, a, bias = tensors
        kept = tma_store(ragged_rows(h, self.halves), self.dtype) if self.keep_h else None
        return ActStoreArgs(kept, tma_store(ragged_rows(a, 1), self.dtype), bias)

    def open(self, args: ActStoreArgs, tile: Tile, lane: Lane, first_block) -> tuple:
        """The bias of each half"""
        column = tile.n * self.half_columns
        return tuple(self.half_bias(args.bias, half, tile.group, column, lane) for half in range(self.halves))

    def half_bias(self, bias, half: int, group: Int32, column: Int32, lane: Lane):
        if bias is not None and self.halves > 1:
            s, n = bias.stride, self.n
            row, step = (2, 1) if self.interleaved else (1, n)
            bias = cute.make_tensor(
                bias.iterator + half * step, cute.make_layout((bias.shape[0], n), stride=(s[0], row))
            )
        return column_bias(bias, group, column, lane, self.n)

    def pack(self, biases, accumulators, box: int, q: int) -> list[Int32]:
        subtile, half = divmod(box, self.halves)
        mb, nb = divmod(subtile, self.subtiles)
        return packed(self.dtype, accumulators[mb], nb, q, biases[half], half * (self.half_columns // 8))

    def values(self, held, subtile: int, out: int, q: int) -> list[Int32]:
        h = [held.quarter(subtile * self.halves + half, q) for half in range(self.halves)]
        return h[out] if out < self.outs - 1 else [self.activation(of_halves) for of_halves in zip(*h, strict=True)]

    def activation(self, of_halves) -> Int32:
        """Of the two neighbouring columns in a register of each half"""
        pairs = [unpack(self.dtype, register) for register in of_halves]
        lo, hi = (math.forward(self.act, self.dtype is BFloat16, tuple(p[i] for p in pairs)) for i in range(2))
        return pack(self.dtype, lo, hi)

    def target(self, args: ActStoreArgs, tile: Tile, block, nb: int, out: int):
        column = tile.n * self.half_columns + nb * BOX
        if out < self.outs - 1:
            return box_of_rows(args.h, tile, block, column, out)
        return box_of_rows(args.a, tile, block, column)
