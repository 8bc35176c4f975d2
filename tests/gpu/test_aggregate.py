"""aggregate on the GPU: against the same sums in fp64, for every way in which the kernel cuts the work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closeness import assert_as_good
from strategies import build_routing, ragged_assigned, top_k_assigned
from torch import Tensor

from sonicmoe import Routing, ops

DEVICE = "cuda"
EXPERTS = 12
# One chunk; several tokens in a CTA, whole and ragged; one CTA per token; two and four pieces; gpt-oss.
WIDTHS = (8, 64, 136, 1536, 2880, 4096, 8192)


def build(assigned: list[list[int]], width: int, dtype: torch.dtype, padding: int = 0) -> tuple[Tensor, Routing]:
    """Rows at unit scale and their routing; the rows of the padding, and those of nobody, are NaN."""
    routing = build_routing(assigned, EXPERTS, padding=padding, device=DEVICE)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(routing.row_token.shape[0], width, generator=generator).to(DEVICE, dtype)
    rows[int(routing.cu_rows[-1]) :] = float("nan")
    return rows, routing


def run(rows: Tensor, routing: Routing, backend: str, weighted: bool, parts: Tensor | None = None) -> Any:
    scores = routing.scores if weighted else None
    return ops.aggregate(rows, scores, parts, routing.slot_row, routing.cu_slots, routing.num_tokens, backend)


def check(rows: Tensor, routing: Routing, weighted: bool, num_parts: int = 0) -> None:
    parts = None
    if num_parts:
        parts = torch.randn(rows.shape[0], num_parts, device=DEVICE)
        parts[int(routing.cu_rows[-1]) :] = float("nan")
    truth, true_dscores = run(rows.double(), routing, "torch", weighted, None if parts is None else parts.double())
    # No better yardstick than one rounding of the truth: the kernel sums in fp32 and rounds once.
    o, dscores = run(rows, routing, "cute", weighted, parts)
    assert_as_good("o", o, truth.to(rows.dtype), truth, rows.dtype)
    if parts is None:
        assert dscores.shape == (0,)
    else:
        # A sum of up to 16 terms in fp32: some eps of it.
        yardstick = true_dscores * (1 + 8 * torch.finfo(torch.float32).eps)
        assert_as_good("dscores", dscores, yardstick, true_dscores, torch.float32)
    again = run(rows, routing, "cute", weighted, parts)
    assert torch.equal(again[0], o) and torch.equal(again[1], dscores)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighted", [True, False])
def test_widths(width: int, dtype: torch.dtype, weighted: bool) -> None:
    check(*build(top_k_assigned(37, EXPERTS, 8), width, dtype), weighted)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 8, 9, 10, 12])
@pytest.mark.parametrize("num_parts", [0, 1, 3, 16])
def test_every_k(k: int, num_parts: int) -> None:
    check(*build(top_k_assigned(33, EXPERTS, k), 200, torch.bfloat16), num_parts == 0, num_parts)


@pytest.mark.parametrize("width", [64, 1536, 4096])
@pytest.mark.parametrize("padding", [0, 300])
@pytest.mark.parametrize("num_parts", [0, 2])
def test_ragged(width: int, padding: int, num_parts: int) -> None:
    check(*build(ragged_assigned(65, EXPERTS), width, torch.bfloat16, padding), num_parts == 0, num_parts)


@pytest.mark.parametrize("assigned", [[[EXPERTS, 3], [1, EXPERTS], [EXPERTS, EXPERTS]], [[EXPERTS] * 9] * 5])
def test_slots_without_row(assigned: list[list[int]]) -> None:
    rows, routing = build(assigned, 136, torch.bfloat16)
    check(rows, routing, weighted=True)
    check(rows, routing, weighted=False, num_parts=2)


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 1000])
def test_tokens(num_tokens: int) -> None:
    check(*build(top_k_assigned(num_tokens, EXPERTS, 2), 96, torch.bfloat16), weighted=True)


def test_tokens_without_slots() -> None:
    rows, routing = build([[]] * 9, 64, torch.bfloat16, padding=4)
    o, dscores = run(rows, routing._replace(cu_slots=torch.zeros(10, dtype=torch.int32, device=DEVICE)), "cute", False)
    assert torch.equal(o, torch.zeros_like(o)) and o.shape == (9, 64)


def test_writes_nothing_else() -> None:
    """The bytes around o and dscores, which come from one buffer each, stay as they were."""
    from sonicmoe import jit
    from sonicmoe.cute_kernels.aggregate import AggregateSpec

    tokens, width, guard = 37, 200, 16
    rows, routing = build(top_k_assigned(tokens, EXPERTS, 3), width, torch.bfloat16)
    parts = torch.randn(rows.shape[0], 2, device=DEVICE)
    o = torch.full((tokens + 2 * guard, width), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    dscores = torch.full((tokens * 3 + 2 * guard,), float("nan"), device=DEVICE)
    spec = AggregateSpec(width, "bf16", 3, weighted=True, parts=2)
    inside = slice(guard, -guard)
    jit.launch(spec, rows, routing.scores, parts, routing.slot_row, None, o[inside], dscores[inside])
    for t in (o, dscores):
        assert not t[inside].isnan().any()
        assert t[:guard].isnan().all() and t[-guard:].isnan().all()


def test_rows_past_2_31_elements() -> None:
    width = 8192
    num_rows = (1 << 31) // width + 8
    rows = torch.zeros(num_rows, width, dtype=torch.bfloat16, device=DEVICE)
    rows[-4:] = torch.randn(4, width, device=DEVICE)
    slot_row = torch.arange(num_rows - 4, num_rows, dtype=torch.int32, device=DEVICE)
    o, _ = ops.aggregate(rows, None, None, slot_row, None, 2, "cute")
    truth = rows[-4:].float().unflatten(0, (2, 2)).sum(1)
    assert_as_good("o", o, truth.bfloat16(), truth, torch.bfloat16)


def test_tokens_past_2_31_elements() -> None:
    width, last = 8192, 4
    num_tokens = (1 << 31) // width + last
    rows = torch.randn(last, width, device=DEVICE).bfloat16()
    slot_row = torch.arange(num_tokens, dtype=torch.int32, device=DEVICE) % last
    o, _ = ops.aggregate(rows, None, None, slot_row, None, num_tokens, "cute")
    assert all(torch.equal(o[t], rows[t % last]) for t in (0, 1, *range(num_tokens - last, num_tokens)))
