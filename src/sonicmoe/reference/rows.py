"""Which rows belong to which expert, and how w1's gate and up rows are laid out."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that products are computed and summed in: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def rows_of_experts(cu_rows: Tensor, num_rows: int) -> list[tuple[int, slice]]:
    """(expert, its rows) for every expert that has any.

    Reads cu_rows on the host. On a GPU that waits for the device, except when the buffer has no rows at all.
    """
    if num_rows == 0:
        return []
    bounds = enumerate(itertools.pairwise(cu_rows.tolist()))
    return [(e, slice(first, last)) for e, (first, last) in bounds if last > first]


def row_buffer(like: Tensor, width: int, num_rows: int, experts: list[tuple[int, slice]]) -> Tensor:
    """A (num_rows, width) buffer whose padding, the rows that no expert has, is zero."""
    buffer = like.new_empty((num_rows, width))
    buffer[experts[-1][1].stop if experts else 0 :] = 0
    return buffer


def to_concat(w: Tensor, w1_layout: str) -> Tensor:
    """Rows of one expert's w1 or b1 in the order [gate | up]."""
    if w1_layout == "concat":
        return w
    return torch.cat((w[0::2], w[1::2]))


def from_concat(w: Tensor, w1_layout: str) -> Tensor:
    """Rows of one expert in the order [gate | up], given back in the order of w1. Inverse of `to_concat`."""
    if w1_layout == "concat":
        return w
    gate, up = w.chunk(2)
    return torch.stack((gate, up), dim=1).flatten(0, 1)
