"""Grouped GEMMs of several source trees, timed in turns with each other and with cuBLAS, in one process.

    git worktree add ../before HEAD~1
    python -m perf.versus ../before . --shape 7b 30b --kernel up_proj down_dgrad
    python -m perf.versus ../before . --shape 30b --layer

For those who change kernels: between two runs clocks and temperature differ by more than most changes are worth. Each
tree compiles its own kernels, with the tile configurations that it chooses, in a process of its own; all are launched
from here, with this tree's arguments but for the counter of a pace, which a kernel gets if its tree says so: one that
needs others is reported as failed. What a kernel computes is checked. Times are percentages of the speed of torch.bmm,
with --layer also those of a whole layer whose GEMMs are each tree's, of its six products: what a kernel gains by itself
need not reach the layer. Nothing is written to the ledger.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from perf import commandline, kernels, layers, roofline, tables, tune
from perf.peers.cublas import Cublas
from perf.problem import Form, Problem
from perf.protocol import TOTAL, Case, Settings, clock_of, measure, simple
from perf.session import brief
from perf.shapes import Shape
from sonicmoe import InvalidArgument
from sonicmoe.configs.choice import gpu_key
from sonicmoe.cute_kernels.variants import GemmSpec
from sonicmoe.jit import compile as compiler
from sonicmoe.jit.ahead import RUN_BY_PATH
from sonicmoe.ops import _gemm

CHILD = Path(__file__).with_name("versus_child.py")
TIMEOUT = 600
SHAPES = ("7b",)
Kernel = tuple[Callable[..., None], bool]  # and whether it takes the counter of a pace


class Built(NamedTuple):
    """A tree's kernel. text: its tile configuration, or what went wrong, where there is no file."""

    file: str | None
    text: str
    paced: bool


def gemms(shape: Shape, form: Form, wanted: Sequence[str]) -> dict[str, GemmSpec]:
    """What the launches of a layer's GEMMs ask for, by kernel; the tile configurations are this tree's."""
    return {name: spec for name, spec in tune.specs(shape, form).items() if name in wanted}


def compile_tree(tree: Path, specs: Sequence[GemmSpec], gpu: str, jobs: int) -> list[Built]:
    """For each spec, with the tree's own tile configuration.

    Raises RuntimeError if the tree's sonicmoe cannot be run at all.
    """
    told = [[s.variant, s.groups, s.n, s.k, s.dtype, s.halves, s.act and str(s.act)] for s in specs]
    path = os.pathsep.join([str(tree.resolve() / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", RUN_BY_PATH, str(CHILD)],
        cwd=tree / "src",
        input=json.dumps({"gpu": gpu, "jobs": jobs, "gemms": told}),
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    if done.returncode:
        raise RuntimeError(f"{tree}: {' / '.join(done.stderr.strip().splitlines()[-3:])}")
    return [Built(*answer) for answer in json.loads(done.stdout.strip().splitlines()[-1])]


def by(kernels: Mapping[str, Kernel], call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, with these kernels in the place of those that it would launch, by variant."""

    def run(*arguments: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for variant, kernel in kernels.items():
                stack.enter_context(_gemm.replaced(variant, *kernel))
            return call(*arguments)

    return run


def compare(shape: Shape, form: Form, found: dict[str, dict[str, Kernel]], settings: Settings) -> list[list[str]]:
    """A line per kernel: its name, ms of torch.bmm, then for each tree the share of its speed, or what is wrong.

    found: by kernel and tree.
    """
    i = kernels.inputs(shape, form, "topk")
    ours, bounds, cases, wrong = kernels.calls(i), kernels.bounds(i), {}, {}
    for name, of_trees in found.items():
        for tree, kernel in of_trees.items():
            call = by({name: kernel}, ours[name])
            try:
                bad = "WRONG" if kernels.wrong(kernels.errors(name, i, call()), i.x.dtype) else ""
            except (TypeError, ValueError) as error:  # other arguments than this tree's
                bad = f"FAILED {brief(error)}"
            if bad:
                wrong[tree, name] = bad
            else:
                cases[f"{name} {tree}"] = simple(call)
        cases[f"{name} cublas"] = simple(bounds[name])
    times = {case: samples.times().p50 for case, samples in measure(cases, clock_of(form.device), settings).items()}
    lines = []
    for name, of_trees in found.items():
        bound = times[f"{name} cublas"]
        shares = [wrong.get((t, name)) or tables.percent(bound / times[f"{name} {t}"]) for t in of_trees]
        lines.append([f"{shape.name} {name}", tables.cell(bound, 4), *shares])
    return lines


def is_wrong(line: list[str]) -> bool:
    return any(cell.startswith(("WRONG", "FAILED")) for cell in line)


def compare_layers(
    shape: Shape, form: Form, found: dict[str, dict[str, Kernel]], settings: Settings
) -> list[list[str]]:
    """Such lines of a layer with its router and the kernels found: forward, backward, and both."""
    problem = Problem(shape, form)
    layer, bound = layers.training(layers.ours(problem, True, "topk"), problem.do), "cublas"
    trees = list(next(iter(found.values())))
    cases = {t: Case(by({name: of[t] for name, of in found.items()}, layer.run), layer.laps) for t in trees}
    cases[bound] = Cublas().case(problem, shape.rows, "both")
    samples = measure(cases, clock_of(form.device), settings)
    lines = []
    for lap in (*layer.laps, TOTAL):
        ms = {case: of_case.times(lap).p50 for case, of_case in samples.items()}
        shares = [tables.percent(ms[bound] / ms[tree]) for tree in trees]
        lines.append([f"{shape.name} layer {lap}", tables.cell(ms[bound], 4), *shares])
    return lines


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m perf.versus", description=(__doc__ or "").split("\n")[0])
    p.add_argument("tree", nargs="+", type=Path, help="a checkout, with src/sonicmoe in it")
    p.add_argument("--shape", nargs="+", default=[], help="names or groups, as of perf.run; default 7b")
    p.add_argument("--thiek", action="append", default=[], metavar="T,H,I,E,K", help="another shape, by its numbers")
    p.add_argument("--kernel", nargs="+", default=list(roofline.GEMMS), choices=roofline.GEMMS)
    p.add_argument("--layer", action="store_true", help="time a whole layer too, with these kernels")
    p.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    p.add_argument("--repeats", type=commandline.count, default=20)
    p.add_argument("--warm-seconds", type=commandline.amount, default=1.0)
    jobs = max(1, (os.cpu_count() or 2) - 2)
    p.add_argument("--jobs", type=commandline.count, default=jobs, help="processes that compile")
    return p


def check(arguments: argparse.Namespace) -> None:
    """Raises InvalidArgument for options that cannot be."""
    commandline.chosen_shapes(arguments, SHAPES)
    for tree in arguments.tree:
        if not (tree / "src" / "sonicmoe").is_dir():
            raise InvalidArgument("tree", repr(str(tree)), "a checkout, with src/sonicmoe in it")
    commandline.check_gpu()


def run(arguments: argparse.Namespace, device: str = "cuda") -> int:
    """0 if every tree's kernels could be compiled and were right."""
    form = Form(dtype=arguments.dtype, device=device, backend="cute")
    trees = list(dict.fromkeys(map(str, arguments.tree)))
    gpu, lines, failed = gpu_key(torch.cuda.get_device_name(device)), [], []
    settings = Settings(arguments.repeats, arguments.warm_seconds, state="settled")
    for shape in commandline.chosen_shapes(arguments, SHAPES):
        wanted = gemms(shape, form, arguments.kernel)
        found: dict[str, dict[str, Kernel]] = {name: {} for name in wanted}
        for tree in trees:
            try:
                answers = compile_tree(Path(tree), list(wanted.values()), gpu, arguments.jobs)
            except (OSError, RuntimeError) as error:
                raise SystemExit(str(error)) from None
            for name, built in zip(wanted, answers, strict=True):
                if built.file is None:
                    failed.append(f"{tree} {shape.name} {name}: {built.text}")
                else:
                    found[name][tree] = compiler.load(Path(built.file)), built.paced
        complete = {name: of_trees for name, of_trees in found.items() if len(of_trees) == len(trees)}
        compared = compare(shape, form, complete, settings) if complete else []
        torch.cuda.empty_cache()
        if arguments.layer and complete.keys() == wanted.keys() and not any(map(is_wrong, compared)):
            compared += compare_layers(shape, form, complete, settings)
            torch.cuda.empty_cache()
        lines += compared
    print(tables.text(("kernel", "torch.bmm ms", *trees), lines))
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed or any(map(is_wrong, lines)) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run(commandline.parsed(parser(), arguments, check)[0])


if __name__ == "__main__":
    sys.exit(main())
