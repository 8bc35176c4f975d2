"""`--what router`: top-K, plan and token rounding beside torch's topk, softmax, sort and bincount."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import sonicmoe
from perf import check, tables
from perf.ledger import Row
from perf.problem import SEED, Form
from perf.protocol import measure, simple
from perf.session import Options, Session, brief, time_cells
from perf.shapes import Shape
from sonicmoe.routing.topk import Scoring, topk

ROUNDING = 1e-5  # of scores in fp32
DIFFERENT = 1e-3  # of the pairs: neighbours whose scores differ by a rounding
HEADER = ("step", "sonicmoe µs", "p20", "p80", "torch µs", "faster", "of plan")


def torch_steps(logits: Tensor, ids: Tensor, k: int) -> dict[str, Callable[[], object]]:
    """What a layer without these kernels does: torch.topk and softmax; a sort and a bincount of the ids."""

    def topk() -> tuple[Tensor, Tensor]:
        values, chosen = logits.topk(k, dim=1)
        return values.softmax(1), chosen

    def plan(chosen: Tensor = ids) -> tuple[Tensor, Tensor]:
        flat = chosen.reshape(-1)
        return flat.sort(stable=True)[1], flat.bincount(minlength=logits.shape[1]).cumsum(0)

    return {"topk": topk, "plan": plan, "route_topk": lambda: plan(topk()[1])}


def our_steps(logits: Tensor, ids: Tensor, scores: Tensor, k: int, form: Form) -> dict[str, Callable[[], object]]:
    """Top-K alone, and the public functions: route_assigned is the plan of given ids, route_topk top-K and plan."""
    experts = logits.shape[1]
    return {
        "topk": lambda: topk(logits, k, None, Scoring()),
        "plan": lambda: sonicmoe.route_assigned(ids, scores, num_experts=experts),
        "route_topk": lambda: sonicmoe.route_topk(logits, k),
        "token_rounding": lambda: sonicmoe.route_token_rounding(logits, k, tile_m=form.tile_m, rule=form.rule),
    }


def _pairs(routing: sonicmoe.Routing) -> Tensor:
    """Each routed pair as one number, in no order."""
    plan = check.pairs_of_plan(routing.cu_rows, routing.row_token, routing.row_slot, routing.scores)
    return plan.token * routing.num_experts + plan.expert


def why_wrong(step: str, out: Any, logits: Tensor, ids: Tensor, k: int, form: Form) -> str | None:
    """What is wrong about a step's result, None if nothing. Equal logits may be ordered either way."""
    if step == "topk":
        true = logits.topk(k, dim=1).values
        chosen = logits.gather(1, out[1].long())
        if not torch.equal(chosen, true):
            return f"{int((chosen != true).sum())} of the chosen logits are not the greatest"
        error = check.error(out[0], true.softmax(1))
        return None if error < ROUNDING else f"scores: relative error {error:.1e}"
    found = _pairs(out)
    if step == "token_rounding":
        # The same function on the CPU is plain torch. Its exponentials may order two nearly equal scores otherwise.
        routing = sonicmoe.route_token_rounding(logits.cpu(), k, tile_m=form.tile_m, rule=form.rule)
        expected = _pairs(routing).to(found.device)
    else:
        expected = check.pairs_of_ids(ids, ids).token * logits.shape[1] + ids.reshape(-1)
    twice = len(found) - len(found.unique())
    different = twice + int((~torch.isin(found, expected)).sum()) + int((~torch.isin(expected, found)).sum())
    return None if different <= DIFFERENT * len(expected) else f"{different} pairs of {len(expected)} are others"


def run(session: Session, shape: Shape, form: Form, options: Options) -> None:
    """On random logits in fp32; the shape's T, E and K count, no experts are computed."""
    generator = torch.Generator(form.device).manual_seed(SEED)
    logits = torch.randn((shape.T, shape.E), generator=generator, device=form.device)
    values, chosen = logits.topk(shape.K, dim=1)
    ids, scores = chosen.int(), values.softmax(1)
    ours = our_steps(logits, ids, scores, shape.K, form)
    setup: dict[str, float] = {}
    for step in list(ours):
        try:
            start = time.perf_counter()
            out = ours[step]()
            session.clock.synchronize()
            setup[step] = time.perf_counter() - start
            wrong = why_wrong(step, out, logits, ids, shape.K, form) if options.check else None
        except Exception as error:
            wrong = brief(error)
        if wrong:
            session.fail(f"{shape.name} {step}: {wrong}")
            del ours[step]
    cases = {f"sonicmoe {step}": simple(call) for step, call in ours.items()}
    cases |= {f"torch {step}": simple(call) for step, call in torch_steps(logits, chosen, shape.K).items()}
    # Bound by memory and latency, the steps draw far less than the power limit, and have nothing to settle.
    settings = dataclasses.replace(session.settings, state="settled", settle_seconds=0.02)
    with session.bar(settings.repeats, f"{shape.name} router") as bar:
        results = measure(cases, session.clock, settings, bar.update)
    rows = []
    for name, samples in results.items():
        impl, step = name.split()
        cells = {"setup_s": setup[step]} if impl == "sonicmoe" else {}
        rows.append(
            session.row(
                shape,
                dataclasses.replace(form, dtype="fp32"),
                impl,
                f"router-{step}",
                routing="token_rounding" if step == "token_rounding" else "topk",
                **time_cells(samples.times()),
                repeats=settings.repeats,
                protocol=f"router's steps in turns, {settings.state}, fp32 logits, {session.clock.name}",
                **cells,
            )
        )
    session.emit(rows)
    session.say(_table(shape, rows))


def _table(shape: Shape, rows: list[Row]) -> str:
    ms = {(r.impl, r.variant): r.ms_p50 for r in rows}

    def over(a: float | None, b: float | None) -> str:
        return f"{a / b:.2f}x" if a and b else "-"

    lines = []
    for r in rows:
        if r.impl == "sonicmoe":
            other, plan = ms.get(("torch", r.variant)), ms.get(("sonicmoe", "router-plan"))
            times = [tables.cell(1e3 * t, 4) for t in (r.ms_p50, r.ms_p20, r.ms_p80) if t is not None]
            theirs = tables.cell(1e3 * other if other else None, 4)
            lines.append(
                [r.variant.removeprefix("router-"), *times, theirs, over(other, r.ms_p50), over(r.ms_p50, plan)]
            )
    return f"\n{shape.name} T={shape.T} E={shape.E} K={shape.K}\n{tables.text(HEADER, lines)}"
