"""What a launch of a grouped GEMM hands to its kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sonicmoe.ops import _gemm


@pytest.mark.parametrize(("k", "paced"), [(2560, True), (2048, False)])
def test_a_counter_of_its_own_for_every_launch_that_needs_one(
    monkeypatch: pytest.MonkeyPatch, k: int, paced: bool
) -> None:
    monkeypatch.setattr(_gemm, "processors", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    given: list[tuple[Any, ...]] = []
    x, w2, cu_rows = torch.empty(3, k).bfloat16(), torch.empty(0).bfloat16(), torch.zeros(9, dtype=torch.int32)
    with _gemm.replaced("down_dgrad", lambda *arguments: given.append(arguments)):
        for _ in range(2):
            _gemm.launch("down_dgrad", (x, cu_rows), w2, (), cu_rows, 2048, k, "swiglu", False, 2)
            if paced:
                given[-1][4].add_(7)  # as a kernel does; the next one begins at zero again
        _gemm.launch("down_dgrad", (x, cu_rows), w2, (), cu_rows, 2048, k, "swiglu", False, 2, spare=4)
    counters = [arguments[4] for arguments in given]
    assert [arguments[5] for arguments in given] == [132, 132, 128]
    if not paced:
        assert counters == [None] * 3
        return
    assert len({counter.data_ptr() for counter in counters}) == 3
    assert [(c.dtype, c.tolist()) for c in counters] == [(torch.int32, [n]) for n in (7, 7, 0)]
