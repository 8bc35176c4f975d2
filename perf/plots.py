"""Plots from the ledger, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from perf import ledger, roofline, shapes
from perf.ledger import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "sonicmoe": "#0b6e4f",
    "sonicmoe.MoE": "#63a088",
    "cublas": "#222222",
    "scattermoe": "#d1495b",
    "grouped_mm": "#edae49",
    "grouped_mm-compiled": "#b97a1f",
    "transformers-grouped_mm": "#7b5ea7",
    "loop": "#30638e",
}
_RANK = {name: position for position, name in enumerate(COLOURS)}
_OTHERS = ("#c08497", "#5b8e7d", "#8a6d3b", "#4f5d75")
_KERNELS = ("#0b6e4f", "#3a9679", "#9fd8c0", "#7a3b69", "#a5668b", "#c98bb9", "#30638e", "#8fb8de")
SIZES = ("1.4b", "7b", "30b", "120b")
DPI = 130
PNG_COLOURS = 64  # edges stay smooth, and the files small


def _colour(impl: str) -> str:
    return COLOURS.get(impl, _OTHERS[sum(map(ord, impl)) % len(_OTHERS)])


def _impls(rows: Iterable[Row]) -> list[str]:
    return sorted({r.impl for r in rows}, key=lambda name: (_RANK.get(name, 99), name))


def _grid(ax: Axes, axis: Literal["both", "y"] = "y") -> None:
    ax.grid(axis=axis, color="#e4e4e4", lw=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _powers_of_two(ax: Axes, ticks: Iterable[float], label: Callable[[float], str]) -> None:
    """A logarithmic x axis with these ticks alone."""
    chosen = sorted(set(ticks))
    ax.set_xscale("log", base=2)
    ax.set_xticks(chosen, [label(t) for t in chosen])
    ax.minorticks_off()


def throughput(rows: Sequence[Row], figure: Figure) -> bool:
    """Model TFLOP/s of a layer with its router, forward and backward, against peers and the cuBLAS bound."""
    mine = [r for r in ledger.layers_side_by_side(rows, ("both",)) if "@" not in r.shape and r.tflops]
    value = {(r.shape, r.impl): r.tflops or 0.0 for r in mine}
    names = [name for name in shapes.SHAPES if (name, "sonicmoe") in value]
    bars = [i for i in _impls(r for r in mine if r.shape in names) if i not in ("cublas", "sonicmoe.MoE")]
    if not names:
        return False
    ax = figure.subplots()
    width = 0.84 / len(bars)
    for b, impl in enumerate(bars):
        at = [n + (b - (len(bars) - 1) / 2) * width for n in range(len(names))]
        ax.bar(at, [value.get((name, impl), 0.0) for name in names], 0.94 * width, color=_colour(impl), label=impl)
    bounds = [(n, value[name, "cublas"]) for n, name in enumerate(names) if (name, "cublas") in value]
    for n, height in bounds:
        label = "cuBLAS bound" if n == bounds[0][0] else None
        ax.plot([n - 0.46, n + 0.46], [height, height], color=COLOURS["cublas"], lw=1.4, label=label)
    for n, name in enumerate(names):
        peers = [value[name, b] for b in bars[1:] if (name, b) in value]
        if peers and bars[0] == "sonicmoe":
            speed, x = value[name, "sonicmoe"], n - (len(bars) - 1) / 2 * width
            text = f"{speed / max(peers):.1f}x"
            ax.text(x, speed / 2, text, ha="center", va="center", rotation=90, color="white", fontsize=6)
    ax.set_xticks(range(len(names)), names, rotation=30, ha="right")
    ax.set_xlim(-0.6, len(names) - 0.4)
    ax.set_ylabel("model TFLOP/s")
    _grid(ax)
    figure.legend(loc="outside upper center", ncols=len(bars) + 1, frameon=False)
    return True


def memory(rows: Sequence[Row], figure: Figure) -> bool:
    """What is kept from forward to backward against granularity, at constant FLOPs."""
    known = {s.name for s in (*shapes.TWELVE, *shapes.FINE)}
    mine = ledger.newest(r for r in rows if r.variant == "memory" and r.saved_mib and r.routing == "topk")
    mine = [r for r in mine if r.shape in known]
    sizes = [size for size in SIZES if any(r.shape.split("-")[0] == size for r in mine)]
    if not sizes:
        return False
    panels = figure.subplots(1, len(sizes), squeeze=False)[0]
    for ax, size in zip(panels, sizes, strict=True):
        here = [r for r in mine if r.shape.split("-")[0] == size]
        for impl in _impls(here):
            points = sorted((r.H / r.I, (r.saved_mib or 0.0) / 1024) for r in here if r.impl == impl)
            x, y = zip(*points, strict=True)
            ax.plot(x, y, marker="o", ms=4, color=_colour(impl), label=impl)
        _powers_of_two(ax, (r.H / r.I for r in here), lambda g: f"{g:g}")
        ax.set_ylim(bottom=0)
        ax.set_title(f"{size}, H = {here[0].H}", fontsize=9)
        ax.set_xlabel("granularity H / I")
        _grid(ax)
    panels[0].set_ylabel("GiB kept")
    _legend_of_panels(figure, panels)
    return True


def _legend_of_panels(figure: Figure, panels: Iterable[Axes]) -> None:
    """One legend for all panels, each name once."""
    handles: dict[str, Any] = {}
    for ax in panels:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    names = [name for name in _RANK if name in handles] + [name for name in handles if name not in _RANK]
    figure.legend([handles[n] for n in names], names, loc="outside upper center", ncols=len(names), frameon=False)


def tokens(rows: Sequence[Row], figure: Figure) -> bool:
    """Time per token of a 7B layer against the number of tokens, forward and backward with router."""
    base = shapes.SHAPES["7b"]
    mine = ledger.layers_side_by_side(rows, ("both",))
    mine = [r for r in mine if (r.H, r.I, r.E, r.K) == base.thiek[1:] and r.ms_p50]
    lines = {i: sorted((r.T, 1e6 * (r.ms_p50 or 0.0) / r.T) for r in mine if r.impl == i) for i in _impls(mine)}
    lines = {impl: points for impl, points in lines.items() if len(points) > 1}
    if "sonicmoe" not in lines:
        return False
    ax = figure.subplots()
    for impl, points in lines.items():
        x, y = zip(*points, strict=True)
        label, style = ("cuBLAS bound", "--") if impl == "cublas" else (impl, "-")
        ax.plot(x, y, style, marker="o", ms=4, color=_colour(impl), label=label)
    powers = [2**p for p in range(24) if min(r.T for r in mine) <= 2**p <= max(r.T for r in mine)]
    _powers_of_two(ax, powers, lambda t: f"{t:g}" if t < 1024 else f"{t / 1024:g}k")
    ax.set_yscale("log")
    ticks = [t for t in (20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000) if _within(t, ax.get_ylim())]
    ax.set_yticks(ticks, [str(t) for t in ticks])
    ax.minorticks_off()
    ax.set_xlabel("tokens")
    ax.set_ylabel("ns per token")
    _grid(ax, "both")
    ax.legend(frameon=False)
    return True


def _within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


def breakdown(rows: Sequence[Row], figure: Figure) -> bool:
    """Share of each kernel in the time of the eight; the line below it, and the number: its floor by the roofline."""
    mine = ledger.newest(r for r in rows if r.impl == "sonicmoe" and r.routing == "topk" and r.ms_p50)
    by = {(r.shape, r.variant): r for r in mine if r.variant in roofline.KERNELS}
    names = [s.name for s in reversed(shapes.MAIN) if all((s.name, k) in by for k in roofline.KERNELS)]
    if not names:
        return False
    ax = figure.subplots()
    totals = {name: sum(by[name, k].ms_p50 or 0.0 for k in roofline.KERNELS) for name in names}
    for n, name in enumerate(names):
        left = 0.0
        for kernel, colour in zip(roofline.KERNELS, _KERNELS, strict=True):
            row = by[name, kernel]
            share = 100 * (row.ms_p50 or 0.0) / totals[name]
            ax.barh(n, share, 0.6, left=left, color=colour, label=kernel if n == 0 else None)
            if row.roofline:
                ax.plot([left + 0.15, left + share * row.roofline], [n - 0.37] * 2, color="black", lw=2.4)
                dark = sum(int(colour[i : i + 2], 16) for i in (1, 3, 5)) < 420
                text = f"{100 * row.roofline:.0f}%"
                ax.text(left + share / 2, n, text, ha="center", va="center", color="white" if dark else "black")
            left += share
    ax.set_yticks(range(len(names)), [f"{name}\n{totals[name]:.2f} ms" for name in names])
    ax.set_xlim(0, 100)
    ax.set_xlabel("% of the eight kernels' time")
    ax.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return True


def rounding(rows: Sequence[Row], figure: Figure) -> bool:
    """TFLOP/s of the experts with token rounding over those with top-K, against K/E."""
    mine = ledger.rounding_side_by_side(rows)
    speed = {(r.shape, r.variant, r.routing): r.tflops for r in mine if r.tflops}
    lines: dict[str, dict[tuple[int, int], list[tuple[float, float]]]] = {}
    for variant in ("forward", "backward", "both"):
        for shape in shapes.TOKEN_ROUNDING:
            plain, rounded = (speed.get((shape.name, variant, routing)) for routing in ("topk", "token_rounding"))
            if plain and rounded:
                of_variant = lines.setdefault(variant, {})
                point = (shape.E / shape.K, 100 * (rounded / plain - 1))
                of_variant.setdefault((shape.H, shape.I), []).append(point)
    if not lines:
        return False
    panels = figure.subplots(1, len(lines), sharey=True, squeeze=False)[0]
    for ax, (variant, series) in zip(panels, lines.items(), strict=True):
        for (hidden, inter), points in series.items():
            x, y = zip(*sorted(points), strict=True)
            ax.plot(x, y, marker="o", ms=4, label=f"H = {hidden}, I = {inter}")
        ax.axhline(0, color="black", lw=0.6)
        _powers_of_two(ax, (x for points in series.values() for x, _ in points), lambda n: f"1/{n:g}")
        ax.set_title({"both": "forward and backward"}.get(variant, variant), fontsize=9)
        ax.set_xlabel("K / E")
        _grid(ax)
    panels[0].set_ylabel("faster than top-K, %")
    _legend_of_panels(figure, panels)
    return True


PLOTS: dict[str, tuple[Callable[[Sequence[Row], Any], bool], tuple[float, float]]] = {
    "throughput": (throughput, (11.0, 4.2)),
    "memory": (memory, (10.0, 3.2)),
    "tokens": (tokens, (7.0, 4.0)),
    "breakdown": (breakdown, (9.0, 3.4)),
    "rounding": (rounding, (9.0, 3.4)),
}


def draw_all(rows: Sequence[Row], folder: Path, gpu: str) -> list[Path]:
    """Draw every plot that the rows are enough for; returns the files written."""
    import matplotlib

    matplotlib.use("Agg")
    # Text as text and names without a random part: the same ledger draws the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "sonicmoe", "svg.fonttype": "none", "font.size": 9})
    import matplotlib.pyplot as plt

    written = []
    for name, (draw, size) in PLOTS.items():
        figure = plt.figure(figsize=size, layout="constrained")
        if draw(rows, figure):
            figure.supxlabel(gpu, x=0.995, ha="right", fontsize=7, color="#666666")
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            _save_png(figure, folder / f"{name}.png")
            written += [folder / f"{name}.png", folder / f"{name}.svg"]
        plt.close(figure)
    return written


def _save_png(figure: Figure, path: Path) -> None:
    """With a palette: a third of the bytes."""
    from PIL import Image

    drawn = BytesIO()
    figure.savefig(drawn, dpi=DPI, format="png")
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(PNG_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
