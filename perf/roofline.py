"""How many operations and bytes each step needs at the least, and how long a GPU takes for them at the least.

Bytes count every distinct byte once: an input read once, an output written once. A gather that finds a token's row no
longer in the L2 cache reads it again, which is not counted: the floor is what no implementation beats, not a forecast.
"""

from __future__ import annotations

from typing import NamedTuple

from perf.shapes import Shape

KERNELS = (
    "up_proj",
    "down_proj",
    "aggregate",
    "down_dgrad",
    "down_wgrad",
    "up_dgrad",
    "up_wgrad",
    "aggregate_dx",
)
FORWARD, BACKWARD = KERNELS[:3], KERNELS[3:]
# What a layer's time is made of: two of the kernels run beside each other.
PARTS: dict[str, tuple[str, ...]] = {k: (k,) for k in KERNELS if k not in ("down_wgrad", "aggregate_dx")}
PARTS["down_wgrad+aggregate_dx"] = ("down_wgrad", "aggregate_dx")
GEMMS = tuple(k for k in KERNELS if not k.startswith("aggregate"))
_INDEX, _SCORE = 4, 4  # bytes of an int32 index and of a score or its gradient


class Work(NamedTuple):
    """flops: multiplications and additions of the products; bytes: device memory traffic, each distinct byte once."""

    flops: int
    bytes: int


class Ceilings(NamedTuple):
    """What a GPU sustains: products in bf16 or fp16 [FLOP/s], device memory read plus written [byte/s]."""

    flops: float
    bandwidth: float


# Sustained, as measured with a large product and a large copy; a data sheet's figures are not reached.
MEASURED = {"h200": Ceilings(790e12, 4.28e12), "h100": Ceilings(750e12, 3.0e12)}


def ceilings_of(gpu: str) -> Ceilings | None:
    """The ceilings of a GPU by its name, None if they are not known. SXM boards: others are measured in the run."""
    if "pcie" in gpu.lower() or "nvl" in gpu.lower():
        return None
    return next((c for name, c in MEASURED.items() if name in gpu.lower()), None)


def work(kernel: str, shape: Shape, *, rows: int | None = None, gated: bool = True, item: int = 2) -> Work:
    """The work of a kernel for `rows` routed rows (default T*K) of `item`-byte elements.

    Source: SonicMoE (arXiv 2512.14080), table of the eight kernels; 6*R*I*H FLOPs forward, 12*R*I*H backward.
    """
    tokens, hidden, inter, experts, k = shape.thiek
    rows = tokens * k if rows is None else rows
    width = 2 * inter if gated else inter
    x, h, a, y = (item * n for n in (tokens * hidden, rows * width, rows * inter, rows * hidden))
    w1, w2 = item * experts * width * hidden, item * experts * inter * hidden
    up, down = 2 * rows * width * hidden, 2 * rows * inter * hidden
    index, score = _INDEX * rows, _SCORE * rows
    table = {
        "up_proj": Work(up, x + w1 + h + a + index),
        "down_proj": Work(down, a + w2 + y),
        "aggregate": Work(0, y + x + index + score),
        "down_dgrad": Work(down, x + w2 + 2 * h + a + 2 * index + 2 * score),
        "down_wgrad": Work(down, x + a + w2 + index),
        "up_dgrad": Work(up, h + w1 + y),
        "up_wgrad": Work(up, x + h + w1 + index),
        "aggregate_dx": Work(0, y + x + index + 2 * score),
    }
    return table[kernel]


def floor_ms(of: Work, ceilings: Ceilings) -> float:
    """Milliseconds that no implementation of this work beats: arithmetic or traffic, whichever takes longer."""
    return 1e3 * max(of.flops / ceilings.flops, of.bytes / ceilings.bandwidth)


def steps(what: str) -> tuple[str, ...]:
    """The kernels of "forward", "backward" or "both"; a kernel's own name is itself."""
    return {"forward": FORWARD, "inference": FORWARD, "backward": BACKWARD, "both": KERNELS}.get(what, (what,))


def total(what: str, shape: Shape, *, rows: int | None = None, gated: bool = True, item: int = 2) -> Work:
    """The work of all steps of `what`, each as a kernel of its own."""
    parts = [work(k, shape, rows=rows, gated=gated, item=item) for k in steps(what)]
    return Work(sum(p.flops for p in parts), sum(p.bytes for p in parts))


def layer_floor_ms(
    what: str, shape: Shape, ceilings: Ceilings, *, rows: int | None = None, gated: bool = True, item: int = 2
) -> float:
    """Sum of the steps' floors, as if they ran one after the other. The router is not in it."""
    return sum(floor_ms(work(k, shape, rows=rows, gated=gated, item=item), ceilings) for k in steps(what))


def kept_bytes(shape: Shape, *, rows: int | None = None, gated: bool = True, item: int = 2) -> int:
    """x and h, what the layer keeps from forward to backward: 2*T*H + 4*R*I bytes in bf16 with a gated activation."""
    rows = shape.rows if rows is None else rows
    return item * (shape.T * shape.H + rows * (2 if gated else 1) * shape.I)


def peak_bytes(shape: Shape, *, rows: int | None = None, gated: bool = True, item: int = 2) -> int:
    """The most that the paper's steps hold at once, forward and backward, beside x, dO, weights and routing.

    Its scratch (a, y; dh, a_s, dx_rows) beside h, and the gradients as they come, one step after the other.
    """
    tokens, hidden, inter, experts, _ = shape.thiek
    rows = shape.rows if rows is None else rows
    width = 2 * inter if gated else inter
    h = dh = item * rows * width
    a = a_s = item * rows * inter
    y = dx_rows = item * rows * hidden
    o = dx = item * tokens * hidden
    dw1, dw2 = item * experts * width * hidden, item * experts * inter * hidden
    forward = max(h + a + y, h + y + o)
    backward = max(
        h + dh + a_s + dw2,
        h + dh + dw2 + dx_rows + dx,
        h + dh + dw2 + dx + dw1,
    )
    return max(forward, o + backward)
