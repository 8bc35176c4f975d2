"""Tables and plots from the ledger: `python -m perf.report`. Nothing in them is typed by hand.

A file that has `<!-- perf:begin NAME -->` and `<!-- perf:end NAME -->` on lines of their own gets the table NAME
between them, or for `plot-NAME` a link to the plot. Without rows for it, the text says so.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from perf import commandline, ledger, plots, quality, roofline, scaling, shapes, tables
from perf.environment import ROOT
from perf.ledger import Row
from sonicmoe import InvalidArgument

FILES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("perf", "integrations", "routing")))
PLOTS = ROOT / "docs" / "plots"
BREAKDOWN = "breakdown-"
_PARTS = (*roofline.PARTS, "router-products", "rest")
_MARKS = re.compile(r"^<!-- perf:begin ([\w-]+) -->\n(.*?)^<!-- perf:end \1 -->$", re.MULTILINE | re.DOTALL)
_ORDER = {name: position for position, name in enumerate(shapes.SHAPES)}


def _base(shape: str) -> str:
    return shape.partition("@")[0]


def _sorted(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda r: (_ORDER.get(_base(r.shape), len(_ORDER)), r.T, r.H, r.I, r.E, r.K))


def _peers(rows: Iterable[Row]) -> list[str]:
    """Implementations in the order of columns: ours first, the bound last."""
    names = {r.impl for r in rows}
    rank = {"sonicmoe": 0, "sonicmoe.MoE": 1, "cublas": 3}
    return sorted(names, key=lambda name: (rank.get(name, 2), name))


def _shape_cells(row: Row) -> list[str]:
    return [row.shape or "-", f"({row.T}, {row.H}, {row.I}, {row.E}, {row.K})"]


def _time(ms: float | None) -> str:
    """Milliseconds to four digits at most."""
    return "-" if ms is None else f"{ms:.3f}" if ms < 10 else f"{ms:.2f}"


def _pair(first: float | None, second: float | None) -> str:
    return "-" if first is None and second is None else f"{_time(first)} / {_time(second)}"


def layers(rows: Sequence[Row]) -> str | None:
    """Whole layers, router included: forward / forward+backward in ms of every implementation, and our speed."""
    mine = [r for r in ledger.layers_side_by_side(rows, ("forward", "both")) if "@" not in r.shape]
    impls = _peers(mine)
    lines = []
    for row in _sorted({(r.shape, r.dtype): r for r in mine if r.impl == "sonicmoe"}.values()):
        of_shape = {(r.impl, r.variant): r for r in mine if r.subject[1:] == row.subject[1:]}
        lines.append([*_shape_cells(row), *_layer_cells(of_shape, impls)])
    header = ["shape", "(T, H, I, E, K)", *impls, "TFLOP/s", "over best peer", "of cuBLAS bound"]
    return tables.markdown(header, lines) if lines else None


def _layer_cells(of_shape: dict[tuple[str, str], Row], impls: Sequence[str]) -> list[str]:
    def ms(impl: str, variant: str) -> float | None:
        row = of_shape.get((impl, variant))
        return row.ms_p50 if row else None

    times = [_pair(ms(impl, "forward"), ms(impl, "both")) for impl in impls]
    ours = of_shape.get(("sonicmoe", "both"))
    speed = tables.cell(ours.tflops if ours else None, 3)
    return [*times, speed, _over_best(of_shape.values(), "both"), _of_bound(of_shape.values())]


def _of_bound(of_shape: Iterable[Row]) -> str:
    """Our share of the speed of cuBLAS' six products, forward and backward."""
    speed = {r.impl: r.tflops for r in of_shape if r.variant == "both"}
    ours, bound = speed.get("sonicmoe"), speed.get("cublas")
    return tables.percent(ours / bound) if ours and bound else "-"


def _over_best(of_shape: Iterable[Row], variant: str) -> str:
    """How much faster sonicmoe is than the fastest peer; the bound is none."""
    ms = {r.impl: r.ms_p50 for r in of_shape if r.variant == variant and r.ms_p50}
    rivals = [t for impl, t in ms.items() if not impl.startswith(("sonicmoe", "cublas"))]
    return f"{min(rivals) / ms['sonicmoe']:.2f}x" if rivals and "sonicmoe" in ms else "-"


def tokens(rows: Sequence[Row]) -> str | None:
    """The 7B layer with other numbers of tokens, forward and backward: device time, and from an idle GPU."""
    mine = [r for r in ledger.layers_side_by_side(rows, ("both", "both-from-idle")) if _base(r.shape) == "7b"]
    impls = [impl for impl in _peers(mine) if impl != "cublas"]
    lines = []
    for count in sorted({r.T for r in mine}):
        here = [r for r in mine if count == r.T]
        ms = {(r.impl, r.variant): r.ms_p50 for r in here}
        times = [_pair(*(ms.get((impl, variant)) for variant in ("both", "both-from-idle"))) for impl in impls]
        device = ms.get(("sonicmoe", "both"))
        per_token = tables.cell(1e6 * device / count if device else None, 3)
        over = [_over_best(here, variant) for variant in ("both", "both-from-idle")]
        lines.append([str(count), *times, per_token, *over, _of_bound(here)])
    header = ["T", *impls, "ns per token", "over best peer", "from idle", "of cuBLAS bound"]
    return tables.markdown(header, lines) if len(lines) > 1 else None


def experts(rows: Sequence[Row]) -> str | None:
    """Backward of the experts alone against the four products by cuBLAS."""
    found = {(r.subject, r.impl): r for r in ledger.experts_side_by_side(rows)}
    lines = []
    for row in _sorted(r for (_, impl), r in found.items() if impl == "sonicmoe"):
        bound = found.get((row.subject, "cublas"))
        if bound and bound.tflops and row.tflops:
            share = tables.percent(row.tflops / bound.tflops)
            lines.append([*_shape_cells(row), _time(row.ms_p50), _time(bound.ms_p50), share])
    header = ["shape", "(T, H, I, E, K)", "sonicmoe", "cublas", "of cuBLAS bound"]
    return tables.markdown(header, lines) if lines else None


def kernels(rows: Sequence[Row]) -> str | None:
    """Each kernel: time, TFLOP/s, GB/s, share of cuBLAS (aggregate: of a copy) and of the floor."""
    mine = [r for r in rows if r.impl == "sonicmoe" and r.variant in roofline.KERNELS and r.routing == "topk"]
    mine = ledger.newest(mine)
    lines = [
        [
            *_shape_cells(r),
            r.variant,
            tables.cell(r.ms_p50, 4),
            tables.cell(r.tflops, 3),
            tables.cell(r.gbps, 4),
            tables.percent(r.of_bound),
            tables.percent(r.roofline),
        ]
        for r in sorted(_sorted(mine), key=lambda r: (_ORDER.get(r.shape, 99), roofline.KERNELS.index(r.variant)))
    ]
    header = ["shape", "(T, H, I, E, K)", "kernel", "ms", "TFLOP/s", "GB/s", "of cuBLAS or copy", "of floor"]
    return tables.markdown(header, lines) if lines else None


def memory(rows: Sequence[Row]) -> str | None:
    """Kept from forward to backward, and peak, in MiB."""
    mine = ledger.newest(r for r in rows if r.variant == "memory" and r.routing == "topk" and "@" not in r.shape)
    by = {(r.shape, r.impl): r for r in mine}
    impls = _peers(mine)
    lines = []
    for row in _sorted(r for r in mine if r.impl == "sonicmoe"):
        cells = []
        for impl in impls:
            r = by.get((row.shape, impl))
            cells.append(f"{tables.cell(r and r.saved_mib, 4)} / {tables.cell(r and r.peak_mib, 5)}")
        paper = f"{tables.cell(row.bound_mib, 4)} / {tables.cell(row.peak_bound_mib, 5)}"
        lines.append([*_shape_cells(row), *cells, paper])
    header = ["shape", "(T, H, I, E, K)", *(f"{i}: kept / peak MiB" for i in impls), "paper: kept / peak"]
    return tables.markdown(header, lines) if lines else None


def router(rows: Sequence[Row]) -> str | None:
    """The router's kernels against torch's, in µs."""
    mine = ledger.side_by_side(
        (r for r in rows if r.variant.startswith("router-")), lambda r: r.impl.startswith("sonicmoe")
    )
    by = {(r.shape, r.variant, r.impl): r for r in mine}
    lines = []
    for row in _sorted(r for r in mine if r.impl == "sonicmoe"):
        other = by.get((row.shape, row.variant, "torch"))
        ours_ms, other_ms = row.ms_p50, other.ms_p50 if other else None
        lines.append(
            [
                row.shape,
                f"({row.T}, {row.E}, {row.K})",
                row.variant.removeprefix("router-"),
                tables.cell(1e3 * ours_ms if ours_ms else None, 4),
                tables.cell(1e3 * other_ms if other_ms else None, 4),
                f"{other_ms / ours_ms:.1f}x" if ours_ms and other_ms else "-",
            ]
        )
    header = ["shape", "(T, E, K)", "step", "µs", "torch µs", "faster"]
    return tables.markdown(header, lines) if lines else None


def host(rows: Sequence[Row]) -> str | None:
    """Host time per call and first calls."""
    kinds = ("first-call", "new-token-count")
    mine = ledger.newest(r for r in rows if r.host_us is not None or r.variant.startswith(kinds))
    lines = [[r.shape, r.impl, r.variant, _host_time(r)] for r in _sorted(mine)]
    return tables.markdown(["shape", "implementation", "what", "time"], lines) if lines else None


def _host_time(row: Row) -> str:
    if row.host_us is not None:
        return f"{row.host_us:.0f} µs"
    more = "" if row.setup_s is None else f", {1e3 * row.setup_s:.0f} more than the second"
    return f"{row.ms_p50 or 0:.0f} ms{more}"


def breakdown(rows: Sequence[Row]) -> str | None:
    """Shares of forward and backward of sonicmoe.MoE, measured inside it."""
    mine = ledger.newest(r for r in rows if r.variant.startswith(BREAKDOWN) and r.routing == "topk")
    ms = {(r.shape, r.variant.removeprefix(BREAKDOWN)): r.ms_p50 for r in mine}
    lines = []
    for row in _sorted(r for r in mine if r.variant == f"{BREAKDOWN}layer"):
        whole = row.ms_p50 or float("nan")
        found = (ms.get((row.shape, part)) for part in _PARTS)
        lines.append([row.shape, _time(whole), *(tables.percent(t / whole if t else None) for t in found)])
    return tables.markdown(["shape", "ms", *_PARTS], lines) if lines else None


def rounding(rows: Sequence[Row]) -> str | None:
    """Token rounding against top-K, the experts alone."""
    mine = ledger.rounding_side_by_side(rows)
    by = {(r.shape, r.variant, r.routing): r for r in mine}
    lines = []
    for row in _sorted({r.shape: r for r in mine if r.routing == "token_rounding"}.values()):
        variants = ("forward", "backward", "both")
        cells = [_gain(*(by.get((row.shape, v, routing)) for routing in ("topk", "token_rounding"))) for v in variants]
        lines.append([row.shape, f"({row.T}, {row.H}, {row.I}, {row.E}, {row.K})", f"1/{row.E // row.K}", *cells])
    header = ["shape", "(T, H, I, E, K)", "K/E", "forward ms (TFLOP/s)", "backward", "both"]
    return tables.markdown(header, lines) if lines else None


def _gain(plain: Row | None, rounded: Row | None) -> str:
    if not (plain and rounded and plain.tflops and rounded.tflops):
        return "-"
    gain = 100 * (rounded.tflops / plain.tflops - 1)
    return f"{_time(plain.ms_p50)} → {_time(rounded.ms_p50)} ({gain:+.1f}%)"


def _is_in_a_table(row: Row) -> bool:
    """Not a part of the breakdown that has since become another's."""
    return not row.variant.startswith(BREAKDOWN) or row.variant.removeprefix(BREAKDOWN) in ("layer", *_PARTS)


def provenance(rows: Sequence[Row]) -> str | None:
    """What the tables were measured on."""
    seen: dict[tuple[str, ...], list[str]] = {}
    for r in ledger.newest(r for r in rows if _is_in_a_table(r)):
        seen.setdefault((r.gpu, r.driver, r.torch, r.dsl, r.commit), []).append(r.date)
    lines = [[*key, f"{min(dates)[:10]}", str(len(dates))] for key, dates in seen.items()]
    return tables.markdown(["GPU", "driver", "torch", "CuTe DSL", "commit", "date", "rows"], lines) if lines else None


TABLES: dict[str, Callable[[Sequence[Row]], str | None]] = {
    "layers": layers,
    "experts": experts,
    "kernels": kernels,
    "memory": memory,
    "router": router,
    "host": host,
    "breakdown": breakdown,
    "tokens": tokens,
    "rounding": rounding,
    "scaling": scaling.scaling,
    "provenance": provenance,
}


def filled(
    text: str, rows: Sequence[Row], gpu: str, images: Mapping[str, str] | None = None, losses: str | None = None
) -> str:
    """The text with every marked table and plot written anew; images: where each plot is, from the text's folder;
    losses: the table "quality".

    Raises ValueError for a name that is no table's and no plot's.
    """
    others = {"quality": losses}
    for name, (draw, _) in plots.PLOTS.items():
        place = (images or {}).get(name)
        others[f"plot-{name}"] = place and f"![{(draw.__doc__ or name).strip()}]({place})"

    def body(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES and name not in others:
            raise ValueError(f"perf:begin {name}: no such table or plot, only {', '.join([*TABLES, *others])}")
        made = TABLES[name](rows) if name in TABLES else others[name]
        return f"<!-- perf:begin {name} -->\n{made or f'Not measured on {gpu} yet.'}\n<!-- perf:end {name} -->"

    return _MARKS.sub(body, text)


def most_measured(rows: Iterable[Row]) -> str:
    """The GPU with the most measurements."""
    counts = Counter(gpu for gpu, _ in {(r.gpu, r.key) for r in rows})
    return max(counts, key=lambda gpu: counts[gpu]) if counts else "a GPU"


def chosen_rows(path: Path, gpu: str | None) -> tuple[str, list[Row]]:
    """The GPU, and its rows that tables show. Raises InvalidArgument without any: what was published would be lost."""
    read = commandline.read_ledger(path)
    rows = [r for r in read if r.gpu != "cpu" or gpu == "cpu"]
    name = gpu or most_measured(rows)
    mine = ledger.usual(r for r in rows if r.gpu == name)
    if not mine:
        measured = ", ".join(sorted({r.gpu for r in read})) or "there is none"
        raise InvalidArgument("gpu", repr(name), f"one that {path} has rows of which tables show: {measured}")
    return name, mine


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m perf.report", description="Tables and plots from the ledger.")
    p.add_argument("--ledger", type=Path, default=ledger.RESULTS)
    p.add_argument("--gpu", help="default: the one with the most measurements")
    p.add_argument("--files", type=Path, nargs="*", default=FILES, help="to write tables into")
    p.add_argument("--plots", type=Path, default=PLOTS, help="folder of the PNG and SVG")
    p.add_argument("--check", action="store_true", help="write nothing; exit 1 if a table is not as the ledger says")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    a, (gpu, mine) = commandline.parsed(parser(), arguments, lambda a: chosen_rows(a.ledger, a.gpu))
    drawn = [] if a.check else plots.draw_all(mine, a.plots, gpu)
    losses, stale = quality.losses(quality.read(a.ledger, gpu)), []
    for path in a.files:
        if not path.exists():
            continue
        text = path.read_text()
        known = [name for name in plots.PLOTS if (a.plots / f"{name}.png").exists()]
        images = {name: Path(os.path.relpath(a.plots / f"{name}.png", path.parent)).as_posix() for name in known}
        new = filled(text, mine, gpu, images, losses)
        if new != text:
            stale.append(path)
            if not a.check:
                path.write_text(new)
    if a.check:
        for path in stale:
            print(f"{path} is not what the ledger says: python -m perf.report", file=sys.stderr)
        return 1 if stale else 0
    print(f"{len(mine)} rows of {gpu}; wrote {len(stale)} files and {len(drawn)} plots")
    return 0


if __name__ == "__main__":
    sys.exit(main())
