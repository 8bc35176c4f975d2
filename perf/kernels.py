"""Each of the eight kernels alone, beside the batched product by cuBLAS of the same FLOPs, or a copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from perf import check
from perf.problem import Form, Problem
from perf.roofline import KERNELS
from perf.shapes import Shape
from sonicmoe import ops
from sonicmoe.reference.activation import act, act_backward

LAYOUT = "concat"
SAMPLED_ROWS = 48
# Written in fp32 from fp32 sums, so far more exact than the storage dtype.
TOLERANCES = {"parts": 2e-3, "dscores": 1e-4}
COPY = "copy"
COPY_BYTES = 1 << 30


class Inputs(NamedTuple):
    """Every input of the eight kernels, drawn independently of each other, and the routing's plan."""

    x: Tensor
    do: Tensor
    w1: Tensor
    w2: Tensor
    b1: Tensor | None
    b2: Tensor | None
    h: Tensor
    a: Tensor
    y: Tensor
    parts: Tensor
    scores: Tensor
    cu_rows: Tensor
    row_token: Tensor
    row_slot: Tensor
    slot_row: Tensor
    cu_slots: Tensor | None
    form: Form
    rows: int

    @property
    def tokens(self) -> int:
        return self.x.shape[0]


def inputs(shape: Shape, form: Form, routing: str) -> Inputs:
    """dh reuses h's tensor and dx_rows y's: they have the same shape, and no kernel reads both."""
    problem = Problem(shape, form)
    plan = problem.routing(routing)
    bound, count = plan.row_token.shape[0], int(plan.cu_rows[-1])
    width = problem.w1.shape[1]
    return Inputs(
        problem.x.detach(),
        problem.do,
        problem.w1.detach(),
        problem.w2.detach(),
        None if problem.b1 is None else problem.b1.detach(),
        None if problem.b2 is None else problem.b2.detach(),
        problem.normal(bound, width),
        problem.normal(bound, shape.I),
        problem.normal(bound, shape.H),
        problem.normal(bound, -(-shape.I // 128), dtype=torch.float32),
        plan.scores,
        plan.cu_rows,
        plan.row_token,
        plan.row_slot,
        plan.slot_row,
        plan.cu_slots,
        form,
        count,
    )


def calls(i: Inputs) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """The eight kernels as sonicmoe's ops, each returning its outputs as a tuple."""
    activation, backend, plan = str(i.form.kind), i.form.backend, (i.cu_rows, i.row_token)
    slots = (i.slot_row, i.cu_slots, i.tokens, backend)
    return {
        "up_proj": lambda: ops.up_proj(i.x, i.w1, i.b1, *plan, activation, LAYOUT, True, backend),
        "down_proj": lambda: (ops.down_proj(i.a, i.w2, i.b2, i.cu_rows, backend),),
        "aggregate": lambda: ops.aggregate(i.y, i.scores, None, *slots)[:1],
        "down_dgrad": lambda: ops.down_dgrad(i.do, i.w2, i.b2, i.h, i.scores, *plan, i.row_slot, activation, backend),
        "down_wgrad": lambda: (ops.down_wgrad(i.do, i.a, *plan, backend),),
        "up_dgrad": lambda: (ops.up_dgrad(i.h, i.w1, i.cu_rows, LAYOUT, backend),),
        "up_wgrad": lambda: (ops.up_wgrad(i.x, i.h, *plan, LAYOUT, backend),),
        "aggregate_dx": lambda: ops.aggregate(i.y, None, i.parts, *slots),
    }


def bound_rows(i: Inputs) -> int:
    """Rows of each of the E equal groups of the bound; rounded up, so that the bound does at least the same work."""
    return max(1, -(-i.rows // i.w1.shape[0]))


def bounds(i: Inputs) -> dict[str, Callable[[], Tensor]]:
    """torch.bmm of the FLOPs of each kernel in equal-sized groups, inputs gathered beforehand; and a device copy."""
    experts, width, hidden = i.w1.shape
    inter, rows = i.w2.shape[2], bound_rows(i)

    def normal(columns: int) -> Tensor:
        return torch.randn((experts, rows, columns), device=i.x.device, dtype=i.x.dtype)

    x, a, dh = normal(hidden), normal(inter), normal(width)
    elements = min(COPY_BYTES, max(i.y.nbytes, 1 << 20)) // i.x.element_size()
    source = torch.empty(elements, device=i.x.device, dtype=i.x.dtype).normal_()
    target = torch.empty_like(source)
    return {
        "up_proj": lambda: torch.bmm(x, i.w1.transpose(1, 2)),
        "down_proj": lambda: torch.bmm(a, i.w2.transpose(1, 2)),
        "down_dgrad": lambda: torch.bmm(x, i.w2),
        "down_wgrad": lambda: torch.bmm(x.transpose(1, 2), a),
        "up_dgrad": lambda: torch.bmm(dh, i.w1),
        "up_wgrad": lambda: torch.bmm(dh.transpose(1, 2), x),
        COPY: lambda: target.copy_(source),
    }


def bound_flops(kernel: str, i: Inputs) -> int:
    experts, width, hidden = i.w1.shape
    columns = width if kernel.startswith("up") else i.w2.shape[2]
    return 2 * experts * bound_rows(i) * hidden * columns


def copied_bytes(i: Inputs) -> int:
    """Read plus written by the copy of `bounds`."""
    return 2 * (min(COPY_BYTES, max(i.y.nbytes, 1 << 20)) // i.x.element_size()) * i.x.element_size()


def _rows_product(i: Inputs, rows: Tensor, source: Tensor, weight: Tensor, transpose: bool) -> Tensor:
    """source[j] @ weight[expert of rows[j]] (or its transpose), in fp32."""
    expert = torch.searchsorted(i.cu_rows[1:].long(), rows, right=True)
    out = source.new_empty((len(rows), weight.shape[1 if transpose else 2]), dtype=torch.float32)
    for e in expert.unique().tolist():
        mine = expert == e
        w = weight[e].float()
        out[mine] = source[mine].float() @ (w.T if transpose else w)
    return out


def _sample_rows(i: Inputs) -> Tensor:
    """Random rows, and the first and last of the buffer's rows and of some experts."""
    edges = torch.cat([i.cu_rows[:4], i.cu_rows[1:5] - 1, i.cu_rows[-1:] - 1]).long()
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(0, i.rows, (SAMPLED_ROWS,), generator=generator).to(edges.device)
    rows = torch.cat([edges, random]).unique()
    return rows[(rows >= 0) & (rows < i.rows)]


def _bias(i: Inputs, bias: Tensor | None, rows: Tensor) -> Tensor | float:
    if bias is None:
        return 0.0
    return bias[torch.searchsorted(i.cu_rows[1:].long(), rows, right=True)].float()


def _check_rows(kernel: str, i: Inputs, out: tuple[Tensor, ...]) -> dict[str, float]:
    """Errors of the kernels that write a row per routed row."""
    kind, rows = i.form.kind, _sample_rows(i)
    token = i.row_token[rows].long()
    if kernel == "up_proj":
        h = _rows_product(i, rows, i.x[token], i.w1, transpose=True) + _bias(i, i.b1, rows)
        error_of_a = {"a": check.error(out[1][rows], act(kind, h.to(i.x.dtype).float()))}
        return error_of_a | ({"h": check.error(out[0][rows], h)} if len(out[0]) else {})
    if kernel == "down_proj":
        y = _rows_product(i, rows, i.a[rows], i.w2, transpose=True) + _bias(i, i.b2, rows)
        return {"y": check.error(out[0][rows], y)}
    if kernel == "up_dgrad":
        return {"dx_rows": check.error(out[0][rows], _rows_product(i, rows, i.h[rows], i.w1, transpose=False))}
    do = i.do[token]
    da, h = _rows_product(i, rows, do, i.w2, transpose=False), i.h[rows].float()
    score, a = i.scores[i.row_slot[rows].long()][:, None], act(kind, h)
    dscore = (da * a).sum(1)
    if i.b2 is not None:
        dscore = dscore + (do.float() * _bias(i, i.b2, rows)).sum(1)
    return {
        "dh": check.error(out[0][rows], act_backward(kind, h, score * da)),
        "a_s": check.error(out[1][rows], score * a),
        "parts": check.error(out[2][rows].sum(1), dscore),
    }


def _check_experts(kernel: str, i: Inputs, out: Tensor) -> dict[str, float]:
    """Error of a weight gradient, for the fullest, the emptiest and the last expert."""
    counts = i.cu_rows.diff()
    chosen = {int(counts.argmax()), int(counts.argmin()), len(counts) - 1}
    worst = 0.0
    for e in chosen:
        rows = slice(int(i.cu_rows[e]), int(i.cu_rows[e + 1]))
        token = i.row_token[rows].long()
        if kernel == "down_wgrad":
            truth = i.do[token].float().T @ i.a[rows].float()
        else:
            truth = i.h[rows].float().T @ i.x[token].float()
        worst = max(worst, check.error(out[e], truth))
    return {"dw": worst}


def _check_tokens(kernel: str, i: Inputs, out: tuple[Tensor, ...]) -> dict[str, float]:
    """Errors of the sums per token, and of the scores' gradients."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.cat([torch.tensor([0, i.tokens - 1]), torch.randint(0, i.tokens, (32,), generator=generator)])
    per_token = i.slot_row.shape[0] // i.tokens
    truth, scores = [], []
    for t in tokens.unique().tolist():
        first, last = (t * per_token, (t + 1) * per_token) if i.cu_slots is None else i.cu_slots[t : t + 2].tolist()
        slots = torch.arange(first, last, device=i.y.device)
        slots = slots[i.slot_row[slots] >= 0]
        rows = i.slot_row[slots].long()
        weight = i.scores[slots][:, None] if kernel == "aggregate" else 1.0
        truth.append((weight * i.y[rows].float()).sum(0))
        scores.append((slots, i.parts[rows].sum(1)))
    errors = {"o": check.error(out[0][tokens.unique().to(i.y.device)], torch.stack(truth))}
    if kernel == "aggregate_dx":
        slots = torch.cat([s for s, _ in scores])
        errors["dscores"] = check.error(out[1][slots], torch.cat([d for _, d in scores]))
    return errors


def errors(kernel: str, i: Inputs, out: tuple[Tensor, ...]) -> dict[str, float]:
    """The relative error of each output of a kernel against fp32 arithmetic on samples."""
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel}")
    if kernel.startswith("aggregate"):
        return _check_tokens(kernel, i, out)
    if kernel.endswith("wgrad"):
        return _check_experts(kernel, i, out[0])
    return _check_rows(kernel, i, out)


def wrong(found: dict[str, float], dtype: torch.dtype) -> list[str]:
    """What is wrong about `errors`: one text for each output beyond its tolerance."""
    allowed = {name: TOLERANCES.get(name, check.tolerance(dtype)) for name in found}
    return [f"{n}: relative error {e:.2e}, allowed {allowed[n]:.1e}" for n, e in found.items() if not e <= allowed[n]]
