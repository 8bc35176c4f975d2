"""Views of global memory for the copy engine (TMA), and loads and stores through them.

A matrix whose columns are one or two halves (gate and up) is seen as (rows, columns of a half, half), so that the
engine's bounds check ends at each half: columns past it are read as zero and never written.

A *ragged* view bounds the rows of one group at every access: it has two more modes, and the coordinates
(RAGGED - rows + i, column, half, RAGGED, first_row + rows) address row first_row + i, out of bounds for i >= rows. The
address 2^30 * 2^34 elements wraps to 0 in 64 bits.
"""

import cutlass.cute as cute
from cutlass import Int32, Int64
from cutlass.cute.nvgpu import cpasync

RAGGED = 1 << 30
UNBOUNDED = (1 << 31) - 1


def halved_rows(t: cute.Tensor, halves: int):
    """(R, halves * C) -> (R, C, halves)"""
    columns = t.shape[1] // halves
    return cute.make_tensor(
        t.iterator, cute.make_layout((t.shape[0], columns, halves), stride=(t.stride[0], 1, columns))
    )


def ragged_rows(t: cute.Tensor, halves: int):
    """(R, halves * C) -> (row, C, halves, wrap, row offset), the rows bounded at each access"""
    columns = t.shape[1] // halves
    # run-time extents: a static shape this large aborts the compiler
    s = cute.assume(Int64(t.stride[0]), divby=8)
    wrap = cute.assume(Int64(1 << 34) - s, divby=8)
    return cute.make_tensor(
        t.iterator,
        cute.make_layout(
            (Int32(RAGGED), columns, halves, Int32(UNBOUNDED), Int32(UNBOUNDED)), stride=(s, 1, columns, wrap, s)
        ),
    )


def transposed(view: cute.Tensor):
    """The same view with its first two modes exchanged."""
    order = (1, 0) + tuple(range(2, len(view.shape)))
    return cute.make_tensor(
        view.iterator,
        cute.make_layout(tuple(view.shape[i] for i in order), stride=tuple(view.stride[i] for i in order)),
    )


def grouped_weight(t: cute.Tensor, halves: int, interleaved: bool):
    """(groups, halves * N, C) -> (N, C, halves, groups); interleaved: row 2i is row i of the first half"""
    n = t.shape[1] // halves
    sg, sr = t.stride[0], t.stride[1]
    row, half = (sr * halves, sr) if interleaved else (sr, sr * n)
    return cute.make_tensor(
        t.iterator, cute.make_layout((n, t.shape[2], halves, t.shape[0]), stride=(row, 1, half, sg))
    )


def partition(atom: cute.CopyAtom, smem: cute.Tensor, gmem: cute.Tensor):
    """(smem, gmem) partitions of one CTA's copies: the tile's two modes grouped, the others kept"""
    return cpasync.tma_partition(
        atom, 0, cute.make_layout(1), cute.group_modes(smem, 0, 2), cute.group_modes(gmem, 0, 2)
    )


def box_at(view: cute.Tensor, box, start):
    """The one box of `view` that begins at the coordinates `start`, as a 2-D tensor."""
    tiler = box + (1,) * (len(start) - 2)
    tile = cute.local_tile(cute.domain_offset(start, view), tiler, (0,) * len(start))
    return tile[(None, None) + (0,) * (len(start) - 2)]


def ragged_start(first_row: Int32, rows: Int32, column: Int32, half):
    """Coordinates in a ragged view of row `first_row`, of which `rows` rows are in bounds."""
    return (RAGGED - rows, column, half, RAGGED, first_row + rows)
