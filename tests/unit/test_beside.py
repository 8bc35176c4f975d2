"""How many SMs w2's gradient leaves to the sum beside it."""

from __future__ import annotations

import pytest

from sonicmoe.ops.down_wgrad_aggregate import spare_sms


@pytest.mark.parametrize(("inter", "spare"), [(256, 28), (512, 14), (1024, 8), (2048, 4)])
def test_where_measured(inter: int, spare: int) -> None:
    """28 of 132 for I = 256, 12 to 24 for 512, 8 to 12 for 1024: docs/notes/2026-11-28-beside.md."""
    assert spare_sms(132, 196608, 128, inter) == spare


@pytest.mark.parametrize("rows", [1, 64, 4096, 1 << 20])
@pytest.mark.parametrize("experts", [1, 8, 512])
@pytest.mark.parametrize("inter", [64, 256, 4096])
@pytest.mark.parametrize("sms", [114, 132])
def test_the_gemm_keeps_half_of_them_in_pairs(rows: int, experts: int, inter: int, sms: int) -> None:
    spare = spare_sms(sms, rows, experts, inter)
    assert spare % 2 == 0 and 0 <= spare <= 0.53 * sms
    assert spare <= spare_sms(sms, rows, experts, inter // 2)
