"""What a demo run leaves: a table, a plot, and the numbers behind them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sonicmoe.demo.layer import Speed
from sonicmoe.demo.train import Run
from sonicmoe.errors import InvalidArgument

MIB = 2**20


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain-text table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, rows)])


def _share(part: int, whole: int) -> str:
    return f"{part} ({part / max(whole, 1):.1%})"


def runs_table(runs: Sequence[Run]) -> str:
    """A line per run. Losses in nats per byte, memory in MiB per step."""
    header = ["routing", "seed", "train", "held out", "tokens/s", "activations", "in MoE", "dropped", "padded"]
    rows = [
        [
            run.routing,
            str(run.seed),
            f"{run.history[-1].train:.4f}",
            f"{run.history[-1].held_out:.4f}",
            f"{run.tokens_per_second:.0f}",
            f"{run.kept_bytes / MIB:.1f} MiB",
            f"{run.kept_bytes_moe / MIB:.1f} MiB",
            _share(run.pairs.dropped, run.pairs.chosen),
            _share(run.pairs.padded, run.pairs.chosen),
        ]
        for run in runs
    ]
    return aligned(header, rows)


def spread_table(runs: Sequence[Run]) -> str:
    """A line per routing: the last held-out losses of its seeds."""
    losses: dict[str, list[float]] = {}
    for run in runs:
        losses.setdefault(run.routing, []).append(run.history[-1].held_out)
    header = ["routing", "seeds", "held out, mean", "least", "greatest"]
    rows = [
        [name, str(len(of)), *(f"{loss:.4f}" for loss in (sum(of) / len(of), min(of), max(of)))]
        for name, of in losses.items()
    ]
    return aligned(header, rows)


def speeds_table(speeds: Sequence[Speed]) -> str:
    """A line per routing, for one layer."""
    header = ["routing", "rows", "forward", "TFLOP/s", "forward + backward", "TFLOP/s"]
    rows = [
        [
            s.routing,
            str(s.rows),
            f"{s.forward_ms:.3f} ms",
            f"{s.forward_tflops:.0f}",
            f"{s.both_ms:.3f} ms",
            f"{s.both_tflops:.0f}",
        ]
        for s in speeds
    ]
    return aligned(header, rows)


def check_folder(folder: Path) -> None:
    """Make it. Raises InvalidArgument if it cannot be made or written into: known before a training, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Permissions do not tell: a disk can be read-only, and root passes them all.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InvalidArgument("out", str(error), "a folder that can be made and written into") from error


def save(runs: Sequence[Run], speeds: Sequence[Speed], text: str, setting: dict[str, object], folder: Path) -> Path:
    """Write table.txt, results.json and loss.png into folder; return the plot's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.txt").write_text(text + "\n")
    results = {
        "setting": setting,
        "runs": [{**asdict(r), "history": [p._asdict() for p in r.history], "pairs": r.pairs._asdict()} for r in runs],
        "layer": [s._asdict() for s in speeds],
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    path = folder / "loss.png"
    plot(runs, path)
    return path


def plot(runs: Sequence[Run], path: Path) -> None:
    """Held-out (solid) and training loss (dotted) of every run, a colour per routing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The object interface needs no display and leaves a caller's pyplot alone.
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(run.routing for run in runs))}
    for run in runs:
        steps = [p.step for p in run.history]
        colour, label = colours[run.routing], f"{run.routing}, seed {run.seed}"
        axes.plot(steps, [p.held_out for p in run.history], color=colour, label=f"{label}: held out")
        axes.plot(steps, [p.train for p in run.history], color=colour, linestyle=":", label=f"{label}: training")
    axes.set(xlabel="step", ylabel="loss, nats per byte", title="Byte-level MoE language model")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
