"""Which tile configuration a grouped GEMM takes: a table per GPU, and where that is silent, the least predicted time.

The choice depends on what stays the same between steps (variant, n, k, halves, GPU), never on the number of rows:
nothing is compiled or tuned anew because a batch or its routing changed.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from importlib import resources
from typing import Any

from .tile import TileConfig, round_up

MOST_STAGES = 6
LEAST_STAGES = 3
# (schedule, tile_n, cluster) -> speed relative to the best on whole tiles of an H200, about the mean over shapes.
SPEEDS = {
    "up_proj": {("cooperative", 256, 1): 1.0, ("pingpong", 128, 1): 0.85, ("cooperative", 128, 1): 0.82},
    "down_proj": {
        ("pingpong", 192, 1): 1.0,
        ("cooperative", 256, 1): 0.98,
        ("pingpong", 128, 1): 0.97,
        ("pingpong", 64, 1): 0.74,
    },
    "down_dgrad": {("cooperative", 256, 1): 1.0, ("cooperative", 128, 1): 0.76},
    "up_dgrad": {
        ("pingpong", 192, 1): 1.0,
        ("cooperative", 256, 1): 0.97,
        ("pingpong", 128, 1): 0.95,
        ("pingpong", 64, 1): 0.68,
    },
    "wgrad": {
        ("cooperative", 256, 1): 1.0,
        ("cooperative", 256, 2): 0.99,
        ("cooperative", 192, 1): 0.87,
        ("cooperative", 128, 1): 0.78,
        ("cooperative", 64, 1): 0.47,
    },
}


def family(variant: str) -> str:
    """The key of a variant in SPEEDS."""
    return "wgrad" if "wgrad" in variant else variant


def candidates(variant: str, groups: int, n: int, halves: int) -> list[TileConfig]:
    """Every configuration that can be chosen, the one of the least predicted time first.

    groups, halves: of the GemmSpec. What shared memory a number of epilogue buffers leaves is spent on stages.
    """
    share = halves if variant == "up_proj" else 1
    found: list[tuple[float, TileConfig]] = []
    for (schedule, tile_n, cluster), speed in SPEEDS[family(variant)].items():
        columns = tile_n // share
        predicted = round_up(n, columns) / n / speed
        form = TileConfig(schedule, tile_n, 0, 0, cluster=cluster)
        for buffers in _buffers(variant, form):
            tile = _fitted(variant, groups, replace(form, buffers=buffers), halves)
            if tile is not None and tile not in (t for _, t in found):
                found.append((predicted, tile))
    return [tile for _, tile in sorted(found, key=lambda pair: pair[0])]


def _buffers(variant: str, tile: TileConfig) -> tuple[int, ...]:
    """Numbers of epilogue buffers worth their shared memory: none for what adds from registers; down_dgrad can do with
    none, and has nothing of more than two; for the others no more than a warpgroup has boxes of accumulators."""
    if variant.endswith("_add"):
        return (0,)
    boxes = tile.warpgroup_rows // 64 * (tile.tile_n // 64)
    return (0, 1, 2) if variant == "down_dgrad" else tuple(dict.fromkeys(min(b, boxes) for b in (1, 2, 4)))


def _fitted(variant: str, groups: int, tile: TileConfig, halves: int) -> TileConfig | None:
    """With as many stages as fit beside its buffers, then more buffers in what is left."""

    def fits(stages: int, buffers: int) -> bool:
        whole = replace(tile, stages=stages, buffers=buffers)
        return whole.why_invalid(variant, groups, halves) is None

    buffers = tile.buffers
    stages = next((s for s in range(MOST_STAGES, LEAST_STAGES - 1, -1) if fits(s, buffers)), None)
    if stages is None:
        return None
    while 0 < buffers < _buffers(variant, tile)[-1] and fits(stages, buffers + 1):
        buffers += 1
    return replace(tile, stages=stages, buffers=buffers)


def gpu_key(name: str) -> str:
    """The table of a GPU, by the name that its driver gives it: "h100", "h200", or "" for one without a table."""
    found = re.search(r"\b(h200|h100)", name.lower())
    return found[1] if found else ""


@cache
def tuned(gpu: str) -> dict[tuple[Any, ...], TileConfig]:
    """The measured configurations of a GPU by (variant, n, k, halves, outs); written by `python -m perf.tune`."""
    path = resources.files(__package__) / "tuned" / f"{gpu}.json"
    if not gpu or not path.is_file():
        return {}
    entries = json.loads(path.read_text())
    return {(e["variant"], e["n"], e["k"], e["halves"], e["outs"]): TileConfig(**e["tile"]) for e in entries}


def choose(variant: str, groups: int, n: int, k: int, outs: int, halves: int, gpu: str) -> TileConfig:
    """The configuration of a GEMM. Raises ValueError if none is valid."""
    found = tuned(gpu).get((variant, n, k, halves, outs))
    if found is not None and found.why_invalid(variant, groups, halves) is None:
        return found
    possible = candidates(variant, groups, n, halves)
    if not possible:
        raise ValueError(f"no tile configuration of {variant} for {groups} groups of n = {n}")
    return possible[0]
