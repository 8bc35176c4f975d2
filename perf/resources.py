"""The table of chosen tile configurations and what they cost, for docs/grouped_gemm.md: `python -m perf.resources`.

Every number is read off the kernel objects that are compiled; needs no GPU.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from perf import environment, shapes, tables
from perf.problem import Form
from perf.tune import specs
from sonicmoe.configs.choice import choose
from sonicmoe.configs.tile import BUFFER
from sonicmoe.cute_kernels.variants import GemmSpec

FILE = environment.ROOT / "docs" / "grouped_gemm.md"
SHAPES = (*shapes.TWELVE, *shapes.FINE, *shapes.OPEN)
_MARKS = re.compile(r"(?<=<!-- resources:begin -->\n).*?(?=<!-- resources:end -->)", re.DOTALL)
HEADER = ("GEMM, tile", "schedule", "stages", "buffers", "shared memory", "accumulators", "registers", "chosen for")


def chosen(gpu: str) -> dict[tuple[str, GemmSpec], list[str]]:
    """(GEMM, a spec with the configuration) -> the shapes that take it."""
    found: dict[tuple[str, GemmSpec], list[str]] = {}
    first: dict[tuple[object, ...], tuple[str, GemmSpec]] = {}
    for shape in SHAPES:
        for gemm, spec in specs(shape, Form()).items():
            tile = choose(spec.variant, spec.groups, spec.n, spec.k, spec.outs, spec.halves, gpu)
            key = first.setdefault((gemm, tile), (gemm, replace(spec, tile=tile)))
            found.setdefault(key, []).append(shape.name)
    return found


def _line(gemm: str, spec: GemmSpec, names: Sequence[str]) -> list[str]:
    from sonicmoe.cute_kernels.assembly import kernel

    tile, built = spec.tile, kernel(spec)
    stage = built.mainloop.a.bytes + built.mainloop.b.bytes
    return [
        f"{gemm}, {tile.tile_m}x{tile.tile_n}x{tile.tile_k}",
        tile.schedule + (f", clusters of {tile.cluster}" if tile.cluster > 1 else ""),
        f"{tile.stages} x {stage}",
        f"2 x {tile.buffers} x {BUFFER}",
        str(tile.shared_memory(built.groups.table_size)),
        str(tile.accumulators),
        "{} / {}".format(*built.registers),
        _listed(names),
    ]


def _listed(names: Sequence[str]) -> str:
    """The names, or the shorter list of those that are missing."""
    others = [shape.name for shape in SHAPES if shape.name not in names]
    if not others:
        return "all"
    return ", ".join(names) if len(names) <= len(others) else f"all but {', '.join(others)}"


def table(gpu: str) -> str:
    lines = [_line(gemm, spec, names) for (gemm, spec), names in chosen(gpu).items()]
    return tables.markdown(HEADER, sorted(lines, key=lambda line: line[0].partition(",")[0]))


def filled(text: str, gpu: str) -> str:
    """The text with its table written anew."""
    return _MARKS.sub(lambda _: f"{table(gpu)}\n", text)


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m perf.resources", description=__doc__.split("\n")[0])
    p.add_argument("--gpu", choices=("h100", "h200"), default="h200", help="of the table of configurations")
    p.add_argument("--file", type=Path, default=FILE)
    p.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the table is stale")
    a = p.parse_args(arguments)
    before = a.file.read_text()
    after = filled(before, a.gpu)
    if not a.check:
        a.file.write_text(after)
    elif after != before:
        print(f"{a.file} is stale: python -m perf.resources")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
