"""The tests' own tools: the tolerance refuses what it must, and memory is poisoned."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_as_good, relative_errors, why_worse
from torch import Tensor

BF16 = torch.bfloat16


def _truth(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(40, 32), (4, 8, 16), (200,)])
def test_a_rounding_passes_and_two_do_not(shape: tuple[int, ...]) -> None:
    truth = _truth(*shape)
    rounded = truth.bfloat16()
    assert_as_good("itself", rounded, rounded, truth, BF16)
    assert why_worse(truth + 2.5 * (rounded - truth), rounded, truth, BF16) is not None


@pytest.mark.parametrize("shape", [(40, 32), (4, 8, 16)])
def test_one_wrong_group_is_noticed(shape: tuple[int, ...]) -> None:
    truth = _truth(*shape)
    rounded = truth.bfloat16()
    for wrong in (0.0, 0.98, -1.0, float("nan")):
        actual = rounded.clone()
        actual[3] *= wrong
        why = why_worse(actual, rounded, truth, BF16)
        assert why is not None and ("worst group" in why or "whole" in why)


def test_where_the_truth_is_zero_only_zero_is_right() -> None:
    truth = _truth(6, 8)
    truth[2] = 0
    rounded = truth.bfloat16()
    assert why_worse(rounded, rounded, truth, BF16) is None
    actual = rounded.clone()
    actual[2, 5] = 1e-6
    assert why_worse(actual, rounded, truth, BF16) is not None


def test_a_yardstick_of_zeros_is_no_excuse() -> None:
    """A tolerance so wide that zeros pass is itself a failure."""
    truth = _truth(6, 8)
    with pytest.raises(AssertionError, match="passes a wrong result"):
        assert_as_good("x", truth, torch.zeros_like(truth), truth, BF16)


def test_shapes_and_empty_tensors() -> None:
    assert why_worse(torch.zeros(2, 3), torch.zeros(3, 3), torch.zeros(3, 3), BF16) is not None
    assert relative_errors(torch.zeros(0, 3), torch.zeros(0, 3)) == {"whole": 0.0, "worst group": 0.0}
    assert_as_good("empty", torch.zeros(0), torch.zeros(0), torch.zeros(0), BF16)


def test_memory_is_poisoned() -> None:
    fresh = [
        torch.empty(3),
        torch.empty_like(torch.ones(3)),
        torch.ones(2).new_empty(3),
        torch.empty_strided((3,), (1,)),
    ]
    assert all(t.isnan().all() for t in fresh)
    assert torch.empty(3, dtype=torch.bfloat16).isnan().all()
    assert torch.empty(3, requires_grad=True).isnan().all()
    assert not torch.empty(3, dtype=torch.int32).is_floating_point()


@pytest.mark.unpoisoned
def test_memory_is_not_poisoned_where_a_test_says_so() -> None:
    assert not hasattr(torch.empty, "__wrapped__")
