"""Benchmarks on the command line: `python -m perf.run --help`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from perf import commandline, environment, ledger, shapes
from perf.peers import PEERS
from perf.peers.outside import Outside
from perf.problem import DTYPES, Form
from perf.protocol import Settings, clock_of
from perf.roofline import KERNELS
from perf.session import Options, Session, brief, measured_ceilings
from perf.shapes import Shape
from sonicmoe import InvalidArgument
from sonicmoe.configs.tile import TILE_M
from sonicmoe.routing import RULES

WHAT = {
    "forward": "perf.what.layers",
    "backward": "perf.what.layers",
    "both": "perf.what.layers",
    "inference": "perf.what.layers",
    "kernels": "perf.what.kernels",
    "breakdown": "perf.what.breakdown",
    "memory": "perf.what.memory",
    "router": "perf.what.router",
    "host": "perf.what.host",
    "first-call": "perf.what.first_call",
}
ROUTINGS = ("topk", "token_rounding")
DEFAULT_SHAPES = {"memory": ["twelve"], "router": ["7b", "30b", "30b-1024", "qwen3-next"]}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m perf.run", description="Measure sonicmoe beside its peers.")
    groups, names = ", ".join(shapes.GROUPS), ", ".join(shapes.SHAPES)
    usual = "; ".join(["default 7b", *(f"of {what}: {' '.join(of)}" for what, of in DEFAULT_SHAPES.items())])
    p.add_argument("shape", nargs="*", help=f"names or groups ({groups}); {usual}. Names: {names}")
    p.add_argument("--thiek", action="append", default=[], metavar="T,H,I,E,K", help="another shape, by its numbers")
    p.add_argument(
        "--tokens",
        type=commandline.count,
        nargs="+",
        default=[],
        metavar="T",
        help="each shape with these token counts",
    )
    p.add_argument("--what", choices=WHAT, default="both", help="to measure; default both, a layer's directions")
    p.add_argument("--kernel", nargs="+", default=[], choices=KERNELS, help="with --what kernels: only these")
    p.add_argument("--peer", nargs="+", default=[], choices=[*PEERS, "all"], help="beside sonicmoe, where installed")
    p.add_argument(
        "--outside",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "PYTHON", "FACTORY"),
        help="a layer in another environment: see perf/peers/outside.py",
    )
    p.add_argument("--module", action="store_true", help="also sonicmoe.MoE, with its load balancing loss")
    p.add_argument("--routing", nargs="+", default=["topk"], choices=ROUTINGS)
    p.add_argument("--rule", choices=RULES, default="nearest", help="of token rounding")
    p.add_argument("--tile-m", type=commandline.count, default=TILE_M, help="of token rounding")
    p.add_argument("--no-router", action="store_true", help="the experts alone, routing given")
    p.add_argument("--activation", default="swiglu", help="as of moe_experts; default swiglu")
    p.add_argument("--bias", action="store_true", help="experts with b1 and b2; their gradients are not checked")
    p.add_argument("--dtype", choices=DTYPES, default="bf16", help="of x and weights")
    p.add_argument("--skew", type=commandline.amount, default=0.0, help="deviation of a bias per expert on the logits")
    p.add_argument("--repeats", type=commandline.count, default=20, help="timed calls of each variant")
    p.add_argument("--warm-seconds", type=commandline.amount, default=1.0, help="of load before the repeats")
    p.add_argument(
        "--from-idle",
        action="store_true",
        help="layers: each call starts on an idle GPU, so that host time which the device cannot hide counts",
    )
    p.add_argument("--check", action=argparse.BooleanOptionalAction, default=True, help="no speed for a wrong output")
    p.add_argument("--out", type=Path, default=ledger.RESULTS, help="folder of the ledgers")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--backend", choices=("cute", "torch"), help="of sonicmoe; default cute on a GPU, torch on a CPU")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    return p


def chosen_shapes(arguments: argparse.Namespace) -> list[Shape]:
    found = commandline.chosen_shapes(arguments, DEFAULT_SHAPES.get(arguments.what, ["7b"]))
    if arguments.tokens:
        return [shape.with_tokens(tokens) for shape in found for tokens in arguments.tokens]
    return found


def form_of(arguments: argparse.Namespace) -> Form:
    form = Form(
        activation=arguments.activation,
        dtype=arguments.dtype,
        bias=arguments.bias,
        skew=arguments.skew,
        device=arguments.device,
        backend=arguments.backend or ("cute" if arguments.device.startswith("cuda") else "torch"),
        tile_m=arguments.tile_m,
        rule=arguments.rule,
    )
    return dataclasses.replace(form, activation=str(form.kind))


def options_of(arguments: argparse.Namespace) -> Options:
    names = list(PEERS) if "all" in arguments.peer else arguments.peer
    return Options(
        what=arguments.what,
        routings=tuple(dict.fromkeys(arguments.routing)),
        peers=tuple(PEERS[name] for name in dict.fromkeys(names)),
        kernels=tuple(arguments.kernel),
        router=not arguments.no_router,
        check=arguments.check,
        from_idle=arguments.from_idle,
        with_module=arguments.module,
        outside=tuple(Outside(name, python, Path(factory)) for name, python, factory in arguments.outside),
    )


def path_of(arguments: argparse.Namespace) -> Path:
    """The ledger of today."""
    folder = arguments.out / environment.describe(arguments.device).slug
    return folder / f"{environment.now()[:10]}-{arguments.what}.csv"


def session_of(arguments: argparse.Namespace) -> Session:
    described = environment.describe(arguments.device)
    clock = clock_of(arguments.device)
    settings = Settings(arguments.repeats, arguments.warm_seconds)
    ceilings = measured_ceilings(arguments.device, clock)
    return Session(described, clock, settings, path_of(arguments), ceilings, arguments.quiet)


def check(arguments: argparse.Namespace) -> None:
    """Raises InvalidArgument for options that cannot be; makes the ledger's folder."""
    chosen_shapes(arguments)
    form_of(arguments)
    commandline.check_device(arguments.device)
    path = path_of(arguments)
    commandline.check_out(path)
    try:
        ledger.check_columns(path)
    except ValueError as error:
        raise InvalidArgument("out", str(path), str(error)) from error


def run(arguments: argparse.Namespace) -> int:
    """0 if everything asked for was measured; 1 if something of sonicmoe failed or was wrong."""
    wanted, form, options = chosen_shapes(arguments), form_of(arguments), options_of(arguments)
    if arguments.device.startswith("cuda"):  # events and synchronisation are the current device's
        torch.cuda.set_device(torch.empty(0, device=arguments.device).device)
    session = session_of(arguments)
    gpu, driver, version, dsl, commit = session.environment
    session.say(f"{gpu}, driver {driver or '-'}, torch {version}, CuTe DSL {dsl or '-'}, commit {commit}")
    measurement: Any = importlib.import_module(WHAT[options.what])
    start = time.perf_counter()
    for shape in wanted:
        try:
            measurement.run(session, shape, form, options)
        except Exception as error:
            session.fail(f"{shape.name}: {brief(error)}")
        if arguments.device.startswith("cuda"):
            torch.cuda.empty_cache()
    session.say(f"\n{time.perf_counter() - start:.0f} s; rows in {session.path}")
    for failure in session.failures:
        session.say(f"FAIL {failure}")
    return 1 if session.failures else 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run(commandline.parsed(parser(), arguments, check)[0])


if __name__ == "__main__":
    sys.exit(main())
