"""What a launch of a grouped GEMM hands to its kernel."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from sonicmoe.configs.choice import candidates
from sonicmoe.ops import _gemm


@pytest.mark.parametrize(("k", "paced"), [(4096, True), (4088, False)])
def test_a_counter_of_its_own_for_every_launch_that_needs_one(
    gemm_launches: list[tuple[Any, tuple[Any, ...]]], k: int, paced: bool
) -> None:
    x, w2, cu_rows = torch.empty(3, k).bfloat16(), torch.empty(0).bfloat16(), torch.zeros(9, dtype=torch.int32)
    for _ in range(2):
        _gemm.launch("down_dgrad", (x, cu_rows), w2, (), cu_rows, 2048, k, "swiglu", False, 2)
        if paced:
            gemm_launches[-1][1][4].add_(7)  # as a kernel does; the next one begins at zero again
    _gemm.launch("down_dgrad", (x, cu_rows), w2, (), cu_rows, 2048, k, "swiglu", False, 2, spare=4)
    counters = [arguments[4] for _, arguments in gemm_launches]
    assert [arguments[5] for _, arguments in gemm_launches] == [132, 132, 128]
    if not paced:
        assert counters == [None] * 3
        return
    assert len({counter.data_ptr() for counter in counters}) == 3
    assert [(c.dtype, c.tolist()) for c in counters] == [(torch.int32, [n]) for n in (7, 7, 0)]


def test_a_forced_configuration_is_launched(gemm_launches: list[tuple[Any, tuple[Any, ...]]]) -> None:
    b, cu_rows = torch.empty(0).bfloat16(), torch.zeros(5, dtype=torch.int32)
    first, other = candidates("down_proj", 4, 256, 1)[:2]
    for tile in (other, first, None, other):
        with nullcontext() if tile is None else _gemm.forced("down_proj", tile):
            _gemm.launch("down_proj", (b,), b, (), cu_rows, 256, 64)
            assert _gemm.spec_of(None, "down_proj", 4, 256, 64, "bf16") == gemm_launches[-1][0]
    assert [spec.tile for spec, _ in gemm_launches] == [other, first, first, other]


def test_a_replaced_kernel_is_launched_by_the_counter_that_it_takes(
    gemm_launches: list[tuple[Any, tuple[Any, ...]]],
) -> None:
    """Whatever the kernel in its place would take."""
    b, cu_rows = torch.empty(0).bfloat16(), torch.zeros(5, dtype=torch.int32)
    given: list[tuple[Any, ...]] = []
    for k in (64, 4096):
        for paced in (False, True):
            with _gemm.replaced("down_proj", lambda *arguments: given.append(arguments), paced):
                for variant in ("down_proj", "up_dgrad"):
                    _gemm.launch(variant, (b,), b, (), cu_rows, 64, k)
            counter = given[-1][4]
            assert (counter.tolist(), counter.dtype) == ([0], torch.int32) if paced else counter is None
    _gemm.launch("down_proj", (b,), b, (), cu_rows, 64, 64)
    assert len(given) == 4 and {arguments[5] for arguments in given} == {132}
    assert [spec.variant for spec, _ in gemm_launches] == ["up_dgrad"] * 4 + ["down_proj"]


def test_forced_within_forced(gemm_launches: list[tuple[Any, tuple[Any, ...]]]) -> None:
    first, other = candidates("down_proj", 4, 256, 1)[:2]
    what = (None, "down_proj", 4, 256, 64, "bf16")
    usual = _gemm.spec_of(*what).tile
    with _gemm.forced("down_proj", first):
        with _gemm.forced("down_proj", other):
            assert _gemm.spec_of(*what).tile == other
        assert _gemm.spec_of(*what).tile == first
    assert _gemm.spec_of(*what).tile == usual


def test_rows_that_begin_anywhere_are_copied(gemm_launches: list[tuple[Any, tuple[Any, ...]]]) -> None:
    """A gradient may be a view of what a concatenation's backward left, where a kernel's 16 bytes do not begin."""
    b, cu_rows = torch.empty(0).bfloat16(), torch.zeros(5, dtype=torch.int32)
    memory = torch.randn(3 * 64 + 8).bfloat16()
    for start in (0, 1, 8):
        rows = memory[start : start + 3 * 64].view(3, 64)
        _gemm.launch("down_proj", (rows,), b, (), cu_rows, 256, 64)
        given = gemm_launches[-1][1][0][0]
        assert given.data_ptr() % 16 == 0 and torch.equal(given, rows)
        assert (given.data_ptr() == rows.data_ptr()) == (start != 1)
