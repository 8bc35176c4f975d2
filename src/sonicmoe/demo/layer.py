"""The speed of one 7B layer on this GPU, router included."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sonicmoe.moe import ROUTINGS, MoE

TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, PER_TOKEN = 24576, 1536, 256, 128, 8
REPEATS = 20
_FLUSH = 256 * 2**20  # bytes: more than twice any L2 cache


class Speed(NamedTuple):
    """Medians. FLOPs are the model's for the rows that were computed: 6·R·I·H forward, 12·R·I·H backward."""

    routing: str
    rows: int
    forward_ms: float
    both_ms: float

    @property
    def forward_tflops(self) -> float:
        return 6 * self.rows * INTERMEDIATE * HIDDEN / self.forward_ms / 1e9

    @property
    def both_tflops(self) -> float:
        return 18 * self.rows * INTERMEDIATE * HIDDEN / self.both_ms / 1e9


def measure(device: torch.device, backend: str = "auto") -> list[Speed]:
    """Of `sonicmoe.MoE` in bf16 with unit-scale random data, for each routing. Needs a CUDA device."""
    torch.manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN, device=device, dtype=torch.bfloat16, requires_grad=True)
    do = torch.randn_like(x)
    flush = torch.empty(_FLUSH, dtype=torch.uint8, device=device)
    speeds = []
    for routing in ROUTINGS:
        moe = MoE(
            EXPERTS,
            PER_TOKEN,
            HIDDEN,
            INTERMEDIATE,
            routing=routing,
            backend=backend,
            device=device,
            dtype=torch.bfloat16,
        )
        rows = int(moe.route(moe.router(x)).cu_rows[-1])
        times = [_times(moe, x, do, flush) for _ in range(REPEATS + 3)][3:]
        forward, both = (sorted(column)[REPEATS // 2] for column in zip(*times, strict=True))
        speeds.append(Speed(routing, rows, forward, both))
    return speeds


def _times(moe: MoE, x: Tensor, do: Tensor, flush: Tensor) -> tuple[float, float]:
    """Milliseconds on the device, of the forward and of forward and backward; from a cold L2 cache."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    flush.zero_()
    # The device spins while the host runs ahead: gaps between launches are not the layer's.
    torch.cuda._sleep(4_000_000)
    events[0].record()
    o, _ = moe(x)
    events[1].record()
    torch.autograd.grad(o, [x, *moe.parameters()], do)
    events[2].record()
    torch.cuda.synchronize(x.device)
    return events[0].elapsed_time(events[1]), events[0].elapsed_time(events[2])
