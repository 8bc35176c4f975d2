"""bias_dot on the GPU, launched by its spec: against the same products in fp64."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from closeness import assert_as_good
from torch import Tensor

from sonicmoe import jit
from sonicmoe.cute_kernels.bias_dot import BiasDotSpec

DEVICE = "cuda"
NAN = float("nan")
PADDING = 30


def launch(do: Tensor, bias: Tensor, sizes: list[int], row_token: Tensor, columns: int) -> Tensor:
    """The parts, all NaN before. Rows after the last group's are padding."""
    spec = BiasDotSpec(do.shape[1], {torch.bfloat16: "bf16", torch.float16: "fp16"}[do.dtype], len(sizes), columns)
    cu_rows = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=DEVICE)
    parts = torch.full((row_token.shape[0], columns), NAN, device=DEVICE)
    jit.launch(spec, do, bias, cu_rows, row_token, parts)
    return parts


def check(sizes: list[int], tokens: int, width: int, dtype: torch.dtype = torch.bfloat16, columns: int = 3) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = sum(sizes)
    do = torch.randn(tokens + 1, width, generator=generator).to(DEVICE, dtype)
    do[-1] = NAN  # the padding's token
    bias = torch.randn(len(sizes), width, generator=generator).to(DEVICE, dtype)
    row_token = torch.randint(0, tokens, (rows + PADDING,), generator=generator, dtype=torch.int32).to(DEVICE)
    row_token[rows:] = tokens
    parts = launch(do, bias, sizes, row_token, columns)
    assert parts[:, :-1].isnan().all() and parts[rows:].isnan().all(), "only the last part of a group's row is written"
    of_row = torch.arange(len(sizes), device=DEVICE).repeat_interleave(torch.tensor(sizes, device=DEVICE))
    terms = do[row_token[:rows]].double() * bias[of_row].double()
    truth = terms.sum(1)
    # Some eps of fp32 of the terms, which cancel: at the greatest width a lane adds 96 of them one after the other.
    yardstick = truth + 4 * torch.finfo(torch.float32).eps * terms.norm(dim=1)
    assert_as_good("parts", parts[:rows, -1], yardstick, truth, torch.float32)
    assert torch.equal(launch(do, bias, sizes, row_token, columns)[:rows, -1], parts[:rows, -1])


@pytest.mark.parametrize("width", [8, 248, 256, 264, 2880])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widths(width: int, dtype: torch.dtype) -> None:
    check([0, 300, 1, 0, 129, 64], 200, width, dtype)


@pytest.mark.parametrize("sizes", [[0], [1], [0, 0, 5000, 0], [(7 * g) % 11 for g in range(700)]], ids=str)
@pytest.mark.parametrize("columns", [2, 24])
def test_groups(sizes: list[int], columns: int) -> None:
    check(sizes, 77, 72, columns=columns)


def test_tokens_past_2_31_elements() -> None:
    width, last = 8192, 4
    tokens = (1 << 31) // width + last
    do = torch.zeros(tokens, width, dtype=torch.bfloat16, device=DEVICE)
    do[-last:] = torch.randn(last, width, device=DEVICE)
    bias = torch.randn(2, width, device=DEVICE).bfloat16()
    row_token = torch.tensor([0, *range(tokens - last, tokens)], dtype=torch.int32, device=DEVICE)
    parts = launch(do, bias, [1, last], row_token, 2)
    assert parts[0, -1] == 0
    truth = (do[-last:].double() * bias[1].double()).sum(1)
    assert_as_good("parts", parts[1:, -1], (do[-last:].float() * bias[1].float()).sum(1), truth, torch.float32)
