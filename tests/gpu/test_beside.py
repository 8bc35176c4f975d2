"""down_wgrad_aggregate_: two kernels beside each other give what they give one after the other, and end together."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from closeness import assert_as_good
from strategies import build_routing, ragged_assigned, top_k_assigned
from torch import Tensor

from sonicmoe import Routing, ops

DEVICE = "cuda"
EXPERTS = 12


class Inputs(NamedTuple):
    do: Tensor
    a_s: Tensor
    dx_rows: Tensor
    parts: Tensor
    routing: Routing

    def run(self, dw2: Tensor, adds: bool = False, with_parts: bool = True) -> tuple[Tensor, Tensor]:
        do, a_s, dx_rows, parts, r = self
        rows = (do, a_s, r.cu_rows, r.row_token, dx_rows, parts if with_parts else None)
        return ops.down_wgrad_aggregate_(dw2, adds, *rows, r.slot_row, r.cu_slots, "cute")

    def expected(self, with_parts: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """dw2, dx, dscores by one kernel after the other"""
        do, a_s, dx_rows, parts, r = self
        dw2 = ops.down_wgrad(do, a_s, r.cu_rows, r.row_token, "cute")
        given = parts if with_parts else None
        found = dw2, *ops.aggregate(dx_rows, None, given, r.slot_row, r.cu_slots, do.shape[0], "cute")
        torch.cuda.synchronize()
        return found


def build(
    assigned: list[list[int]], hidden: int = 256, inter: int = 128, dtype: torch.dtype = torch.bfloat16
) -> Inputs:
    """At unit scale; the rows of the padding are NaN where they must not be read."""
    padding = 40 if len({len(a) for a in assigned}) > 1 else 0
    routing = build_routing(assigned, EXPERTS, padding=padding, device=DEVICE)
    generator = torch.Generator().manual_seed(1)

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).to(DEVICE, dtype)

    rows, count = routing.row_token.shape[0], int(routing.cu_rows[-1])
    do, a_s, dx_rows = normal(len(assigned), hidden), normal(rows, inter), normal(rows, hidden)
    parts = torch.randn(rows, 2, generator=generator).to(DEVICE)
    for t in (a_s, dx_rows, parts):
        t[count:] = float("nan")
    return Inputs(do, a_s, dx_rows, parts, routing)


def new_dw2(i: Inputs, dtype: torch.dtype | None = None) -> Tensor:
    return torch.full((EXPERTS, i.do.shape[1], i.a_s.shape[1]), float("nan"), device=DEVICE, dtype=dtype or i.do.dtype)


ROUTINGS = {
    "top 8": lambda: top_k_assigned(700, EXPERTS, 8),
    "top 1": lambda: top_k_assigned(65, EXPERTS, 1),
    "ragged": lambda: ragged_assigned(300, EXPERTS),
    "one token": lambda: top_k_assigned(1, EXPERTS, 2),
    "no tokens": lambda: top_k_assigned(0, EXPERTS, 2),
    "no rows": lambda: [[EXPERTS, EXPERTS]] * 9,
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_parts", [True, False])
def test_gives_what_one_after_the_other_gives(routing: str, dtype: torch.dtype, with_parts: bool) -> None:
    i = build(ROUTINGS[routing](), dtype=dtype)
    dw2, dx, dscores = i.expected(with_parts)
    for _ in range(3):
        mine = new_dw2(i)
        found = i.run(mine, with_parts=with_parts)
        assert torch.equal(mine, dw2) and torch.equal(found[0], dx) and torch.equal(found[1], dscores)
    if i.routing.cu_rows[-1]:
        assert dw2.abs().max() > 0.1 and dx.abs().max() > 0.1


def test_adds_to_a_buffer() -> None:
    i = build(ROUTINGS["top 8"]())
    alone, together = (torch.full((EXPERTS, 256, 128), 3.0, device=DEVICE) for _ in range(2))
    ops.down_wgrad_add_(alone, i.do, i.a_s, i.routing.cu_rows, i.routing.row_token, "cute")
    dx, dscores = i.run(together, adds=True)
    _, true_dx, true_dscores = i.expected()
    assert torch.equal(together, alone) and (alone - 3).abs().max() > 0.1
    assert torch.equal(dx, true_dx) and torch.equal(dscores, true_dscores)


@pytest.mark.parametrize(("hidden", "inter", "longer"), [(512, 2048, "GEMM"), (4096, 64, "sum")])
def test_what_comes_next_finds_both_complete(hidden: int, inter: int, longer: str) -> None:
    """Copies that are launched at once; and what the two read was written by the launch just before them."""
    i = build(top_k_assigned(4096, EXPERTS, 8), hidden, inter)
    expected = i.expected()
    i.dx_rows.copy_(2 * i.dx_rows)
    doubled = 2 * expected[1].float()
    torch.cuda.synchronize()
    for k in range(20):
        mine = new_dw2(i)
        i.dx_rows.mul_(0.5 if k % 2 == 0 else 2)
        dx, dscores = i.run(mine)
        copies = [t.clone() for t in (mine, dx, dscores)]
        for t in (mine, dx, dscores):
            t.fill_(float("nan"))
        assert torch.equal(copies[0], expected[0]), longer
        assert torch.equal(copies[1].float(), expected[1].float() if k % 2 == 0 else doubled), longer
        assert torch.equal(copies[2], expected[2]), longer


def test_a_kernel_that_begins_early_waits_for_both() -> None:
    """aggregate, which begins as the launch before it ends, writes where a_s, which the GEMM reads to its end, was."""
    i = build(top_k_assigned(4096, EXPERTS, 8), 512, 2048)
    expected, rows = i.expected(), i.a_s.shape[0]
    every = torch.arange(rows, device=DEVICE, dtype=torch.int32)
    for _ in range(10):
        mine, given = new_dw2(i), i._replace(a_s=i.a_s.clone())
        place = given.a_s.data_ptr()
        given.run(mine)
        del given
        o, _ = ops.aggregate(i.a_s, None, None, every, None, rows, "cute")
        assert o.data_ptr() == place, "it has the memory of a_s"
        assert torch.equal(mine, expected[0]) and torch.equal(o, i.a_s)


def test_in_a_graph_and_on_two_streams() -> None:
    i = build(top_k_assigned(2048, EXPERTS, 4), 512, 512)
    dw2, dx, dscores = i.expected()
    mine, graph = new_dw2(i), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = i.run(mine)
        copy = mine.clone()
    others = [(torch.cuda.Stream(), new_dw2(i)) for _ in range(2)]
    for _ in range(5):
        for t in (mine, copy, *found):
            t.fill_(float("nan"))
        graph.replay()
        results = []
        for stream, other in others:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results.append((other, *i.run(other)))
        torch.cuda.synchronize()
        for result in ((mine, *found), (copy, *found), *results):
            assert all(torch.equal(a, b) for a, b in zip(result, (dw2, dx, dscores), strict=True))


def test_rows_and_tokens_past_2_31_elements() -> None:
    """Tokens of the last group, and the rows that are summed, lie past 2^31 elements of dO and of dx_rows."""
    hidden, inter, last = 8192, 64, 4
    rows = (1 << 31) // hidden + last  # each of a token of its own
    do, dx_rows = (torch.zeros(rows, hidden, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    do[-last:], dx_rows[-last:] = torch.randn(2, last, hidden, device=DEVICE).bfloat16()
    a_s = torch.randn(rows, inter, device=DEVICE).bfloat16()
    every = torch.arange(rows, dtype=torch.int32, device=DEVICE)
    cu_rows = torch.tensor([0, rows - last, rows], dtype=torch.int32, device=DEVICE)
    dw2 = torch.full((2, hidden, inter), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    dx, _ = ops.down_wgrad_aggregate_(dw2, False, do, a_s, cu_rows, every, dx_rows, None, every, None, "cute")
    assert torch.equal(dx, dx_rows) and dx[-last:].any()
    truth = do[-last:].double().T @ a_s[-last:].double()
    assert torch.equal(dw2[0], torch.zeros_like(dw2[0]))
    assert_as_good("dw2", dw2[1], truth.bfloat16(), truth, torch.bfloat16)
