"""Operations, bytes and floors."""

from __future__ import annotations

import pytest

from perf import roofline
from perf.roofline import Ceilings, Work
from perf.shapes import SHAPES

SEVEN = SHAPES["7b"]


def test_model_flops_are_those_of_the_paper() -> None:
    tokens, hidden, inter, _, k = SEVEN.thiek
    unit = tokens * k * inter * hidden
    assert roofline.total("forward", SEVEN).flops == 6 * unit
    assert roofline.total("backward", SEVEN).flops == 12 * unit
    assert roofline.total("both", SEVEN).flops == 18 * unit
    assert roofline.total("forward", SEVEN, gated=False).flops == 4 * unit


def test_bytes_of_each_kernel_at_7b() -> None:
    # Gigabytes without the indices, which are a percent at most.
    expected = {
        "up_proj": 0.58,
        "down_proj": 0.81,
        "aggregate": 0.68,
        "down_dgrad": 0.68,
        "down_wgrad": 0.28,
        "up_dgrad": 1.01,
        "up_wgrad": 0.48,
        "aggregate_dx": 0.68,
    }
    assert set(expected) == set(roofline.KERNELS)
    for kernel, gigabytes in expected.items():
        assert roofline.work(kernel, SEVEN).bytes / 1e9 == pytest.approx(gigabytes, abs=0.0075), kernel


def test_rows_scale_the_work() -> None:
    for kernel in roofline.GEMMS:
        half = roofline.work(kernel, SEVEN, rows=SEVEN.rows // 2)
        assert 2 * half.flops == roofline.work(kernel, SEVEN).flops
        assert half.bytes < roofline.work(kernel, SEVEN).bytes


def test_floor_is_the_slower_of_arithmetic_and_traffic() -> None:
    ceilings = Ceilings(flops=100.0, bandwidth=10.0)
    assert roofline.floor_ms(Work(flops=200, bytes=10), ceilings) == 2000
    assert roofline.floor_ms(Work(flops=100, bytes=30), ceilings) == 3000
    h200 = roofline.ceilings_of("NVIDIA H200")
    assert h200 is not None
    assert roofline.layer_floor_ms("forward", SEVEN, h200) == pytest.approx(0.75, abs=0.01)
    assert roofline.layer_floor_ms("backward", SEVEN, h200) == pytest.approx(1.33, abs=0.01)


def test_only_known_boards_have_ceilings() -> None:
    assert roofline.ceilings_of("NVIDIA H100 80GB HBM3") is not None
    assert roofline.ceilings_of("NVIDIA H100 PCIe") is None
    assert roofline.ceilings_of("NVIDIA A100-SXM4-80GB") is None


def test_memory() -> None:
    assert roofline.kept_bytes(SEVEN) == 2 * SEVEN.T * SEVEN.H + 4 * SEVEN.rows * SEVEN.I
    # At constant FLOPs what is kept does not depend on granularity; the scratch does.
    assert len({roofline.kept_bytes(SHAPES[n]) for n in ("7b", "7b-512", "7b-1024", "7b-64")}) == 1
    h, dh, a_s = 2 * SEVEN.rows * 512, 2 * SEVEN.rows * 512, 2 * SEVEN.rows * 256
    assert roofline.peak_bytes(SEVEN) > h + dh + a_s
    assert roofline.peak_bytes(SHAPES["7b-64"]) > roofline.peak_bytes(SHAPES["7b"])
