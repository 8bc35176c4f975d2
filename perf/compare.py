"""Two ledgers side by side: `python -m perf.compare A B`. Exit status 1 if anything of B is slower by 3% or more."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from perf import commandline, tables
from perf.ledger import Row

LIMIT = 0.03
OURS = "sonicmoe"


class Change(NamedTuple):
    """speed: B's relative to A's, less 1; -0.03 is 3% slower."""

    before: Row
    after: Row
    speed: float


def changes(before: Sequence[Row], after: Sequence[Row], impl: str = OURS) -> list[Change]:
    """What both measured, the newest row of each, in A's order. impl: "" for every implementation.

    Rows of another GPU or protocol are not compared with each other, nor rows without a time.
    """

    def timed(rows: Sequence[Row]) -> dict[tuple[object, ...], Row]:
        mine = sorted((r for r in rows if r.ms_p50 and r.impl.startswith(impl)), key=lambda r: r.date)
        return {(r.gpu, r.protocol, *r.key): r for r in mine}

    old, new = timed(before), timed(after)
    both = [(old[key], new[key]) for key in old if key in new]
    return [Change(a, b, (a.ms_p50 or 0.0) / (b.ms_p50 or 1.0) - 1) for a, b in both]


def slower(found: Sequence[Change], limit: float = LIMIT) -> list[Change]:
    """The changes for the worse: by the limit or more."""
    return [c for c in found if c.speed <= -limit]


def table(found: Sequence[Change], limit: float = LIMIT) -> str:
    header = ("what", "routing", "A ms", "B ms", "speed", "A", "B", "")
    bad = {id(c) for c in slower(found, limit)}
    lines = [
        [
            f"{c.after.shape or c.after.T} {c.after.impl} {c.after.variant}",
            c.after.routing,
            tables.cell(c.before.ms_p50, 4),
            tables.cell(c.after.ms_p50, 4),
            f"{100 * c.speed:+.1f}%",
            c.before.commit,
            c.after.commit,
            "SLOWER" if id(c) in bad else "",
        ]
        for c in found
    ]
    return tables.text(header, lines)


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m perf.compare", description=__doc__)
    p.add_argument("before", type=Path, metavar="A", help="a ledger, or a folder of them")
    p.add_argument("after", type=Path, metavar="B")
    p.add_argument(
        "--limit", type=commandline.amount, default=100 * LIMIT, metavar="PERCENT", help="slower by this is a failure"
    )
    p.add_argument("--impl", default=OURS, help="of this implementation; '' for all")
    read = commandline.read_ledger
    a, (before, after) = commandline.parsed(p, arguments, lambda a: (read(a.before), read(a.after)))
    found = changes(before, after, a.impl)
    if not found:
        print("nothing that both ledgers measured", file=sys.stderr)
        return 2
    print(table(found, a.limit / 100))
    bad = slower(found, a.limit / 100)
    print(f"{len(found)} compared, {len(bad)} slower by {a.limit:g}% or more")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
