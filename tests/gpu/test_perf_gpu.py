"""The benchmark's command line on a GPU, with a small layer: every measurement runs, and is of the kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from perf import ledger, run, tune
from perf.ledger import Row
from perf.roofline import GEMMS, KERNELS
from sonicmoe.configs.tile import TileConfig

pytestmark = pytest.mark.gpu

SMALL = ["--thiek", "512,256,128,8,2"]


def rows_of(folder: Path, *arguments: str) -> dict[tuple[str, str], Row]:
    quick = ["--repeats", "3", "--warm-seconds", "0", "--quiet"]
    assert run.main([*SMALL, *quick, "--out", str(folder), *arguments]) == 0
    rows = ledger.read(folder)
    assert all(r.backend == "cute" for r in rows if r.impl.startswith("sonicmoe"))
    return {(r.impl, r.variant): r for r in rows}


def test_kernels(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "--what", "kernels")
    for kernel in KERNELS:
        row = rows["sonicmoe", kernel]
        assert row.ms_p50 and row.roofline and 0 < row.roofline < 1.5 and row.error is not None
    assert rows["copy", "copy"].gbps


@pytest.mark.parametrize("router", [True, False])
def test_layers(tmp_path: Path, router: bool) -> None:
    rows = rows_of(tmp_path, "--peer", "cublas", "loop", *(["--module"] if router else ["--no-router"]))
    both = rows["sonicmoe", "both"]
    assert both.error is not None and both.router == router and both.of_bound
    assert ("loop", "both") in rows and (("sonicmoe.MoE", "both") in rows) == router


def test_memory(tmp_path: Path) -> None:
    row = rows_of(tmp_path, "--what", "memory")["sonicmoe", "memory"]
    assert row.protocol == "allocator" and row.saved_mib and row.bound_mib and row.peak_mib
    # The plan, and the allocator's rounding to 512 bytes, beside x and h.
    assert 1.0 <= row.saved_mib / row.bound_mib < 1.1


def test_router_host_and_breakdown(tmp_path: Path) -> None:
    for what in ("router", "host", "breakdown"):
        rows = rows_of(tmp_path / what, "--what", what)
        assert {impl for impl, _ in rows} & {"sonicmoe", "sonicmoe.MoE"}, what
        assert all(r.ms_p50 for (_, variant), r in rows.items() if variant != "breakdown-rest")


def test_tuner(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    options = ["--repeats", "2", "--warm-seconds", "0", "--jobs", "2", "--out", str(path)]
    arguments = tune.parser().parse_args([*SMALL, *options, "--variant", "down_proj", "up_proj"])
    assert tune.run(arguments) == 0
    table = tune.read(path)
    assert {key[0] for key in table} == {"down_proj", "up_proj"} < set(GEMMS) and len(table) == 3
    assert all(isinstance(tile, TileConfig) for tile in table.values())
