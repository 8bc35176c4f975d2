"""The one exception class."""

from __future__ import annotations

import pickle

import sonicmoe
from sonicmoe import InvalidArgument


def test_message_names_argument_what_came_and_what_is_accepted() -> None:
    error = InvalidArgument("k", 9, "1 to 8")
    assert str(error) == "k: got 9, accepted 1 to 8"
    assert (error.argument, error.got, error.accepted) == ("k", 9, "1 to 8")


def test_is_a_value_error_of_the_package() -> None:
    assert issubclass(sonicmoe.InvalidArgument, ValueError)


def test_survives_pickling_between_processes() -> None:
    error = InvalidArgument("x.shape", (3, 4), "(T, H)")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
