"""ActStore: h = accumulators (+ bias), a = act(h); stores h (if kept) and a."""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass.cute as cute
from cutlass import BFloat16, Int32

from ..copies import ragged_rows
from ..groups import Tile
from ..operands import TmaTensor
from ..ptx import pack
from . import math
from .base import RingEpilogue, box_of_rows
from .bias import column_bias
from .driver import BOX, Lane, registers_of, tma_store


class ActStoreArgs(NamedTuple):
    h: object  # TmaTensor or None
    a: TmaTensor
    bias: object


class ActStoreState(NamedTuple):
    first_block: Int32
    biases: tuple  # one function per half


@dataclass(frozen=True)
class ActStore(RingEpilogue):
    act: object  # sonicmoe.activations.Activation
    half_columns: int  # of the tile, in one half
    n: int  # columns of one half
    interleaved: bool  # of the bias
    keep_h: bool

    @property
    def halves(self) -> int:
        return 2 if self.act.gated else 1

    @property
    def outs(self) -> int:
        return 1 + (self.halves if self.keep_h else 0)

    def describe(self, tensors) -> ActStoreArgs:
        h, a, bias = tensors
        kept = tma_store(ragged_rows(h, self.halves), self.dtype) if self.keep_h else None
        return ActStoreArgs(kept, tma_store(ragged_rows(a, 1), self.dtype), bias)

    def open(self, args: ActStoreArgs, tile: Tile, lane: Lane, first_block) -> ActStoreState:
        column = tile.n * self.half_columns
        biases = tuple(self.half_bias(args.bias, half, tile.group, column, lane) for half in range(self.halves))
        return ActStoreState(first_block, biases)

    def half_bias(self, bias, half: int, group: Int32, column: Int32, lane: Lane):
        if bias is not None and self.halves > 1:
            s, n = bias.stride, self.n
            row, step = (2, 1) if self.interleaved else (1, n)
            bias = cute.make_tensor(
                bias.iterator + half * step, cute.make_layout((bias.shape[0], n), stride=(s[0], row))
            )
        return column_bias(bias, group, column, lane, self.n)

    def visit(self, args, state: ActStoreState, lane: Lane, fed, acc: cute.Tensor, mb: int, nb: int, q: int):
        kept = [[] for _ in range(self.halves)]

        def element(r, j, lo, hi):
            pairs = [state.biases[0](j, lo, hi)]
            if self.halves > 1:
                k = j + self.half_columns // 8
                pairs.append(state.biases[1](j, acc[(0, r, k), 0, 0], acc[(1, r, k), 0, 0]))
            for half, pair in enumerate(pairs):
                kept[half].append(pack(self.dtype, *pair))
            lo, hi = (math.forward(self.act, self.dtype is BFloat16, tuple(p[i] for p in pairs)) for i in range(2))
            return pack(self.dtype, lo, hi)

        a = registers_of(acc, nb * (BOX // 8) + 2 * q, element)
        return (*kept, a) if self.keep_h else (a,)

    def targets(self, args: ActStoreArgs, state: ActStoreState, tile: Tile, mb: int, nb: int):
        block, column = state.first_block + mb, tile.n * self.half_columns + nb * BOX
        kept = range(self.halves) if self.keep_h else ()
        return (
            *(box_of_rows(args.h, tile, block, column, half) for half in kept),
            box_of_rows(args.a, tile, block, column),
        )
