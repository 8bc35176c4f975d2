"""Held-out losses of the trainings in `perf/results`: what `python -m sonicmoe` wrote to its results.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from perf import tables


def read(folder: Path, gpu: str) -> list[Mapping[str, Any]]:
    """The runs on this GPU in the newest folder named DATE-quality."""
    for newest in sorted(folder.glob("*/*-quality"), key=lambda path: path.name, reverse=True):
        results = [json.loads(path.read_text()) for path in sorted(newest.glob("*.json"))]
        runs = [run for result in results if result["setting"]["device"] == gpu for run in result["runs"]]
        if runs:
            return runs
    return []


def losses(runs: Sequence[Mapping[str, Any]]) -> str | None:
    """The last held-out loss of every seed in nats per byte, and the pairs that rounding dropped and padded."""
    seeds = sorted({run["seed"] for run in runs})
    lines = []
    for name in dict.fromkeys(run["routing"] for run in sorted(runs, key=lambda r: r["routing"] != "topk")):
        mine = {run["seed"]: run for run in runs if run["routing"] == name}
        last = {seed: run["history"][-1]["held_out"] for seed, run in mine.items()}
        pairs = {of: sum(run["pairs"][of] for run in mine.values()) for of in ("chosen", "dropped", "padded")}
        lines.append(
            [
                "token_rounding (nearest)" if name == "token_rounding" else name,
                *(f"{last[seed]:.4f}" if seed in last else "-" for seed in seeds),
                f"{mean(last.values()):.4f}",
                f"{max(last.values()) - min(last.values()):.4f}",
                *(f"{pairs[of] / pairs['chosen']:.1%}" for of in ("dropped", "padded")),
            ]
        )
    header = ["routing", *(f"seed {seed}" for seed in seeds), "mean", "spread", "dropped", "padded"]
    return tables.markdown(header, lines) if lines else None
