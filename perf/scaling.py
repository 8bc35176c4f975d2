"""What to expect of a layer on many GPUs: `python -m perf.scaling`. Computed, not measured.

    time of the layer on one GPU, from the ledger, beside bytes that travel over stated link speeds

Every GPU has T tokens, weights and gradients are in bf16, the routing is even. Expert parallelism over n GPUs: a GPU
computes as many rows as alone; its rows go to their experts and come back, forward and backward, and the layer waits
for each of the four. FSDP2: weights are gathered twice, gradients are reduced once, which can overlap with computing.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from perf import commandline, ledger, shapes, tables
from perf.ledger import Row
from perf.shapes import Shape

GPUS = (8, 64)
SHAPES = ("7b", "30b", "120b", "olmoe", "qwen3-235b", "deepseek-v3.2")
ITEM = 2  # bytes of a bf16


class Links(NamedTuple):
    """Peaks of one GPU in one direction [byte/s]: what its links to its node and its share of the network carry."""

    node: int
    inside: float
    between: float


# NVLink 4 of an HGX H100 or H200, and a 400 Gbit/s adapter for each GPU.
HGX = Links(node=8, inside=450e9, between=50e9)


def _ms(inside: float, between: float, links: Links) -> float:
    """Both kinds of links carry their bytes at the same time."""
    return 1e3 * max(inside / links.inside, between / links.between)


def rows_ms(shape: Shape, gpus: int, links: Links = HGX) -> float:
    """Links' time of expert parallelism by `AllToAll`, forward and backward: each row travels there and back, twice."""
    near = min(gpus, links.node) - 1
    of_all = 4 * ITEM * shape.rows * shape.H / gpus
    return _ms(of_all * near, of_all * (gpus - 1 - near), links)


def visited(shape: Shape, groups: int) -> float:
    """The mean number of groups, of equally many experts each, that a token's experts are in; of as many as experts
    where those are fewer."""
    groups = min(groups, shape.E)
    missed = math.comb(shape.E - shape.E // groups, shape.K) / math.comb(shape.E, shape.K)
    return groups * (1 - missed)


def tokens_ms(shape: Shape, gpus: int, links: Links = HGX) -> float:
    """The same by `DeepEP`: a token travels once to each node, and there once to each GPU, that has experts of it."""
    nodes = max(1, gpus // links.node)
    of_one = 4 * ITEM * shape.T * shape.H
    inside = of_one * visited(shape, gpus) * (1 - 1 / min(gpus, links.node))
    return _ms(inside, of_one * visited(shape, nodes) * (1 - 1 / nodes), links)


def weights_ms(shape: Shape, gpus: int, links: Links = HGX) -> float:
    """Links' time of FSDP2: two gathers and a reduction of w1 and w2, by rings over all of a node's adapters."""
    nodes = max(1, gpus // links.node)
    passed = 3 * ITEM * shape.E * 3 * shape.I * shape.H
    return _ms(passed * (1 - 1 / gpus), passed * (1 - 1 / nodes) / links.node, links)


def measured(rows: Sequence[Row]) -> dict[str, float]:
    """Milliseconds of forward and backward on one GPU, by the shape's name."""
    mine = [r for r in rows if (r.impl, r.variant, r.routing) == ("sonicmoe", "both", "topk") and r.router]
    usual = [r for r in ledger.usual(mine) if "@" not in r.shape]
    return {r.shape: r.ms_p50 for r in ledger.newest(usual) if r.ms_p50}


def _cell(links_ms: float, layer_ms: float | None) -> str:
    ratio = "" if layer_ms is None else f" ({links_ms / layer_ms:.1f}x)"
    return f"{tables.cell(links_ms, 3)}{ratio}"


def lines(ms: dict[str, float], names: Sequence[str]) -> list[list[str]]:
    """A line for each layer: time on one GPU, and of the links in ms and relative to it."""
    table = []
    for shape in shapes.named(list(names)):
        alone = ms.get(shape.name)
        cells = [_cell(of(shape, gpus), alone) for of in (rows_ms, tokens_ms, weights_ms) for gpus in GPUS]
        size = f"({shape.T}, {shape.H}, {shape.I}, {shape.E}, {shape.K})"
        table.append([shape.name, size, tables.cell(alone, 3) if alone else "not measured yet", *cells])
    return table


HEADER = (
    "layer",
    "(T, H, I, E, K) per GPU",
    "alone, ms",
    *(f"{way}, {gpus} GPUs" for way in ("AllToAll", "DeepEP", "FSDP2") for gpus in GPUS),
)


def scaling(rows: Sequence[Row]) -> str | None:
    """Computed from the layers that were measured: time of the links in ms, and relative to the layer's."""
    ms = measured(rows)
    names = [name for name in SHAPES if name in ms]
    return tables.markdown(HEADER, lines(ms, names)) if names else None


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m perf.scaling", description="Layers on 8 and 64 GPUs, computed.")
    p.add_argument("shape", nargs="*", default=list(SHAPES), help=f"default: {', '.join(SHAPES)}")
    p.add_argument("--ledger", type=Path, default=ledger.RESULTS)
    p.add_argument("--gpu", help="part of a GPU's name; default: the one measured last")
    return p


def rows_of(arguments: argparse.Namespace) -> list[Row]:
    """Those of GPUs; none without a ledger: all but the layers alone is computed. Raises InvalidArgument."""
    shapes.named(arguments.shape)
    read = commandline.read_ledger(arguments.ledger) if arguments.ledger.exists() else []
    return [r for r in read if r.gpu != "cpu"]


def main(arguments: Sequence[str] | None = None) -> int:
    a, rows = commandline.parsed(parser(), arguments, rows_of)
    gpu = next((r.gpu for r in reversed(rows) if (a.gpu or "").lower() in r.gpu.lower()), "no GPU")
    ms = measured([r for r in rows if r.gpu == gpu])
    print("Computed, not measured: forward and backward, links' time in ms (and relative to the layer alone).")
    links = f"{HGX.inside / 1e9:.0f} GB/s in a node of {HGX.node}, {HGX.between / 1e9:.0f} GB/s between nodes"
    print(f"Links: {links}. Layers alone: measured on {gpu}.\n")
    print(tables.text(HEADER, lines(ms, a.shape)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
