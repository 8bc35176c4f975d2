"""Every grouped GEMM by every tile configuration that can be chosen, launched by its spec, against the reference.

Each compiled kernel runs all routings and several numbers of CTAs: from one that does all tiles to more than tiles.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from closeness import assert_as_good
from gemm_problems import DTYPES, Batch, over_h, problem, run, steps_of_a_cta
from torch import Tensor

from sonicmoe import jit, ops
from sonicmoe.activations import GPT_OSS, NAMES, Activation
from sonicmoe.configs.choice import candidates, tuned
from sonicmoe.configs.tile import TileConfig
from sonicmoe.cute_kernels.variants import PACED_K, GemmSpec, outputs
from sonicmoe.ops import _gemm

GROUPS = 6
# n, k: two tiles or more along n, along m of the weight gradients and along k; ragged: none of them whole
RAGGED, WHOLE, SMALLEST = (264, 136), (512, 256), (8, 8)
# Rows of each group, number of tokens.
ROUTINGS = {
    "ragged": ([0, 130, 1, 64, 0, 257], 150),
    "whole tiles": ([128, 256, 0, 128, 384, 128], 400),
    "one group takes all": ([0, 0, 0, 700, 0, 0], 700),
    "one token": ([1, 0, 0, 1, 1, 1], 1),
    "one row": ([0, 0, 0, 0, 0, 1], 1),
    "nothing": ([0] * GROUPS, 1),
}
CTAS = (132, 1, 2, 3)
# Of sums in fp32 that nobody rounds to 16 bits: another order of the terms and another exponential.
UNROUNDED = 1e-5
PLAIN, GATED = Activation("silu"), Activation("swiglu")
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
# Groups at which the table of tiles takes another KiB of shared memory, so that less is left for stages.
GROUP_COUNTS = (GROUPS, 128, 256, 384, 512, 768, 1024)


def judge(
    spec: GemmSpec, actual: dict[str, Tensor], yardstick: dict[str, Tensor], truth: dict[str, Tensor], rows: slice
) -> None:
    """Rows, or groups of a weight gradient, of all results."""
    assert actual.keys() == truth.keys()
    for name in actual:
        found, near, true = actual[name][rows], yardstick[name][rows], truth[name][rows]
        if name == "parts":
            found, near, true = (part.sum(1) for part in (found, near, true))
        if name == "parts" or spec.adds:
            assert_as_good(name, found, true * (1 + UNROUNDED), true, torch.float32)
        else:
            assert_as_good(name, found, near, true, DTYPES[spec.dtype])


def check(spec: GemmSpec, sizes: Sequence[int], tokens: int, ctas: tuple[int, ...] = CTAS) -> None:
    batch = Batch(sizes, tokens)
    given = problem(spec, batch)
    first = run(spec, batch, given, ctas[0])
    written = slice(0, spec.groups if "wgrad" in spec.variant else batch.rows)
    judge(spec, first, given.reference(DTYPES[spec.dtype]), given.reference(torch.float64), written)
    if spec.variant == "down_dgrad":
        assert all(torch.equal(t, first[name]) for name, t in run(spec, batch, over_h(given), ctas[0]).items())
    for count in ctas:
        again = run(spec, batch, given, count)
        assert all(torch.equal(again[name], first[name]) for name in first), f"another result by {count} CTAs"


def check_all(spec: GemmSpec) -> None:
    assert spec.why_invalid() is None
    for sizes, tokens in ROUTINGS.values():
        check(spec, sizes, tokens)


def forms(variant: str) -> list[dict[str, Any]]:
    """What of a spec decides which tile configurations there are."""
    if variant == "up_proj":
        acts = [{"halves": 1, "act": PLAIN}, {"halves": 2, "act": GATED}]
        return [{**act, "keep_h": keep} for act in acts for keep in (True, False)]
    if variant == "down_dgrad":
        return [{"halves": 1, "act": PLAIN}, {"halves": 2, "act": GATED}]
    return [{}]


def tiles(variant: str, form: dict[str, Any], groups: tuple[int, ...] = GROUP_COUNTS) -> list[TileConfig]:
    """All that can be chosen, for these numbers of groups."""
    halves = form.get("halves", 1)
    outs = outputs(variant, halves, form.get("keep_h", True))
    found = [t for g in groups for t in candidates(variant, g, WHOLE[0], halves)]
    for gpu in ("h100", "h200"):
        found += [t for key, t in tuned(gpu).items() if (key[0], *key[3:]) == (variant, halves, outs)]
    return list(dict.fromkeys(found))


def best(variant: str, size: tuple[int, int], dtype: str = "bf16", groups: int = GROUPS, **form: Any) -> GemmSpec:
    found = candidates(variant, groups, size[0], form.get("halves", 1))
    return GemmSpec(variant, groups, *size, dtype, found[0], **form)


def of_each_schedule(spec: GemmSpec) -> list[GemmSpec]:
    """With the best tile of each, alone and in clusters: epilogue or operands are another one."""
    found = candidates(spec.variant, spec.groups, spec.n, spec.halves)
    return [replace(spec, tile=tile) for tile in {(t.schedule, t.cluster): t for t in reversed(found)}.values()]


def configurations() -> Iterator[GemmSpec]:
    for variant in VARIANTS:
        for form in forms(variant):
            for tile in tiles(variant, form):
                yield GemmSpec(variant, GROUPS, *RAGGED, "bf16", tile, **form)


def label(value: Any) -> str:
    if not isinstance(value, GemmSpec):
        return str(value)
    t = value.tile
    kept = "" if value.keep_h else "-without_h"
    shared = f"-cluster{t.cluster}" if t.cluster > 1 else ""
    return f"{value.variant}{kept}-x{value.halves}-{t.schedule}-{t.tile_n}-{t.stages}-{t.buffers}{shared}-{value.dtype}"


@pytest.mark.parametrize("spec", list(configurations()), ids=label)
def test_every_configuration(spec: GemmSpec) -> None:
    check_all(spec)


@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_tiles(variant: str) -> None:
    form = forms(variant)[-1]
    check_all(best(variant, WHOLE, "fp16", **form))
    for tile in {t.tile_n: t for t in tiles(variant, form, (GROUPS,))}.values():
        check_all(GemmSpec(variant, GROUPS, *WHOLE, "bf16", tile, **form))


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_k_step_and_one_chunk_of_columns(variant: str) -> None:
    for form in forms(variant):
        check_all(best(variant, SMALLEST, "fp16", **form))


CLAMPED = replace(GPT_OSS, limit=0.8)


@pytest.mark.parametrize(
    ("act", "dtype"),
    [
        *((act, "fp16") for act in (*map(Activation, NAMES), GPT_OSS, CLAMPED)),
        # Those that take another way in bf16.
        *((act, "bf16") for act in (PLAIN, GATED, CLAMPED)),
    ],
    ids=str,
)
def test_activations(act: Activation, dtype: str) -> None:
    for variant in ("up_proj", "down_dgrad"):
        # Of down_dgrad a bias leaves a part that another kernel writes.
        best_of_all = best(variant, RAGGED, dtype, halves=2 if act.gated else 1, act=act, bias=True)
        for spec in of_each_schedule(best_of_all):
            check(spec, *ROUTINGS["ragged"], (132, 1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("keep_h", [False, True])
def test_interleaved_weights_in(bias: bool, keep_h: bool) -> None:
    for size in (RAGGED, WHOLE):
        check_all(best("up_proj", size, halves=2, act=GATED, interleaved=True, bias=bias, keep_h=keep_h))


@pytest.mark.parametrize("variant", ["up_dgrad", "up_wgrad", "up_wgrad_add"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_halves_apart(variant: str, interleaved: bool) -> None:
    """Each half's tail ends at the half: nothing of up is read or written as gate's."""
    for size in (RAGGED, (72, 200), WHOLE):
        check_all(best(variant, size, halves=2, interleaved=interleaved))


def test_bias_out() -> None:
    for size in (RAGGED, SMALLEST):
        for spec in of_each_schedule(best("down_proj", size, bias=True)):
            check_all(spec)


@pytest.mark.parametrize(
    ("variant", "groups"), [*itertools.product(VARIANTS[:4], (1, 33, 1000)), ("down_wgrad", 33), ("up_wgrad", 1000)]
)
def test_numbers_of_groups(variant: str, groups: int) -> None:
    sizes = [300] if groups == 1 else [0 if g % 3 else (41 * g) % 200 for g in range(groups)]
    check(best(variant, (64, 72), groups=groups, **forms(variant)[-1]), sizes, 500, (132, 7))


MANY = [300, 0, 1, 1000, 64, 129]


@pytest.mark.parametrize("variant", VARIANTS[:4])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_bands(variant: str, dtype: str) -> None:
    """More n tiles than a band has, and the last band narrower."""
    form = forms(variant)[-1]
    spec = best(variant, (2376 if variant == "up_proj" else 4744, 1160), dtype, **form)
    groups = spec.build()[0].groups
    assert groups.band < groups.n_tiles and groups.n_tiles % groups.band
    check(spec, MANY, 700, (132, 3))


def paced() -> Iterator[GemmSpec]:
    for variant in VARIANTS[:4]:
        yield from of_each_schedule(best(variant, (2056, PACED_K + 72), **forms(variant)[-1]))


@pytest.mark.parametrize("spec", list(paced()), ids=label)
def test_ctas_at_one_pace(spec: GemmSpec) -> None:
    """Also with a counter that begins 30 steps a CTA too low, so that all rest, and with one so low that none does."""
    assert spec.paced
    check(spec, MANY, 700, (132, 5))
    batch = Batch(MANY, 700)
    given = problem(spec, batch)
    usual = run(spec, batch, given, 132)
    for count in (-30 * 132, -(1 << 30)):
        found = run(spec, batch, given, 132, count)
        assert all(torch.equal(found[name], usual[name]) for name in usual)


@pytest.mark.parametrize("variant", VARIANTS[:4])
def test_few_rows_at_one_pace(variant: str) -> None:
    check(best(variant, (2056, PACED_K + 72), **forms(variant)[-1]), *ROUTINGS["one token"], (132, 2))


def test_each_replay_counts_from_zero() -> None:
    """Of an op whose GEMM keeps to one pace, captured in a graph."""
    inter, hidden, batch = 1200, 7168, Batch([200, 100], 150)
    x = torch.randn(batch.tokens + 1, hidden, device="cuda", dtype=torch.bfloat16)
    w1 = torch.randn(2, 2 * inter, hidden, device="cuda", dtype=torch.bfloat16).div_(hidden**0.5)
    spec = _gemm.spec_of(0, "up_proj", 2, inter, hidden, "bf16", "swiglu", False, 2)
    counters: list[Tensor] = []

    def kernel(*arguments: Any) -> None:
        counters.append(arguments[4])
        jit.launch(spec, *arguments)

    def call() -> tuple[Tensor, Tensor]:
        return ops.up_proj(x, w1, None, batch.cu_rows, batch.row_token, "swiglu", "concat", True, "cute")

    expected, graph = call(), torch.cuda.CUDAGraph()
    with _gemm.replaced("up_proj", kernel, spec.paced), torch.cuda.graph(graph):
        found = call()
    sms = _gemm.processors(0)
    for _ in range(3):
        for t in found:
            t.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(f[: batch.rows], e[: batch.rows]) for f, e in zip(found, expected, strict=True))
        assert counters[0].tolist() == [sms * steps_of_a_cta(spec, batch, sms)]


@pytest.mark.parametrize(("variant", "buffers"), [("up_proj", 1), ("up_proj", 3), ("down_dgrad", 0), ("down_dgrad", 3)])
def test_configurations_that_are_not_chosen(variant: str, buffers: int) -> None:
    tile = TileConfig("cooperative", 128, stages=3, buffers=buffers)
    check_all(GemmSpec(variant, GROUPS, *RAGGED, "bf16", tile, act=PLAIN))


@pytest.mark.parametrize(
    ("variant", "halves"),
    [("down_wgrad", 1), ("down_wgrad_add", 1), ("up_wgrad", 1), ("up_wgrad", 2), ("up_wgrad_add", 2)],
)
def test_clusters_with_an_odd_number_of_m_tiles(variant: str, halves: int) -> None:
    for n, k in ((384, 384), (72, 136), SMALLEST):
        tile = next(t for t in tiles(variant, {}) if t.cluster == 2)
        check_all(GemmSpec(variant, GROUPS, n, k, "bf16", tile, halves=halves, interleaved=halves == 2))


# Rows of WIDE elements: the row FAR begins past 2^31 elements, that is 2^32 bytes.
WIDE = 8192
FAR = (1 << 31) // WIDE
LAST = 300


@pytest.fixture
def all_memory() -> Iterator[None]:
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


def large_rows() -> list[GemmSpec]:
    found = [
        best("up_proj", (WIDE, 64), groups=2, act=PLAIN),
        best("down_proj", (WIDE, 64), groups=2),
        best("down_dgrad", (WIDE, 64), groups=2, act=PLAIN),
        best("down_dgrad", (WIDE // 2, 64), groups=2, act=GATED, halves=2),
        best("up_dgrad", (64, WIDE), groups=2),
        best("down_wgrad", (WIDE, 64), groups=2),
        best("up_wgrad", (WIDE, 64), groups=2),
        best("up_wgrad", (WIDE // 2, 64), groups=2, halves=2, interleaved=True),
    ]
    return [spec for first in found for spec in of_each_schedule(first)]


@pytest.mark.parametrize("spec", large_rows(), ids=label)
def test_large_rows(spec: GemmSpec, all_memory: None) -> None:
    """The second group's rows lie past 2^31 elements of h, a, y, dh or a_s; dh also in the place of h."""
    batch = Batch((FAR, LAST), tokens=500)
    given = problem(spec, batch)
    actual = run(spec, batch, given, 132)
    last = slice(1, 2) if "wgrad" in spec.variant else slice(FAR, FAR + LAST)
    if spec.variant == "down_dgrad":
        in_place = run(spec, batch, over_h(given), 132)
        assert all(torch.equal(in_place[name][last], t[last]) for name, t in actual.items())
        del in_place
    batch.cu_rows = torch.tensor([FAR, FAR, FAR + LAST])  # for the reference: the second group alone
    judge(spec, actual, given.reference(DTYPES[spec.dtype]), given.reference(torch.float32), last)


def large_gathered() -> list[GemmSpec]:
    variants = ("up_proj", "down_dgrad", "down_wgrad", "down_wgrad_add", "up_wgrad", "up_wgrad_add")
    found = [best(variant, (64, WIDE), groups=2, **forms(variant)[-1]) for variant in variants]
    return [spec for first in found for spec in of_each_schedule(first)]


@pytest.mark.parametrize("spec", large_gathered(), ids=label)
def test_large_gathered(spec: GemmSpec, all_memory: None) -> None:
    """A third of the tokens lies past 2^31 elements."""
    batch = Batch((LAST, 50), tokens=FAR + FAR // 2)
    assert int((batch.row_token[: batch.rows] > FAR).sum()) > batch.rows // 5
    given = problem(spec, batch)
    actual = run(spec, batch, given, 132)
    written = slice(0, 2 if "wgrad" in spec.variant else batch.rows)
    judge(spec, actual, given.reference(DTYPES[spec.dtype]), given.reference(torch.float32), written)


def large_weights() -> list[GemmSpec]:
    k = 1024
    groups = (1 << 31) // (WIDE * k) + 1
    form = {"up_proj": {"act": PLAIN, "keep_h": False}, "down_dgrad": {"act": PLAIN}}
    found = [best(variant, (WIDE, k), groups=groups, **form.get(variant, {})) for variant in VARIANTS]
    return [spec for first in found for spec in of_each_schedule(first)]


@pytest.mark.parametrize("spec", large_weights(), ids=label)
def test_large_weights(spec: GemmSpec, all_memory: None) -> None:
    """The last group's weight, or its gradient, lies past 2^31 elements."""
    batch = Batch([0] * (spec.groups - 1) + [LAST], tokens=500)
    given = problem(spec, batch)
    actual = run(spec, batch, given, 132)
    last = slice(spec.groups - 1, spec.groups) if "wgrad" in spec.variant else slice(0, LAST)
    truth = {name: t[last].clone() for name, t in given.reference(torch.float32).items()}
    yardstick = {name: t[last] for name, t in given.reference(DTYPES[spec.dtype]).items()}
    judge(spec, {name: t[last] for name, t in actual.items()}, yardstick, truth, slice(None))
