"""bias_grad on the GPU: against the same sums in fp64."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_as_good
from strategies import build_routing, ragged_assigned, top_k_assigned
from torch import Tensor

from sonicmoe import Routing, ops

DEVICE = "cuda"
EXPERTS = 9


def _terms(num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Unit scale, with a mean: a sum that loses a few rows is then wrong by more than rounding."""
    generator = torch.Generator().manual_seed(2)
    return (torch.randn(num_rows, width, generator=generator) + 0.5).to(DEVICE, dtype)


def check(routing: Routing, width: int, dtype: torch.dtype, of_tokens: bool) -> None:
    """of_tokens: db2, gathered and weighted; else db1."""
    num_rows = routing.num_tokens if of_tokens else routing.row_token.shape[0]
    rows = _terms(num_rows, width, dtype)
    if not of_tokens:
        rows[int(routing.cu_rows[-1]) :] = float("nan")
    gather = (routing.row_token, routing.scores, routing.row_slot) if of_tokens else (None, None, None)
    exact = (routing.row_token, routing.scores.double(), routing.row_slot) if of_tokens else gather
    truth = ops.bias_grad(rows.double(), routing.cu_rows, *exact, "torch")
    yardstick = ops.bias_grad(rows, routing.cu_rows, *gather, "torch")
    out = ops.bias_grad(rows, routing.cu_rows, *gather, "cute")
    assert out.dtype == torch.float32
    # A different order of additions: some eps of fp32 more or less than torch's.
    assert_as_good("bias_grad", out, yardstick + 8 * torch.finfo(torch.float32).eps * truth, truth, torch.float32)
    assert torch.equal(out, ops.bias_grad(rows, routing.cu_rows, *gather, "cute"))


@pytest.mark.parametrize("width", [8, 64, 72, 2880])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_tokens", [True, False])
def test_widths(width: int, dtype: torch.dtype, of_tokens: bool) -> None:
    check(build_routing(top_k_assigned(700, EXPERTS, 4), EXPERTS, device=DEVICE), width, dtype, of_tokens)


@pytest.mark.parametrize(
    "assigned",
    [
        [],
        [[3]],
        [[5]] * 1000,
        [[0, 8]] * 33,
        [[t % 12, (t + 1) % 12] for t in range(300)],
        [[EXPERTS]] * 7,
        ragged_assigned(129, EXPERTS),
    ],
)
@pytest.mark.parametrize("padding", [0, 50])
@pytest.mark.parametrize("of_tokens", [True, False])
def test_routings(assigned: list[list[int]], padding: int, of_tokens: bool) -> None:
    check(build_routing(assigned, EXPERTS, padding=padding, device=DEVICE), 136, torch.bfloat16, of_tokens)


def test_rows_past_2_31_elements() -> None:
    width = 8192
    num_rows = (1 << 31) // width + 8
    rows = torch.zeros(num_rows, width, dtype=torch.bfloat16, device=DEVICE)
    rows[-4:] = torch.randn(4, width, device=DEVICE)
    cu_rows = torch.tensor([0, num_rows - 4, num_rows], dtype=torch.int32, device=DEVICE)
    out = ops.bias_grad(rows, cu_rows, None, None, None, "cute")
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert_as_good("bias_grad", out[1], rows[-4:].float().sum(0), rows[-4:].double().sum(0), torch.float32)


def test_tokens_past_2_31_elements() -> None:
    """Gathered, as of db2."""
    width, last = 8192, 4
    num_tokens = (1 << 31) // width + last
    do = torch.zeros(num_tokens, width, dtype=torch.bfloat16, device=DEVICE)
    do[-last:] = torch.randn(last, width, device=DEVICE)
    cu_rows = torch.tensor([0, 1, 1 + last], dtype=torch.int32, device=DEVICE)
    row_token = torch.tensor([0, *range(num_tokens - last, num_tokens)], dtype=torch.int32, device=DEVICE)
    row_slot = torch.arange(1 + last, dtype=torch.int32, device=DEVICE)
    scores = torch.rand(1 + last, device=DEVICE) + 0.1
    out = ops.bias_grad(do, cu_rows, row_token, scores, row_slot, "cute")
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    terms = do[-last:].double() * scores[1:, None].double()
    assert_as_good("bias_grad", out[1], terms.float().sum(0), terms.sum(0), torch.float32)
