"""When a kernel's result is good enough: error against fp32 at most 1.5 times that of the same steps in torch.

Errors are relative to the truth's norm, over the whole tensor and for the worst of its groups (rows, or experts).
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 1.5
# Where the yardstick is exact by luck, as a sum of one term is: a quarter of what one rounding to the storage dtype
# costs, which is about 0.22 eps in the root mean square.
FLOOR = 0.055


def relative_errors(actual: Tensor, truth: Tensor) -> dict[str, float]:
    """The relative error of the whole, and the largest of a group: an index of the first dimension.

    The elements of a vector are compared one by one, relative to their root mean square. Where the truth is zero,
    anything but zero is infinitely wrong.
    """
    actual, truth = actual.double(), truth.double()
    error = actual - truth
    if truth.dim() == 1:
        groups, norms = error.abs(), truth.square().mean().sqrt().expand_as(truth)
    else:
        groups, norms = error.flatten(1).norm(dim=1), truth.flatten(1).norm(dim=1)

    def ratio(e: Tensor, n: Tensor) -> float:
        return float(torch.where(e == 0, 0.0, e / n).max()) if e.numel() else 0.0

    return {"whole": ratio(error.norm(), truth.norm()), "worst group": ratio(groups, norms)}


def why_worse(actual: Tensor, yardstick: Tensor, truth: Tensor, dtype: torch.dtype) -> str | None:
    """Why `actual` is not as good as the yardstick, torch's result in the storage dtype; None if it is. NaN is not."""
    if actual.shape != truth.shape:
        return f"shape {tuple(actual.shape)} instead of {tuple(truth.shape)}"
    allowed = relative_errors(yardstick, truth)
    for what, error in relative_errors(actual, truth).items():
        if not error <= FACTOR * allowed[what] + FLOOR * torch.finfo(dtype).eps:
            return f"{what}: relative error {error:.3g}, that of torch in {dtype} {allowed[what]:.3g}"
    return None


def assert_as_good(name: str, actual: Tensor, yardstick: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """`actual` passes, after zeros, the flipped sign, NaN and one flipped group are shown to fail."""
    groups = truth.flatten(1).norm(dim=1) if truth.dim() > 1 else truth.abs()
    if groups.numel() and groups.max() > 0:
        one_flipped = truth.clone()
        one_flipped[groups.argmax()] *= -1
        for wrong in (torch.zeros_like(truth), -truth, one_flipped, truth * float("nan")):
            assert why_worse(wrong, yardstick, truth, dtype) is not None, f"{name}: the tolerance passes a wrong result"
    why = why_worse(actual, yardstick, truth, dtype)
    assert why is None, f"{name}: {why}"
