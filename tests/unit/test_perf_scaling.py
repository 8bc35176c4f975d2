"""What is computed for many GPUs, against counting: a routing drawn at random, and who sends what to whom."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from perf import ledger, report, scaling
from perf.ledger import Row
from perf.scaling import HGX, Links
from perf.shapes import SHAPES, Shape

SHAPE = Shape("x", 20000, 16, 8, 64, 4)
LINKS = Links(node=4, inside=9e9, between=1e9)


def row(shape: Shape, ms: float, **cells: object) -> Row:
    told = {"date": "2026-01-01T00:00:00Z", "gpu": "NVIDIA Test", "driver": "1", "torch": "2", "dsl": "3"}
    told |= {"commit": "abc", "impl": "sonicmoe", "variant": "both", "dtype": "bf16", "routing": "topk", "router": True}
    told |= {"shape": shape.name, "ms_p50": ms, **dict(zip("THIEK", shape.thiek, strict=True)), **cells}
    return Row(**told)  # type: ignore[arg-type]


def gpus_of_tokens(gpus: int) -> torch.Tensor:
    """(T, K): where the experts of GPU 0's tokens are, drawn at random."""
    generator = torch.Generator().manual_seed(0)
    experts = torch.rand(SHAPE.T, SHAPE.E, generator=generator).argsort(1)[:, : SHAPE.K]
    return experts // (SHAPE.E // gpus)


@pytest.mark.parametrize("gpus", [2, 4, 16])
def test_rows_of_all_to_all(gpus: int) -> None:
    to = gpus_of_tokens(gpus)
    inside = ((to != 0) & (to < LINKS.node)).sum() * SHAPE.H * 2 / LINKS.inside
    between = (to >= LINKS.node).sum() * SHAPE.H * 2 / LINKS.between
    counted = 4e3 * float(torch.maximum(inside, between))
    assert scaling.rows_ms(SHAPE, gpus, LINKS) == pytest.approx(counted, rel=0.02)
    assert (gpus == 16) == bool(between > inside), "both bounds are tested"


@pytest.mark.parametrize("gpus", [2, 4, 16])
def test_tokens_of_deep_ep(gpus: int) -> None:
    to = gpus_of_tokens(gpus)
    at = torch.zeros(SHAPE.T, gpus, dtype=torch.bool).scatter(1, to, True)
    node = at.view(SHAPE.T, -1, min(gpus, LINKS.node))
    # From the other nodes as many arrive as leave: copies that stay on the GPU where a token enters cost nothing.
    inside = node[:, :, 1:].sum() * SHAPE.H * 2 / LINKS.inside
    between = node.any(2)[:, 1:].sum() * SHAPE.H * 2 / LINKS.between
    counted = 4e3 * float(torch.maximum(inside, between))
    assert scaling.tokens_ms(SHAPE, gpus, LINKS) == pytest.approx(counted, rel=0.02)
    assert scaling.tokens_ms(SHAPE, gpus, LINKS) < scaling.rows_ms(SHAPE, gpus, LINKS)


def test_weights_of_fsdp() -> None:
    weights = 3 * SHAPE.E * SHAPE.I * SHAPE.H * 2
    # A ring: each GPU receives all but its own part; a node all but its own, by its four adapters together.
    assert scaling.weights_ms(SHAPE, 4, LINKS) == pytest.approx(1e3 * 3 * weights * 0.75 / 9e9)
    assert scaling.weights_ms(SHAPE, 16, LINKS) == pytest.approx(1e3 * 3 * weights * 0.75 / 4e9)


def test_an_unknown_layer_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.csv").write_text("gpu\nT\n")
    for options, said in ((["nosuch"], "shape: got 'nosuch'"), (["--ledger", str(tmp_path)], "no row of a ledger")):
        with pytest.raises(SystemExit) as stopped:
            scaling.main(options)
        assert stopped.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]


def test_the_table_is_of_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = SHAPES["7b"]
    rows = [row(layer, 2.5), row(layer, 2.0, date="2026-01-02T00:00:00Z"), row(layer, 9.0, router=False)]
    rows += [row(layer, 9.0, impl="loop"), row(layer, 9.0, variant="forward"), row(layer, 9.0, activation="geglu")]
    assert scaling.measured(rows) == {"7b": 2.0}
    text = scaling.scaling(rows)
    links = scaling.rows_ms(layer, 8, HGX)
    assert text is not None and f"| 7b | (24576, 1536, 256, 128, 8) | 2 | {links:.3g} ({links / 2:.1f}x) |" in text
    assert text.count("\n") == 2 and scaling.scaling([]) is None
    assert report.TABLES["scaling"] is scaling.scaling and "integrations.md" in {p.name for p in report.FILES}
    assert scaling.main(["--ledger", str(tmp_path / "none"), "7b"]) == 0
    said = capsys.readouterr().out
    assert "Computed, not measured" in said and "not measured yet" in said
    ledger.append(tmp_path / "x.csv", rows)
    assert scaling.main(["--ledger", str(tmp_path), "7b", "olmoe"]) == 0
    said = capsys.readouterr().out
    assert "NVIDIA Test" in said and f"({links / 2:.1f}x)" in said and said.count("not measured yet") == 1


def test_fewer_experts_than_gpus() -> None:
    """All groups that have experts are visited by a token that goes to all."""
    shape = Shape("few", 64, 16, 8, 4, 4)
    assert scaling.visited(shape, 64) == scaling.visited(shape, 4) == 4
