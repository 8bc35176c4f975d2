"""From accumulators to global memory, 64 rows x 64 columns at a time.

stmatrix puts a quarter (16 columns) at a time into shared memory, and the copy engine takes whole boxes to global
memory. Each warpgroup has its own buffers, used as a ring that starts anew in each tile: which buffer a box is in, and
how many stores may still be under way when it is written, are known when compiling.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Int32, Int64
from cutlass.cute.nvgpu import cpasync
from cutlass.tensor_utils import LayoutEnum

from ..copies import box_at, partition
from ..operands import TmaTensor, smem_tensor
from ..ptx import EVICT_FIRST, WARPGROUP, pack
from ..scheduler import EPILOGUE_BARRIER

BOX = 64
BUFFER_BYTES = BOX * BOX * 2


def box_layout(dtype, count: int):
    """Swizzled 64x64 boxes of 16-bit values, one after the other"""
    return sm90.make_smem_layout_epi(dtype, LayoutEnum.ROW_MAJOR, (BOX, BOX), count)


@dataclass(frozen=True)
class Buffers:
    """The ring of 64x64 buffers of 16-bit values of one warpgroup, and who may write where."""

    dtype: type
    count: int  # buffers of one warpgroup
    uses: int  # buffer uses per tile

    def layout(self):
        """Of both consumer warpgroups"""
        return box_layout(self.dtype, 2 * self.count)

    def index(self, use: int) -> int:
        return use % self.count

    def pending(self, use: int) -> int:
        """How many stores may still be reading when the buffer of a use is written.

        Each use is one commit group; it waits for the store that last read its buffer, in this tile or the one before.
        """
        if use >= self.count:
            return self.count - 1
        last = max(u for u in range(self.uses) if u % self.count == use)
        return use + self.uses - 1 - last


def tma_store(view, dtype) -> TmaTensor:
    return _of_boxes(cpasync.CopyBulkTensorTileS2GOp(), view, dtype)


def tma_load(view, dtype) -> TmaTensor:
    return _of_boxes(cpasync.CopyBulkTensorTileG2SOp(), view, dtype)


def _of_boxes(op, view, dtype) -> TmaTensor:
    one = cute.slice_(box_layout(dtype, 1), (None, None, 0))
    return TmaTensor(*cpasync.make_tiled_tma_atom(op, view, one, (BOX, BOX)))


@dataclass(frozen=True)
class Lane:
    """Where a thread of the consumer warpgroup stands in its sub-tile."""

    consumer: Int32
    warp: Int32  # within the warpgroup
    lane: Int32

    @property
    def row(self):
        """Accumulator row of registers with row index 0 (row index 1: eight further)."""
        return self.warp * 16 + self.lane // 4

    @property
    def column(self):
        """First of the two neighbouring accumulator columns within a group of eight."""
        return 2 * (self.lane % 4)

    def matrix_address(self, base: Int32, quarter, transpose: bool) -> Int32:
        """Address for stmatrix / ldmatrix of 16 columns (`quarter`) in a swizzled 64x64 buffer.

        Plain: the matrices are (rows 0-7, 8-15) x (columns 0-7, 8-15) of the warp's 16 rows. Transposed: the buffer
        holds columns as rows, so the lane's row is a column of the tile.
        """
        half, within = self.lane // 16, self.lane % 16
        if transpose:
            row = 16 * quarter + 8 * half + self.lane % 8
            chunk = 2 * self.warp + within // 8
        else:
            row = self.warp * 16 + within
            chunk = 2 * quarter + half
        return base + row * 128 + ((chunk ^ (row % 8)) * 16)


def barrier(consumer: Int32):
    cute.arch.barrier(barrier_id=EPILOGUE_BARRIER + consumer, number_of_threads=WARPGROUP)


def registers_of(acc: cute.Tensor, first_group: int, element):
    """The four packed registers of 16 accumulator columns from column group `first_group` (of eight columns) on, in the
    order of stmatrix: element(row_index, group, lo, hi) makes one of two neighbouring columns."""
    return [
        element(r, j, acc[(0, r, j), 0, 0], acc[(1, r, j), 0, 0])
        for j in (first_group, first_group + 1)
        for r in range(2)
    ]


def packed(dtype, acc: cute.Tensor, subtile: int, q: int, bias, first_group: int = 0):
    """The four registers of a quarter of a sub-tile, rounded, with bias(column_group, lo, hi) added; sub-tiles and bias
    begin at column group `first_group`."""

    def element(r, j, lo, hi):
        return pack(dtype, *bias(j - first_group, lo, hi))

    return registers_of(acc, first_group + subtile * (BOX // 8) + 2 * q, element)


@dataclass(frozen=True)
class Place:
    """A box of shared memory that an epilogue writes and the copy engine then takes away."""

    smem: cute.Pointer
    layout: object  # of the boxes from there on
    box: Int32

    def address(self) -> Int32:
        return self.smem.toint() + self.box * BUFFER_BYTES


@cute.jit
def store_box(target: TmaTensor, place: Place, start):
    """One warp: a box of shared memory -> the box of `target` at the coordinates `start`. The caller commits.

    What an epilogue stores is larger than the L2 cache and not read soon: it should not displace gathered rows.
    """
    s, g = partition(target.atom, smem_tensor(place.smem, place.layout), box_at(target.view, (BOX, BOX), start))
    cute.copy(target.atom, s[None, place.box], g, cache_policy=Int64(EVICT_FIRST))


@cute.jit
def load_box(source: TmaTensor, smem: cute.Pointer, layout, box: Int32, start, bar: cute.Pointer):
    """One warp: the box of `source` at the coordinates `start` -> a box of the layout, completing on `bar`."""
    s, g = partition(source.atom, smem_tensor(smem, layout), box_at(source.view, (BOX, BOX), start))
    cute.copy(source.atom, g, s[None, box], tma_bar_ptr=bar)


def wait_stores(pending: cutlass.Constexpr):
    cute.arch.cp_async_bulk_wait_group(pending, read=True)
