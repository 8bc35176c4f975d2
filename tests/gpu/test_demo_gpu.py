"""The demo by the kernels, and the speed of its layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sonicmoe.__main__ import main

# 256 rows per expert: two tiles.
SMALL = (
    "--blocks 2 --hidden 64 --heads 2 --experts 8 --per-token 2 --intermediate 32 --context 64 --batch 16 --tile-m 128 "
    "--steps 30 --every 10 --device cuda --quiet"
).split()


@pytest.mark.unpoisoned
def test_training_by_kernels_is_that_by_torch(tmp_path: Path) -> None:
    losses = {}
    for backend in ("cute", "torch"):
        assert main([*SMALL, "--backend", backend, "--no-layer", "--out", str(tmp_path / backend)]) == 0
        results = json.loads((tmp_path / backend / "results.json").read_text())
        losses[backend] = {r["routing"]: [p["held_out"] for p in r["history"]] for r in results["runs"]}
        for run in results["runs"]:
            assert run["history"][-1]["held_out"] < run["history"][0]["held_out"]
            assert run["kept_bytes"] > run["kept_bytes_moe"] > 0
    for routing, of_kernels in losses["cute"].items():
        assert of_kernels == pytest.approx(losses["torch"][routing], abs=0.05), routing


@pytest.mark.unpoisoned
def test_speed_of_the_7b_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--steps", "3", "--every", "3", "--out", str(tmp_path)]) == 0
    topk, rounded = json.loads((tmp_path / "results.json").read_text())["layer"]
    assert topk["rows"] == 24576 * 8 and rounded["rows"] % 128 == 0
    for speed in (topk, rounded):
        assert 0.3 < speed["forward_ms"] < speed["both_ms"] < 100
    assert "One 7B layer" in capsys.readouterr().out
