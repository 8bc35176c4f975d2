"""The launches of the grouped GEMMs: which kernel a call needs, and the fixed part of its arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sonicmoe import jit
from sonicmoe.activations import Activation
from sonicmoe.configs.choice import choose, gpu_key
from sonicmoe.configs.tile import TileConfig
from sonicmoe.cute_kernels.variants import GemmSpec, outputs
from sonicmoe.errors import InvalidArgument
from sonicmoe.ops._cute import aligned, dtype_name

MAX_GATHERED = 1 << 35  # elements: weight gradients count 16-byte chunks of what they gather in 32 bits
_forced: dict[str, TileConfig] = {}
_replaced: dict[str, tuple[Callable[..., None], bool]] = {}


def forced(variant: str, tile: TileConfig) -> AbstractContextManager[None]:
    """Within it, the variant runs by this tile configuration: for tests and measurements."""
    return _holding(_forced, variant, tile)


def replaced(variant: str, kernel: Callable[..., None], paced: bool) -> AbstractContextManager[None]:
    """Within it, the variant is launched by this kernel, which takes the same arguments: for measurements.

    paced: whether it takes the counter of a pace.
    """
    return _holding(_replaced, variant, (kernel, paced))


@contextlib.contextmanager
def _holding(table: dict[str, Any], variant: str, entry: Any) -> Iterator[None]:
    before = dict(table)
    table[variant] = entry
    try:
        yield
    finally:
        table.clear()
        table.update(before)


@cache
def processors(device: int) -> int:
    """SMs of the device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


class Form(NamedTuple):
    """What of a GEMM most have by default."""

    activation: str | None = None
    interleaved: bool = False
    halves: int = 1
    bias: bool = False
    keep_h: bool = True


def spec_of(device: int | None, variant: str, groups: int, n: int, k: int, dtype: str, *form: Any) -> GemmSpec:
    """The spec of a GEMM on a device; n and k are those of one half, form: what a Form has. Raises InvalidArgument."""
    return _spec(_forced.get(variant), device, variant, groups, n, k, dtype, form)


@cache
def _spec(
    tile: TileConfig | None,
    device: int | None,
    variant: str,
    groups: int,
    n: int,
    k: int,
    dtype: str,
    given: tuple[Any, ...],
) -> GemmSpec:
    """tile: that is taken without asking the table; given: of the form."""
    activation, interleaved, halves, bias, keep_h = Form(*given)
    act = None if activation is None else Activation.parse(activation)
    outs = outputs(variant, halves, keep_h)
    try:
        gpu = gpu_key(torch.cuda.get_device_name(device))
        tile = tile or choose(variant, groups, n, k, outs, halves, gpu)
    except ValueError as error:
        raise InvalidArgument(variant, f"E = {groups}, n = {n}, k = {k}", str(error)) from None
    return GemmSpec(variant, groups, n, k, dtype, tile, halves, interleaved, act, bias, keep_h)


@cache
def _kernel(tile: TileConfig | None, device: int, *what: Any) -> tuple[Callable[..., None], bool, int]:
    """(kernel, whether its CTAs keep to one pace, CTAs)"""
    spec = _spec(tile, device, *what)
    return jit.kernel(spec), spec.paced, processors(device)


def check_gathered(argument: str, t: Tensor) -> None:
    """Raises InvalidArgument for more elements than a weight gradient can address."""
    if t.numel() > MAX_GATHERED:
        raise InvalidArgument(argument, f"{t.numel()} elements", f"up to {MAX_GATHERED}, 64 GiB")


def launch(
    variant: str, a: tuple[Tensor, ...], b: Tensor, out: tuple[Tensor | None, ...], cu_rows: Tensor, n: int, k: int,
    *form: Any, spare: int = 0,
) -> None:  # fmt: skip
    """Launch a variant on the current device and stream, but for `spare` of its SMs. form: what a Form has.

    a comes from outside, a gradient from anywhere: it may begin at any element of somebody's memory.
    """
    of = (_forced.get(variant), b.device.index, variant, cu_rows.shape[0] - 1, n, k, dtype_name("x", b), form)
    function, paced, ctas = (*_replaced[variant], processors(b.get_device())) if variant in _replaced else _kernel(*of)
    counter = b.new_zeros(1, dtype=torch.int32) if paced else None
    function((aligned(a[0]), *a[1:]), (b,), out, cu_rows, counter, ctas - spare)
