"""What the programs here say about options that cannot be, before they measure or write anything."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from perf import ledger, shapes
from perf.ledger import Row
from perf.shapes import Shape
from sonicmoe import InvalidArgument
from sonicmoe.__main__ import chosen_device
from sonicmoe.demo.report import check_folder

T = TypeVar("T")


def parsed(
    p: argparse.ArgumentParser, arguments: Sequence[str] | None, prepare: Callable[[argparse.Namespace], T]
) -> tuple[argparse.Namespace, T]:
    """The options, and what `prepare` makes of them. Where that raises InvalidArgument the exit status is 2."""
    a = p.parse_args(arguments)
    try:
        return a, prepare(a)
    except InvalidArgument as error:
        p.error(str(error))


def count(text: str) -> int:
    """A type of argparse's: an integer of 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {text}, accepted 1 or more")
    return number


def amount(text: str) -> float:
    """A type of argparse's: a finite number of 0 or more."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"got {text}, accepted a finite number of 0 or more")
    return number


def chosen_shapes(arguments: argparse.Namespace, usual: Sequence[str]) -> list[Shape]:
    """Shapes by names of them and of groups, then those by numbers; without any the usual. Raises InvalidArgument."""
    by_numbers = [shapes.parse_thiek(text) for text in arguments.thiek]
    return shapes.named(arguments.shape or ([] if by_numbers else list(usual))) + by_numbers


def check_device(name: str) -> None:
    """Raises InvalidArgument for a device that is not here, or that no clock of ours can time."""
    if chosen_device(name).type not in ("cpu", "cuda"):
        raise InvalidArgument("device", repr(name), "cpu or cuda")


def check_gpu() -> None:
    """Raises InvalidArgument where torch sees no GPU, for programs that time nothing else."""
    if not torch.cuda.is_available():
        raise InvalidArgument("GPU", "none", "one that torch sees: only there is anything to time")


def check_out(path: Path) -> None:
    """Make the folder of a file that is written later. Raises InvalidArgument if it or the file cannot be."""
    check_folder(path.parent)
    try:
        if path.exists():
            path.open("a").close()
    except OSError as error:
        raise InvalidArgument("out", str(error), "a place that can be written") from error


def read_ledger(path: Path) -> list[Row]:
    """As `ledger.read`. Raises InvalidArgument for what is no ledger, nor a folder of them."""
    try:
        return ledger.read(path)
    except (OSError, ValueError) as error:
        raise InvalidArgument("ledger", str(error), "a ledger, or a folder of them") from error
