"""A bias per column, read by each thread for the two neighbouring columns that it holds."""

import cutlass
from cutlass import Float32, Int32

from .driver import Lane


def no_bias(group, lo, hi):
    return lo, hi


def column_bias(bias, group: Int32, column: Int32, lane: Lane, columns: int, offset: int = 0):
    """add(column_group, lo, hi) -> (lo, hi) plus bias[group, offset + column + 8 * column_group + the lane's two];
    columns past the last read the last pair: their results are clipped at the store."""
    if bias is None:
        return no_bias

    def add(j, lo, hi):
        c = cutlass.min(column + 8 * j + lane.column, columns - 2) + offset
        return lo + Float32(bias[group, c]), hi + Float32(bias[group, c + 1])

    return add
