"""FLOPs as torch counts them."""

from __future__ import annotations

import pytest
import torch
from strategies import build_routing, build_weights, top_k_assigned
from torch.utils.flop_counter import FlopCounterMode

import sonicmoe.integrations.flops
from sonicmoe import moe_experts

assert sonicmoe.integrations.flops


@pytest.mark.parametrize("buffers", [False, True])
def test_flop_counter_counts_the_products(buffers: bool) -> None:
    """6 T K H I of a gated forward, twice that of its backward."""
    tokens, experts, k, hidden, inter = 20, 4, 2, 16, 8
    x, w1, w2, _, _ = build_weights(tokens, experts, hidden, inter, "swiglu", dtype=torch.float32)
    routing = build_routing(top_k_assigned(tokens, experts, k), experts)
    sums = {"w1_grad": torch.zeros(w1.shape), "w2_grad": torch.zeros(w2.shape)} if buffers else {}
    forward = 6 * tokens * k * hidden * inter
    with FlopCounterMode(display=False) as counter:
        o = moe_experts(x, w1, w2, routing, **sums)
        assert counter.get_total_flops() == forward
        o.sum().backward()
    assert counter.get_total_flops() == 3 * forward
