"""The one exception class."""

from __future__ import annotations

import pickle

import pytest
import torch

import sonicmoe
from sonicmoe import InvalidArgument
from sonicmoe.ops import _gemm


def test_message_names_argument_what_came_and_what_is_accepted() -> None:
    error = InvalidArgument("k", 9, "1 to 8")
    assert str(error) == "k: got 9, accepted 1 to 8"
    assert (error.argument, error.got, error.accepted) == ("k", 9, "1 to 8")


def test_is_a_value_error_of_the_package() -> None:
    assert issubclass(sonicmoe.InvalidArgument, ValueError)


def test_survives_pickling_between_processes() -> None:
    error = InvalidArgument("x.shape", (3, 4), "(T, H)")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_more_than_a_weight_gradient_can_address() -> None:
    row = torch.empty(1, 1024)
    _gemm.check_gathered("x", row.expand(1 << 25, 1024))
    with pytest.raises(InvalidArgument, match=r"^x: got \d+ elements, accepted up to \d+, 64 GiB$"):
        _gemm.check_gathered("x", row.expand((1 << 25) + 1, 1024))
