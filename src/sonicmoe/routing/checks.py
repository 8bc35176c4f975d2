"""Checks of arguments that several routing functions take. Attributes of tensors only: nothing waits for the device."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from sonicmoe.errors import InvalidArgument

_ID_DTYPES = (torch.int32, torch.int64)
_INTEGERS = (int, torch.SymInt, numbers.Integral)  # the last for numpy's


def check(name: str, got: object, holds: bool, accepted: str) -> None:
    """Raise InvalidArgument(name, got, accepted) unless it holds."""
    if not holds:
        raise InvalidArgument(name, got, accepted)


def check_logits(logits: Tensor, k: int) -> None:
    """logits (T, E) of a floating dtype, and 1 <= k <= E."""
    check("logits", type(logits).__name__, isinstance(logits, Tensor), "a tensor")
    check("logits.shape", tuple(logits.shape), logits.dim() == 2 and logits.shape[1] >= 1, "(T, E) with E >= 1")
    check("logits.dtype", logits.dtype, logits.is_floating_point(), "a floating dtype")
    check_integer("k", k)
    check("k", k, 1 <= k <= logits.shape[1], f"1 to E = {logits.shape[1]}")


def check_no_nan(name: str, t: Tensor) -> None:
    """Wait for the device, and raise if t has a NaN."""
    count = int(t.isnan().sum())
    check(name, f"{count} NaN of {t.numel()} values", count == 0, "no NaN")


def check_ids(name: str, ids: Tensor, dim: int, shape: str) -> None:
    """Integer ids with so many dimensions."""
    check(name, type(ids).__name__, isinstance(ids, Tensor), "a tensor")
    check(f"{name}.shape", tuple(ids.shape), ids.dim() == dim, shape)
    check(f"{name}.dtype", ids.dtype, ids.dtype in _ID_DTYPES, "int32 or int64")


def check_like(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    """The shape and the device of another tensor."""
    check(f"{name}.shape", tuple(t.shape), t.shape == other.shape, f"{tuple(other.shape)}, as {other_name}")
    check(f"{name}.device", t.device, t.device == other.device, f"{other.device}, as {other_name}")


def check_scores(scores: Tensor, ids_name: str, ids: Tensor) -> None:
    """Floating scores, one for each id."""
    check("scores", type(scores).__name__, isinstance(scores, Tensor), "a tensor")
    check_like("scores", scores, ids_name, ids)
    check("scores.dtype", scores.dtype, scores.is_floating_point(), "a floating dtype")


def check_integer(name: str, value: object) -> None:
    """A bool is none."""
    check(name, type(value).__name__, isinstance(value, _INTEGERS) and not isinstance(value, bool), "an integer")


def check_size(name: str, size: int, least: int) -> None:
    """An integer of at least `least`."""
    check_integer(name, size)
    check(name, size, size >= least, f"at least {least}")
