"""Times the tile configurations of the grouped GEMMs on this GPU, and writes the fastest into its table.

    python -m perf.tune                      # the twelve and the fine-grained shapes and the open models
    python -m perf.tune 7b --variant up_proj

By hand, and the table is committed (src/sonicmoe/configs/tuned): nothing is tuned at run time. All configurations of a
shape take turns in one process, as everything in perf/ does; one that computes something wrong is left out. Kernels
are compiled ahead of that by processes side by side, into the cache on disk.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perf import commandline, environment, kernels, roofline, tables
from perf.problem import Form
from perf.protocol import Clock, Settings, Times, clock_of, measure, simple
from perf.shapes import Shape
from sonicmoe import Activation, InvalidArgument, ops
from sonicmoe.configs import choice
from sonicmoe.configs.tile import TileConfig
from sonicmoe.cute_kernels.variants import GemmSpec
from sonicmoe.ops import _gemm

TABLES = environment.ROOT / "src" / "sonicmoe" / "configs" / "tuned"
SHAPES = ("twelve", "fine", "open")
INFERENCE = "up_proj without h"
# By what another configuration must be faster, or less is noise and the table would change with every run: than the one
# that the table has, and than an earlier one of the list.
STAYS, MARGIN = 0.02, 0.005
HEADER = ("gemm, tile", "ms p50", "p20", "p80", "TFLOP/s", "of best", "")
Call = Callable[[], tuple[Tensor, ...]]
Key = tuple[Any, ...]
Table = dict[Key, TileConfig]


class Candidate(NamedTuple):
    gemm: str
    spec: GemmSpec

    @property
    def name(self) -> str:
        return f"{self.gemm}, {described(self.spec.tile)}"


def described(tile: TileConfig) -> str:
    """A configuration in one line, without what is as always."""
    told = [(f.name, getattr(tile, f.name)) for f in dataclasses.fields(tile) if getattr(tile, f.name) != f.default]
    return " ".join(str(value) if name == "schedule" else f"{name}={value}" for name, value in told)


def specs(shape: Shape, form: Form) -> dict[str, GemmSpec]:
    """What each GEMM of a layer without biases, w1 concatenated, asks the table for, with the list's first answer."""
    hidden, inter, experts = shape.H, shape.I, shape.E
    halves = 2 if form.gated else 1
    act = {"act": form.kind, "halves": halves}
    asked: dict[str, tuple[str, int, int, dict[str, Any]]] = {
        "up_proj": ("up_proj", inter, hidden, act),
        INFERENCE: ("up_proj", inter, hidden, {**act, "keep_h": False}),
        "down_proj": ("down_proj", hidden, inter, {}),
        "down_dgrad": ("down_dgrad", inter, hidden, act),
        "down_wgrad": ("down_wgrad", inter, hidden, {}),
        "up_dgrad": ("up_dgrad", hidden, halves * inter, {}),
        "up_wgrad": ("up_wgrad", halves * inter, hidden, {}),
    }
    found = {}
    for gemm, (variant, n, k, rest) in asked.items():
        tile = choice.candidates(variant, experts, n, rest.get("halves", 1))[0]
        found[gemm] = GemmSpec(variant, experts, n, k, form.dtype, tile, **rest)
    return found


def candidates(gemm: str, spec: GemmSpec) -> list[Candidate]:
    """Every valid configuration, in order of preference."""
    tiles = choice.candidates(spec.variant, spec.groups, spec.n, spec.halves)
    return [Candidate(gemm, dataclasses.replace(spec, tile=tile)) for tile in tiles]


def key_of(spec: GemmSpec) -> Key:
    """By what the table is asked."""
    return spec.variant, spec.n, spec.k, spec.halves, spec.outs


def calls(i: kernels.Inputs) -> dict[str, Call]:
    """The GEMMs by the names of `specs`."""
    activation, backend = str(i.form.kind), i.form.backend
    known = {name: call for name, call in kernels.calls(i).items() if name in roofline.GEMMS}

    def without_h() -> tuple[Tensor, ...]:
        return ops.up_proj(i.x, i.w1, i.b1, i.cu_rows, i.row_token, activation, kernels.LAYOUT, False, backend)

    return {**known, INFERENCE: without_h}


def forced(candidate: Candidate, call: Call) -> Call:
    """The call by this configuration."""

    def run() -> tuple[Tensor, ...]:
        with _gemm.forced(candidate.spec.variant, candidate.spec.tile):
            return call()

    return run


def compiled(spec: GemmSpec) -> None:
    """Leave a kernel in the cache on disk; in a process of its own."""
    from sonicmoe.jit import cache

    cache.function_of(spec)


def why_wrong(candidate: Candidate, call: Call, i: kernels.Inputs) -> str | None:
    """What is wrong about a configuration's output, None if nothing."""
    try:
        out = forced(candidate, call)()
        found = kernels.errors(candidate.spec.variant, i, out)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip()[:300]}"
    return "; ".join(kernels.wrong(found, i.x.dtype)) or None


def chosen(measured: Sequence[tuple[Candidate, Times]], present: TileConfig | None) -> Candidate:
    """The present one if it is at most STAYS slower than the fastest; else the first that is at most MARGIN slower."""
    fastest = min(times.p50 for _, times in measured)

    def near(margin: float) -> list[Candidate]:
        return [candidate for candidate, times in measured if times.p50 <= (1 + margin) * fastest]

    return next((c for c in near(STAYS) if c.spec.tile == present), near(MARGIN)[0])


def read(path: Path) -> Table:
    if not path.exists():
        return {}
    entries = json.loads(path.read_text())
    return {(e["variant"], e["n"], e["k"], e["halves"], e["outs"]): TileConfig(**e["tile"]) for e in entries}


def text(table: Table) -> str:
    """The table as JSON, sorted, one entry per line."""
    names = ("variant", "n", "k", "halves", "outs")
    entries = (dict(zip(names, key, strict=True)) | {"tile": dataclasses.asdict(table[key])} for key in sorted(table))
    lines = [f"  {json.dumps(entry)}" for entry in entries]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def write(path: Path, table: Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text(table))


def tune(
    shape: Shape, form: Form, wanted: Iterable[Candidate], table: Table, clock: Clock, settings: Settings
) -> tuple[Table, list[str]]:
    """(the configuration to take by key, what was wrong) of one shape, by the present table; prints all times."""
    i = kernels.inputs(shape, form, "topk")
    by_name, wrong, good = calls(i), [], {}
    for candidate in wanted:
        reason = why_wrong(candidate, by_name[candidate.gemm], i)
        if reason:
            wrong.append(f"{shape.name} {candidate.name}: {reason}")
        else:
            good[candidate.name] = candidate
    cases = {name: simple(forced(c, by_name[c.gemm])) for name, c in good.items()}
    results = measure(cases, clock, settings)
    winners, lines = {}, []
    for gemm in dict.fromkeys(c.gemm for c in good.values()):
        measured = [(c, results[name].times()) for name, c in good.items() if c.gemm == gemm]
        best = chosen(measured, table.get(key_of(measured[0][0].spec)))
        winners[key_of(best.spec)] = best.spec.tile
        fastest = min(times.p50 for _, times in measured)
        flops = roofline.work(best.spec.variant, shape, rows=i.rows, gated=form.gated, item=form.item).flops
        for c, times in measured:
            speed = [tables.cell(v, 4) for v in (times.p50, times.p20, times.p80, flops / times.p50 / 1e9)]
            mark = "chosen" if c is best else ""
            lines.append([c.name, *speed, tables.percent(fastest / times.p50), mark])
    print(f"\n{shape.name} {shape.thiek} {form.dtype}\n{tables.text(HEADER, lines)}", flush=True)
    return winners, wrong


def untuned(wanted: Sequence[Shape], form: Form, variants: Sequence[str]) -> dict[Shape, list[Candidate]]:
    """The configurations to time at each shape; what an earlier shape asks the table for is not timed again."""
    seen: set[Key] = set()
    found: dict[Shape, list[Candidate]] = {}
    for shape in wanted:
        for gemm, spec in specs(shape, form).items():
            if key_of(spec) not in seen and (not variants or spec.variant in variants):
                seen.add(key_of(spec))
                found.setdefault(shape, []).extend(candidates(gemm, spec))
    return found


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m perf.tune", description=(__doc__ or "").split("\n")[0])
    p.add_argument("shape", nargs="*", help=f"names or groups, as of perf.run; default {' '.join(SHAPES)}")
    p.add_argument("--thiek", action="append", default=[], metavar="T,H,I,E,K", help="another shape, by its numbers")
    p.add_argument("--variant", nargs="+", default=[], choices=roofline.GEMMS, help="only these")
    p.add_argument("--activation", default="swiglu")
    p.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    p.add_argument("--repeats", type=commandline.count, default=12)
    p.add_argument("--warm-seconds", type=commandline.amount, default=0.5)
    jobs = max(1, (os.cpu_count() or 2) - 2)
    p.add_argument("--jobs", type=commandline.count, default=jobs, help="processes that compile")
    p.add_argument("--out", type=Path, help="the table; default: this GPU's in the package")
    return p


def table_of(device: str) -> Path:
    """The table of this GPU in the package. Raises InvalidArgument for one of another kind than tables are of."""
    name = torch.cuda.get_device_name(device)
    gpu = choice.gpu_key(name)
    if not gpu:
        raise InvalidArgument("out", "none", f"a file, as there is no table of {name}")
    return TABLES / f"{gpu}.json"


def check(arguments: argparse.Namespace, device: str = "cuda") -> None:
    """Raises InvalidArgument for options that cannot be; makes the table's folder."""
    commandline.chosen_shapes(arguments, SHAPES)
    Activation.parse(arguments.activation)
    commandline.check_gpu()
    check_table(arguments.out or table_of(device))


def check_table(path: Path) -> None:
    """Raises InvalidArgument for a file that is not a table or cannot be written."""
    commandline.check_out(path)
    try:
        read(path)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidArgument("out", str(path), f"a new file, or a table of tile configurations ({error})") from error


def run(arguments: argparse.Namespace, device: str = "cuda") -> int:
    """0 if every configuration was right. The table is written after each shape."""
    path = arguments.out or table_of(device)
    form = Form(activation=arguments.activation, dtype=arguments.dtype, device=device, backend="cute")
    work = untuned(commandline.chosen_shapes(arguments, SHAPES), form, arguments.variant)
    clock, table, start = clock_of(device), read(path), time.perf_counter()
    wrong: list[str] = []
    settings = Settings(arguments.repeats, arguments.warm_seconds, state="settled")
    context = multiprocessing.get_context("spawn")  # the DSL's state does not survive a fork
    with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        pending: dict[Shape, list[Future[None]]] = {
            shape: [pool.submit(compiled, c.spec) for c in wanted] for shape, wanted in work.items()
        }
        for shape, wanted in work.items():
            for future in pending[shape]:
                future.exception()  # what does not compile here fails its check, with the reason
            winners, found = tune(shape, form, wanted, table, clock, settings)
            table |= winners
            wrong += found
            write(path, table)
            torch.cuda.empty_cache()
    print(f"\n{len(table)} entries in {path}, {time.perf_counter() - start:.0f} s")
    for line in wrong:
        print(f"WRONG {line}")
    return 1 if wrong else 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run(commandline.parsed(parser(), arguments, check)[0])


if __name__ == "__main__":
    sys.exit(main())
