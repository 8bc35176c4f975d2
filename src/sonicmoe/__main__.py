"""`python -m sonicmoe`: train a small byte-level MoE language model and compare routings. Options: --help."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from sonicmoe.demo import layer, report
from sonicmoe.demo.data import Corpus, load_corpus
from sonicmoe.demo.model import SIZES, Size
from sonicmoe.demo.train import Plan, Point, Run, train
from sonicmoe.errors import InvalidArgument
from sonicmoe.functional import BACKENDS
from sonicmoe.moe import ROUTINGS
from sonicmoe.routing import RULES


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m sonicmoe",
        description="Train a byte-level MoE language model, on the documentation that ships with Python unless --text "
        "names other files, once per routing, and write a table, a plot and the numbers. On a Hopper GPU by the CuTe "
        "kernels, in bf16, with the speed of one 7B layer; elsewhere by the torch backend.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--routing", nargs="+", choices=ROUTINGS, default=list(ROUTINGS), help="one training for each")
    p.add_argument("--rule", nargs="+", choices=RULES, default=["nearest"], help="of token rounding: one training each")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="one training for each")
    p.add_argument("--device", help="cuda if there is one, else cpu")
    p.add_argument("--backend", choices=BACKENDS, default="auto", help="of sonicmoe")
    p.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="files to train on and hold out a tenth of")
    p.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for table.txt, results.json, loss.png")
    p.add_argument("--every", type=int, default=50, metavar="N", help="steps between looks at the held-out text")
    p.add_argument("--layer", action=argparse.BooleanOptionalAction, default=True, help="the 7B layer on a Hopper GPU")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    size = p.add_argument_group("model and batches")
    size.add_argument("--size", choices=SIZES, help="base on a GPU, small on a CPU; the options below change it")
    for name, value in asdict(SIZES["small"]).items():
        values = ", ".join(f"{key} {getattr(of_key, name)}" for key, of_key in SIZES.items())
        option = f"--{name.replace('_', '-')}"
        size.add_argument(option, type=type(value), default=argparse.SUPPRESS, metavar="N", help=values)
    return p


def chosen_size(arguments: argparse.Namespace, device: torch.device) -> Size:
    """The named size with the options' changes. Raises InvalidArgument for what cannot be."""
    size = SIZES[arguments.size or ("base" if device.type == "cuda" else "small")]
    size = replace(size, **{k: v for k, v in vars(arguments).items() if k in asdict(size)})
    for name, value in asdict(size).items():
        if not 0 < value < 2**31:  # nor NaN
            raise InvalidArgument(name, value, "more than 0 and less than 2^31")
    if arguments.every <= 0:
        raise InvalidArgument("every", arguments.every, "more than 0")
    if size.hidden % (2 * size.heads):
        raise InvalidArgument("heads", size.heads, f"a divisor of hidden / 2 = {size.hidden / 2:g}")
    return size


class Progress:
    """A bar per training, with losses in it, and a line per look at the held-out text."""

    def __init__(self, run: str, steps: int, quiet: bool) -> None:
        from tqdm import tqdm

        # None: only where stderr is a terminal; in a log each redrawing would be a line.
        self.bar = tqdm(total=steps, desc=run, disable=True if quiet else None, unit="step")
        self.run = run

    def __call__(self, step: int, point: Point | None) -> None:
        self.bar.update()
        if point is not None:
            self.bar.set_postfix(held_out=f"{point.held_out:.4f}", refresh=False)
            line = f"{self.run}: step {step:5d}  train {point.train:.4f}  held out {point.held_out:.4f}"
            self.bar.write(line, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        self.bar.close()


def _trainings(arguments: argparse.Namespace, size: Size, device: torch.device, corpus: Corpus) -> list[Run]:
    runs = []
    for seed in arguments.seeds:
        for routing in arguments.routing:
            for rule in arguments.rule if routing == "token_rounding" else arguments.rule[:1]:
                plan = Plan(routing, seed, rule, arguments.backend, device, arguments.every)
                progress = Progress(f"{plan.name}, seed {seed}", size.steps, arguments.quiet)
                runs.append(train(size, plan, corpus, progress))
                progress.close()
    return runs


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def chosen_device(name: str | None) -> torch.device:
    """The named device; without a name the GPU if there is one. Raises InvalidArgument for one that is not here."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()  # meta has tensors, but not what is in them
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise InvalidArgument("device", repr(name), f"cpu, or cuda where torch sees one ({reason})") from error
    return device


def _texts(paths: Sequence[Path] | None) -> list[str] | None:
    """What the files hold; None without files. Raises InvalidArgument for one that cannot be read."""
    try:
        return None if paths is None else [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    except OSError as error:
        raise InvalidArgument("text", str(error), "files that can be read") from error


def chosen_corpus(paths: Sequence[Path] | None, context: int) -> Corpus:
    """The text of the files, or of Python's. Raises InvalidArgument if it is too short, for any context or for this."""
    corpus = load_corpus(_texts(paths))
    shortest = min(map(len, corpus))
    if shortest < 2:
        found = f"{len(corpus.train)} bytes to train on and {len(corpus.held_out)} held out"
        raise InvalidArgument("text", found, "two or more of both: every tenth block of 20 paragraphs is held out")
    if context >= shortest:
        name = "held-out" if shortest == len(corpus.held_out) else "training"
        raise InvalidArgument("context", context, f"less than {shortest}, the {name} text")
    return corpus


def _check_seeds(seeds: Sequence[int]) -> None:
    for seed in seeds:
        if not -(2**63) <= seed < 2**64:
            raise InvalidArgument("seeds", seed, "what torch takes: at least -2^63 and less than 2^64")


def _run(arguments: argparse.Namespace) -> None:
    device = chosen_device(arguments.device)
    size = chosen_size(arguments, device)
    corpus = chosen_corpus(arguments.text, size.context)
    _check_seeds(arguments.seeds)
    report.check_folder(arguments.out)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{len(corpus.train)} bytes to train on, {len(corpus.held_out)} held out; on {name}\n"
        f"{size.blocks} blocks, hidden {size.hidden}, {size.per_token} of {size.experts} experts of "
        f"{size.intermediate}; {size.tokens} tokens a step, {size.rows_per_expert:.0f} rows per expert, "
        f"rounded to {size.tile_m}"
    )
    if "token_rounding" in arguments.routing and size.rows_per_expert < 2 * size.tile_m:
        print("warning: token rounding wants 2 tiles per expert or more: a smaller --tile-m or a larger --batch")
    began = time.perf_counter()
    runs = _trainings(arguments, size, device, corpus)
    text = report.runs_table(runs)
    speeds = layer.measure(device, arguments.backend) if arguments.layer and _is_hopper(device) else []
    if speeds:
        shape = f"T={layer.TOKENS} H={layer.HIDDEN} I={layer.INTERMEDIATE} E={layer.EXPERTS} K={layer.PER_TOKEN}"
        text += f"\n\nOne 7B layer, {shape}, bf16, router included:\n{report.speeds_table(speeds)}"
    if len(arguments.seeds) > 1:
        text += f"\n\n{report.spread_table(runs)}"
    print(f"\n{text}\n")
    setting = {"device": name, "torch": torch.__version__, "size": asdict(size), "rule": arguments.rule}
    path = report.save(runs, speeds, text, setting, arguments.out)
    print(f"{time.perf_counter() - began:.0f} s; wrote {path} and, beside it, table.txt and results.json")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 for options that cannot be."""
    p = parser()
    parsed = p.parse_args(arguments)
    missing = [name for name in ("matplotlib", "tqdm") if find_spec(name) is None]
    if missing:
        p.error(f"{' and '.join(missing)} not installed: pip install 'sonicmoe[plot]'")
    try:
        _run(parsed)
    except InvalidArgument as error:
        p.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
