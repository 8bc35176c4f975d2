"""Where a k tile of A or B comes from. One source each: how it lies in shared memory and how a producer loads it.

`describe` (host) turns global tensors into what the kernel receives. `open` (device) fixes a tile and gives a Load:
`bulk(k, stage, barrier)`, called by one warp, issues the TMA copies of a k step; `gather(k, stage, carry)`, called by
every producer thread, issues its cp.async copies; `carry` is the one register that a thread takes from step to step.
Whatever lies past the n or k extent or past a group's rows (where rows are reduced) reaches shared memory as zero.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Int16, Int32, Int64
from cutlass.cute.nvgpu import cpasync
from cutlass.tensor_utils import LayoutEnum

from .copies import RAGGED, grouped_weight, halved_rows, partition, ragged_rows, transposed
from .groups import Tile, ceil_div
from .ptx import cp_async_16, cp_async_16_or_zero, cp_async_chunk_or_zero

CHUNK = 8  # 16-bit elements of a 16-byte copy
ATOM = 64  # elements of the 128 bytes that the swizzle repeats over


class Load(NamedTuple):
    bulk: Callable
    gather: Callable
    carry: Int32


class TmaTensor(NamedTuple):
    atom: cute.CopyAtom
    view: cute.Tensor


class Gathered(NamedTuple):
    source: cute.Tensor  # (tokens, columns)
    index: cute.Tensor  # (rows,): the token of each row


def no_bulk(k, stage, barrier):
    pass


def no_gather(k, stage, carry):
    return carry


def smem_layout(dtype, extent: int, tile_k: int, stages: int, k_major: bool):
    """Swizzled (extent, tile_k, stages), the same for A and B."""
    major = LayoutEnum.ROW_MAJOR if k_major else LayoutEnum.COL_MAJOR
    return sm90.make_smem_layout_a(major, (extent, extent, tile_k), dtype, stages)


def tma_load(view, layout, box, multicast: bool = False):
    op = cpasync.CopyBulkTensorTileG2SMulticastOp() if multicast else cpasync.CopyBulkTensorTileG2SOp()
    return cpasync.make_tiled_tma_atom(op, view, cute.slice_(layout, (None, None, 0)), box)


@dataclass(frozen=True)
class Source:
    """What every operand source declares."""

    dtype: type
    extent: int  # rows or columns of the tile
    tile_k: int
    stages: int

    k_major = True
    gathers = False

    def layout(self):
        return smem_layout(self.dtype, self.extent, self.tile_k, self.stages, self.k_major)

    @property
    def bytes(self) -> int:
        return self.extent * self.tile_k * 2

    @property
    def tma_bytes(self) -> int:
        return 0 if self.gathers else self.bytes

    @property
    def major(self):
        return cute.nvgpu.OperandMajorMode.K if self.k_major else cute.nvgpu.OperandMajorMode.MN


@dataclass(frozen=True)
class GatherRows(Source):
    """A of GroupedM, K-major: row r of the tile is row index[r] of the source.

    A thread copies 16 bytes of every 16th row; rows past the group repeat its last row and are never stored.
    """

    k: int

    gathers = True

    def describe(self, tensors) -> Gathered:
        return Gathered(*tensors)

    def open(self, args: Gathered, smem: cute.Pointer, tile: Tile, tid: Int32, rank: Int32) -> Load:
        row0, chunk = tid // 8, tid % 8
        destination = smem.toint() + row0 * 128 + ((chunk ^ (row0 % 8)) * 16)
        base = args.source.iterator.toint() + Int64(chunk * 16)
        stride = Int64(args.source.stride[0]) * 2
        rows = []
        for i in range(self.extent // 16):
            r = cutlass.min(row0 + 16 * i, tile.rows - 1)
            rows.append(base + Int64(args.index[tile.row + r]) * stride)

        @cute.jit
        def gather(k: Int32, stage: Int32, carry: Int32):
            to = destination + stage * self.bytes
            step = Int64(k * (self.tile_k * 2))
            if cutlass.const_expr(self.k % self.tile_k == 0):
                for i in cutlass.range_constexpr(self.extent // 16):
                    cp_async_16(to, rows[i] + step, i * 16 * 128)
            else:
                inside = k * self.tile_k + chunk * CHUNK < self.k
                for i in cutlass.range_constexpr(self.extent // 16):
                    cp_async_16_or_zero(to, rows[i] + step, inside, i * 16 * 128)
            return carry

        return Load(no_bulk, gather, Int32(0))


@dataclass(frozen=True)
class Rows(Source):
    """A of GroupedM, K-major: contiguous rows by TMA; rows past the group are somebody else's and never stored."""

    k: int  # columns of one half
    halves: int

    def describe(self, tensors) -> TmaTensor:
        view = halved_rows(tensors[0], self.halves)
        return TmaTensor(*tma_load(view, self.layout(), (self.extent, self.tile_k)))

    def open(self, args: TmaTensor, smem: cute.Pointer, tile: Tile, tid: Int32, rank: Int32) -> Load:
        view = cute.domain_offset((tile.row, 0, 0), args.view)
        g = cute.local_tile(view, (self.extent, self.tile_k), (0, None, None))
        s, g = partition(args.atom, smem_tensor(smem, self.layout()), g)
        per_half = ceil_div(self.k, self.tile_k)

        def bulk(k: Int32, stage: Int32, barrier: cute.Pointer):
            half = k // per_half if self.halves > 1 else 0
            cute.copy(args.atom, g[None, k - half * per_half, half], s[None, stage], tma_bar_ptr=barrier)

        return Load(bulk, no_gather, Int32(0))


@dataclass(frozen=True)
class Weight(Source):
    """B of GroupedM, K-major: weight (groups, halves * n, k). A tile holds the same columns of each half, side by side,
    so a thread's accumulator has gate and up of one column without a shuffle."""

    halves: int
    interleaved: bool

    def box_layout(self):
        return smem_layout(self.dtype, self.extent // self.halves, self.tile_k, self.stages * self.halves, True)

    def describe(self, tensors) -> TmaTensor:
        view = grouped_weight(tensors[0], self.halves, self.interleaved)
        return TmaTensor(*tma_load(view, self.box_layout(), (self.extent // self.halves, self.tile_k)))

    def open(self, args: TmaTensor, smem: cute.Pointer, tile: Tile, tid: Int32, rank: Int32) -> Load:
        box = (self.extent // self.halves, self.tile_k)
        g = cute.local_tile(args.view, box, (tile.n, None, None, tile.group))
        s, g = partition(args.atom, smem_tensor(smem, self.box_layout()), g)

        def bulk(k: Int32, stage: Int32, barrier: cute.Pointer):
            for half in range(self.halves):
                cute.copy(args.atom, g[None, k, half], s[None, self.halves * stage + half], tma_bar_ptr=barrier)

        return Load(bulk, no_gather, Int32(0))


@dataclass(frozen=True)
class WeightTransposed(Source):
    """B of GroupedM, N-major: weight (groups, halves * k, n), reduced over its rows, one half after the other."""

    k: int  # rows of one half
    halves: int
    interleaved: bool

    k_major = False

    def describe(self, tensors) -> TmaTensor:
        view = transposed(grouped_weight(tensors[0], self.halves, self.interleaved))
        return TmaTensor(*tma_load(view, self.layout(), (self.extent, self.tile_k)))

    def open(self, args: TmaTensor, smem: cute.Pointer, tile: Tile, tid: Int32, rank: Int32) -> Load:
        g = cute.local_tile(args.view, (self.extent, self.tile_k), (tile.n, None, None, tile.group))
        s, g = partition(args.atom, smem_tensor(smem, self.layout()), g)
        per_half = ceil_div(self.k, self.tile_k)

        def bulk(k: Int32, stage: Int32, barrier: cute.Pointer):
            half = k // per_half if self.halves > 1 else 0
            cute.copy(args.atom, g[None, k - half * per_half, half], s[None, stage], tma_bar_ptr=barrier)

        return Load(bulk, no_gather, Int32(0))


@dataclass(frozen=True)
class GatherColumns(Source):
    """A of GroupedK, M-major: k row r of the tile is row index[r] of the source, its columns are the m axis.

    Sixteen threads copy the 128 columns of a row. The sixteen indices that a warp needs are fetched one step ahead by
    its lanes and handed round by shuffles.
    """

    m: int

    k_major = False
    gathers = True

    def describe(self, tensors) -> Gathered:
        return Gathered(*tensors)

    def open(self, args: Gathered, smem: cute.Pointer, tile: Tile, tid: Int32, rank: Int32) -> Load:
        row0, chunk = tid // 16, tid % 16
        warp, lane = tid // 32, tid % 32
        panel = (chunk // 8) * (ATOM * self.tile_k * 2)
        destination = smem.toint() + panel + row0 * 128 + (((chunk % 8) ^ row0) * 16)
        base = args.source.iterator.toint() + Int64(tile.m * (self.extent * 2) + chunk * 16)
        fetched = 2 * warp + (lane % 2) + 8 * ((lane % 16) // 2)
        column = tile.m * self.extent + chunk * CHUNK

        @cute.jit
        def index(k: Int32):
            found = Int32(0)
            if k * self.tile_k < tile.rows:
                found = args.index[tile.row + cutlass.min(k * self.tile_k + fetched, tile.rows - 1)]
            return found

        @cute.jit
        def gather(k: Int32, stage: Int32, carry: Int32):
            ahead = index(k + 1)
            of_row = carry * (self.m // CHUNK)  # the row's first chunk, as an unsigned number
            rows = tile.rows - k * self.tile_k
            to = destination + stage * self.bytes
            for i in cutlass.range_constexpr(self.tile_k // 8):
                first = cute.arch.shuffle_sync(of_row, 2 * i + lane // 16)
                inside = row0 + 8 * i < rows
                # Of an odd number of m tiles a cluster takes one more, past the end.
                if cutlass.const_expr(self.m % (2 * self.extent) != 0):
                    inside = inside & (column < self.m)
                cp_async_chunk_or_zero(to, base, first, inside, i * 8 * 128)
            return ahead

        return Load(no_bulk, gather, index(Int32(0)))


@dataclass(frozen=True)
class RaggedColumns(Source):
    """B of GroupedK, N-major: k row r of the tile is row r of the group, its columns are the n axis.

    The CTAs of a cluster have the same columns: each loads an equal part of them into the shared memory of all.
    """

    halves: int
    cluster: int

    k_major = False

    @property
    def box(self) -> tuple[int, int]:
        return self.extent // self.cluster, self.tile_k

    def box_layout(self):
        return smem_layout(self.dtype, self.box[0], self.tile_k, self.stages * self.cluster, self.k_major)

    def describe(self, tensors) -> TmaTensor:
        view = transposed(ragged_rows(tensors[0], self.halves))
        return TmaTensor(*tma_load(view, self.box_layout(), self.box, self.cluster > 1))

    def open(self, args: TmaTensor, smem: cute.Pointer, tile: Tile, tid: Int32, rank: Int32) -> Load:
        view = cute.domain_offset((0, RAGGED - tile.rows, 0, RAGGED, tile.row + tile.rows), args.view)
        part = tile.n * self.cluster + rank
        g = cute.local_tile(view, (*self.box, 1, 1, 1), (part, None, tile.half, 0, 0))
        s, g = partition(args.atom, smem_tensor(smem, self.box_layout()), g[None, None, 0, 0, 0, None])
        to_all = {"mcast_mask": Int16((1 << self.cluster) - 1)} if self.cluster > 1 else {}

        def bulk(k: Int32, stage: Int32, barrier: cute.Pointer):
            target = s[None, self.cluster * stage + rank]
            cute.copy(args.atom, g[None, k], target, tma_bar_ptr=barrier, **to_all)

        return Load(bulk, no_gather, Int32(0))


def smem_tensor(smem: cute.Pointer, layout: cute.ComposedLayout) -> cute.Tensor:
    """A typed tensor over raw shared memory with a swizzled layout."""
    return cute.make_tensor(cute.recast_ptr(smem, layout.inner), layout.outer)


def prefetch_descriptors(*args):
    """One warp: the TMA descriptors among the kernel's arguments."""
    for arg in args:
        if isinstance(arg, TmaTensor):
            cpasync.prefetch_descriptor(arg.atom)
