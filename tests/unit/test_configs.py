"""Tile configurations: which are refused and why, what they cost, which one is chosen."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from sonicmoe import MoE, route_token_rounding
from sonicmoe.activations import Activation
from sonicmoe.configs import tile as tile_module
from sonicmoe.configs.choice import SPEEDS, candidates, choose, family, gpu_key, tuned
from sonicmoe.configs.tile import SHARED_MEMORY, TILE_M, TileConfig
from sonicmoe.cute_kernels.rounding import RoundingSpec
from sonicmoe.cute_kernels.variants import GemmSpec, outputs

VARIANTS = (
    "up_proj",
    "down_proj",
    "down_dgrad",
    "up_dgrad",
    "down_wgrad",
    "up_wgrad",
    "down_wgrad_add",
    "up_wgrad_add",
)
# n, k of one half, as in the specs of 7B, 30B, 120B and gpt-oss layers, and as ragged as allowed
SIZES = ((256, 1536), (256, 4096), (512, 4096), (2880, 2880), (72, 200), (8, 8))
SWIGLU = Activation("swiglu")
UP = TileConfig("cooperative", 256, stages=3, buffers=3)
DOWN = TileConfig("pingpong", 192, stages=4, buffers=2)
DGRAD = TileConfig("cooperative", 256, stages=3, buffers=3)
WGRAD = TileConfig("cooperative", 256, stages=4, buffers=2)
BEST = {
    "up_proj": (256, 2),
    "down_proj": (1536, 1),
    "down_dgrad": (256, 2),
    "up_dgrad": (1536, 1),
    "up_wgrad": (512, 1),
}


def why_invalid(variant: str, tile: TileConfig, groups: int = 128, halves: int = 2) -> str | None:
    return tile.why_invalid(variant, groups, halves)


@pytest.mark.parametrize(
    ("variant", "tile"), [("up_proj", UP), ("down_proj", DOWN), ("down_dgrad", DGRAD), ("up_wgrad", WGRAD)]
)
def test_valid(variant: str, tile: TileConfig) -> None:
    assert why_invalid(variant, tile) is None


@pytest.mark.parametrize(
    ("variant", "tile", "reason"),
    [
        ("up_proj", replace(UP, tile_m=64), "tile_m must be 128"),
        ("up_proj", replace(UP, tile_k=128), "tile_k 64"),
        ("up_proj", replace(UP, schedule="turns"), "unknown schedule turns"),
        ("down_wgrad", replace(DOWN, tile_n=128), "ping-pong needs the same number of k steps"),
        ("up_wgrad_add", replace(DOWN, tile_n=128), "ping-pong needs the same number of k steps"),
        ("up_proj", replace(UP, tile_n=192), "tile_n must be a multiple of 128"),
        ("down_proj", replace(DOWN, tile_n=96), "tile_n must be a multiple of 64"),
        ("down_proj", TileConfig("cooperative", 320, 2, 1), "at most 256 columns"),
        ("down_proj", TileConfig("pingpong", 256, 3, 1), "256 accumulators per thread"),
        ("up_proj", TileConfig("pingpong", 256, 3, 3), "256 accumulators per thread"),
        ("down_dgrad", replace(DGRAD, tile_n=64), "no room for 2 boxes"),
        ("down_dgrad", replace(DGRAD, schedule="pingpong", tile_n=128), "two laps ahead"),
        ("down_dgrad", replace(DGRAD, tile_n=128, buffers=0), "no room for 3 boxes"),
        ("down_wgrad", replace(WGRAD, buffers=0), "an epilogue needs a buffer"),
        ("up_proj", replace(UP, buffers=0), "an epilogue needs a buffer"),
        ("down_proj", replace(DOWN, buffers=0), "an epilogue needs a buffer"),
        ("up_proj", replace(UP, stages=1), "two stages are the least"),
        ("up_proj", replace(UP, cluster=3), "cluster must be 1 or 2"),
        ("up_wgrad", replace(WGRAD, tile_n=192, cluster=2), "each CTA whole 64-column panels of B"),
        ("down_proj", replace(DOWN, tile_n=128, cluster=2), "only the CTAs of a weight gradient"),
        ("up_proj", replace(UP, stages=5), "bytes of shared memory"),
        ("down_dgrad", replace(DGRAD, stages=4), "bytes of shared memory"),
    ],
)
def test_each_rule(variant: str, tile: TileConfig, reason: str) -> None:
    assert reason in (why_invalid(variant, tile) or "")


def test_groups() -> None:
    """Only the search of GroupedM is limited."""
    assert why_invalid("down_proj", DOWN, groups=1024) is None
    assert "more than 1024 groups" in (why_invalid("down_proj", DOWN, groups=1025) or "")
    assert why_invalid("up_wgrad", WGRAD, groups=5000) is None


def test_a_spec_that_is_not_valid_is_not_built() -> None:
    assert "multiples of 8" in (GemmSpec("down_proj", 8, 100, 64, "bf16", DOWN).why_invalid() or "")
    gated = GemmSpec("up_proj", 8, 256, 64, "bf16", UP, halves=2, act=SWIGLU)
    assert gated.why_invalid() is None
    assert "swiglu does not have 1 halves" in (replace(gated, halves=1).why_invalid() or "")
    with pytest.raises(ValueError, match="multiples of 8"):
        GemmSpec("down_proj", 8, 128, 60, "bf16", DOWN).build()
    with pytest.raises(ValueError, match="two stages"):
        GemmSpec("down_proj", 8, 128, 64, "bf16", replace(DOWN, stages=1)).build()


def possible(variant: str, n: int, groups: int = 128, halves: int = 2) -> list[TileConfig]:
    return candidates(variant, groups, n, halves)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("groups", [1, 128, 1024])
@pytest.mark.parametrize("halves", [1, 2])
def test_every_candidate_is_valid(variant: str, groups: int, halves: int) -> None:
    for n, _ in SIZES:
        found = possible(variant, n, groups, halves)
        assert found and len(set(found)) == len(found)
        assert [t for t in found if t.why_invalid(variant, groups, halves)] == []
        assert all(t.buffers <= t.accumulators // 32 for t in found)  # of a box a thread has 32


def test_what_is_chosen() -> None:
    """The measured best on whole tiles; where n is small, a tile that is not mostly outside."""

    def first(variant: str, n: int, halves: int = 1) -> TileConfig:
        return choose(variant, 128, n, 4096, outputs(variant, halves), halves, "")

    for variant, (n, halves) in BEST.items():
        speeds = SPEEDS[family(variant)]
        tile = first(variant, n, halves)
        assert (tile.schedule, tile.tile_n, tile.cluster) == max(speeds, key=lambda form: speeds[form])
    assert first("up_wgrad_add", 512).tile_n == first("up_wgrad", 512).tile_n
    assert first("down_proj", 64).tile_n == first("up_wgrad", 64).tile_n == 64


def test_no_candidate() -> None:
    with pytest.raises(ValueError, match="no tile configuration of down_proj for 1025 groups"):
        choose("down_proj", 1025, 1536, 256, 1, 1, "h200")


def test_tables_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "GRID H100-80C", "NVIDIA A100-SXM4-80GB", "NVIDIA GH200 480GB")
    assert [gpu_key(name) for name in names] == ["h200", "h100", "h100", "", ""]
    measured, stale = TileConfig("pingpong", 64, 3, 1), TileConfig("pingpong", 64, 1, 1)
    table = {("down_proj", 1536, 256, 1, 1): measured, ("down_proj", 512, 256, 1, 1): stale}
    monkeypatch.setattr("sonicmoe.configs.choice.tuned", {"h200": table, "": {}}.get)
    assert choose("down_proj", 128, 1536, 256, 1, 1, "h200") == measured
    assert choose("down_proj", 128, 1536, 256, 1, 1, "") != measured
    assert choose("down_proj", 128, 512, 256, 1, 1, "h200") != stale


@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_every_tuned_entry_is_valid(gpu: str) -> None:
    for (variant, n, k, halves, _), tile in tuned(gpu).items():
        assert variant in VARIANTS and n % 8 == k % 8 == 0
        assert tile.why_invalid(variant, 128, halves) is None, (variant, n, k, tile)


def specs() -> list[GemmSpec]:
    """One of each epilogue and schedule."""
    return [
        GemmSpec("up_proj", 70, 256, 200, "bf16", possible("up_proj", 256, 70)[0], 2, act=SWIGLU),
        GemmSpec("down_proj", 1, 200, 72, "bf16", possible("down_proj", 200, 1, 1)[-1]),
        GemmSpec("down_dgrad", 1024, 256, 200, "fp16", possible("down_dgrad", 256, 1024)[0], 2, act=SWIGLU),
        GemmSpec("down_dgrad", 8, 72, 200, "bf16", possible("down_dgrad", 72, 8, 1)[-1], act=Activation("relu2")),
        GemmSpec("up_wgrad", 5, 72, 200, "bf16", possible("up_wgrad", 72, 5)[0], 2, interleaved=True),
        GemmSpec("down_wgrad_add", 5, 256, 200, "bf16", possible("down_wgrad_add", 256, 5, 1)[0]),
    ]


@pytest.mark.parametrize("spec", specs(), ids=lambda spec: f"{spec.variant}-{spec.tile.schedule}-{spec.tile.tile_n}")
def test_shared_memory_is_what_the_kernel_asks_for(spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cutlass")
    from sonicmoe.cute_kernels import assembly
    from sonicmoe.jit.compile import compile_spec
    from sonicmoe.jit.inspect import dynamic_shared_memory

    asked = dynamic_shared_memory(compile_spec(spec))
    kernel = assembly.kernel(spec)
    assert spec.tile.shared_memory(kernel.groups.table_size) == asked <= SHARED_MEMORY
    monkeypatch.setattr(tile_module, "SHARED_MEMORY", asked)
    assert spec.why_invalid() is None
    monkeypatch.setattr(tile_module, "SHARED_MEMORY", asked - 1)
    assert f"{asked} bytes of shared memory" in (spec.why_invalid() or "")


def spec(variant: str, n: int, k: int, halves: int = 1, **form: Any) -> GemmSpec:
    outs = outputs(variant, halves)
    return GemmSpec(variant, 256, n, k, "bf16", choose(variant, 256, n, k, outs, halves, "h200"), halves, **form)


@pytest.mark.parametrize(
    ("variant", "n", "k", "halves", "paced", "bands"),
    [
        # deepseek-v3.2: experts of which w1 takes 56 MiB, w2 28
        ("up_proj", 2048, 7168, 2, True, {16: 16, 17: 9}),
        ("down_proj", 7168, 2048, 1, False, {56: 14, 38: 13, 16: 16}),
        ("down_dgrad", 2048, 7168, 2, True, {8: 8}),
        ("up_dgrad", 7168, 4096, 1, True, {38: 13}),
        ("up_dgrad", 7168, 2048, 2, True, {38: 13}),  # w1 interleaved: the halves are reduced
        ("down_wgrad", 2048, 7168, 1, False, {56: 56}),
        ("up_wgrad_add", 4096, 7168, 1, False, {56: 56}),
        # Mixtral 8x7B
        ("up_proj", 14336, 4096, 2, True, {112: 16}),
        ("down_proj", 4096, 14336, 1, True, {22: 11}),
        ("up_dgrad", 4096, 28672, 1, True, {22: 11}),
        ("up_dgrad", 4096, 14336, 2, True, {22: 11}),
        # qwen3-235b
        ("up_proj", 1536, 4096, 2, True, {12: 12}),
        ("down_proj", 4096, 1536, 1, False, {22: 11}),
        ("up_dgrad", 4096, 3072, 1, False, {22: 11}),
        # small experts: 30B, olmoe, and the least k
        ("up_proj", 256, 4096, 2, True, {2: 2}),
        ("down_proj", 4096, 256, 1, False, {22: 22}),
        ("down_dgrad", 1024, 2048, 2, False, {4: 4}),
        ("down_dgrad", 504, 4096, 2, True, {17: 17}),
        ("up_proj", 504, 4088, 2, False, {4: 4}),
        ("up_dgrad", 2048, 2048, 2, True, {16: 16}),
    ],
)
def test_large_experts(variant: str, n: int, k: int, halves: int, paced: bool, bands: dict[int, int]) -> None:
    """Which GEMMs keep to one pace, and the n tiles of a band by those that there are."""
    act = SWIGLU if variant in ("up_proj", "down_dgrad") else None
    of = spec(variant, n, k, halves, act=act, interleaved=act is None and halves > 1)
    assert of.paced == paced and {tiles: of.band(tiles) for tiles in bands} == bands


@pytest.mark.parametrize("function", [route_token_rounding, MoE, RoundingSpec], ids=lambda f: f.__name__)
def test_token_rounding_rounds_to_the_tiles_of_the_gemms(function: Callable[..., object]) -> None:
    assert inspect.signature(function).parameters["tile_m"].default == TILE_M
    tiles = {tile.tile_m for variant in VARIANTS for tile in candidates(variant, 128, 1536, halves=1)}
    assert tiles == {TILE_M}
