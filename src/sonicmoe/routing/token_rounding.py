"""Token rounding: top-K, then every expert's rows rounded to a multiple of the GEMMs' row tile."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sonicmoe import ops, reference
from sonicmoe.configs.tile import TILE_M
from sonicmoe.cute_kernels.rounding import RULES
from sonicmoe.jit.target import is_hopper
from sonicmoe.ops._once import once
from sonicmoe.reference.token_rounding import Rounded, round_counts
from sonicmoe.routing.checks import check, check_logits, check_no_nan, check_size
from sonicmoe.routing.plan import Routing, check_routed, plan
from sonicmoe.routing.scores import working
from sonicmoe.routing.topk import best

__all__ = ["RULES", "RoundingCounts", "TokenRounding", "round_counts", "rounding_counts", "route_token_rounding"]


def route_token_rounding(
    logits: Tensor,
    k: int,
    *,
    tile_m: int = TILE_M,
    rule: str = "nearest",
    generator: torch.Generator | None = None,
    validate: bool = False,
) -> Routing:
    """Top-K whose experts drop their weakest tokens, or take on more, until their rows fill whole tiles.

    For training; the counts f_e of plain top-K become multiples f'_e of tile_m with |f'_e - f_e| < tile_m.

    Args:
        logits: (T, E) of the router, any floating dtype. Computed in fp32; fp64 stays fp64. T: one microbatch.
        k: experts per token, 1 <= k <= E.
        tile_m: what is rounded to a multiple of; the rows of the GEMMs' tiles are 128.
        rule: "nearest": up if strictly nearer, so a tie drops; "stochastic": up with probability
            (f - floor f) / tile_m; "stochastic_mass": up with the share of the last tile's score mass that top-K chose;
            "balanced": up if else the running sum of f' - f would fall below -tile_m / 2; "up"; "down". An expert whose
            next multiple exceeds T goes down under every rule.
        generator: of the stochastic rules, on the device of logits; None: torch's own.
        validate: raise on NaN; this waits for the device. Otherwise NaN counts as -inf.

    Returns:
        S = R = min(T*E, T*k + E*(tile_m - 1)), bounds; with cu_slots. Slots of a token are ordered by expert. The score
        of a pair that top-K chose is its softmax over the chosen k logits, that of any other its softmax over all E;
        both are differentiable in logits. Unused slots have score 0. An expert keeps its chosen tokens before all
        others, each by descending score, the lower token first among equals. A token may keep no expert; for
        T < tile_m none does.

    Raises:
        InvalidArgument: for shapes, dtypes, k, tile_m or names that are not accepted; with validate, for NaN.

    Source: SonicMoE (arXiv 2512.14080) section 5 and algorithm 4.
    """
    check_logits(logits, k)
    check_size("tile_m", tile_m, 1)
    check("rule", repr(rule), rule in RULES, f"one of {', '.join(RULES)}")
    if generator is not None:
        same = generator.device.type == logits.device.type
        check("generator.device", generator.device, same, f"{logits.device}, as logits")
    if validate:
        check_no_nan("logits", logits)
    num_slots, draws = _num_slots(logits, k, tile_m), _draws(logits, rule, generator)
    if is_hopper(logits.device) and ops.token_rounding_has_kernel(logits, tile_m, num_slots):
        rounded = Rounded(*_RouteTokenRounding.apply(logits, draws, k, tile_m, rule, num_slots))
    else:
        rounded = reference.token_rounding(logits, draws, k, tile_m, rule, num_slots)
    return _routing(rounded, logits)


def _num_slots(logits: Tensor, k: int, tile_m: int) -> int:
    """A bound on what rounding can leave, which no value of the device is needed for."""
    tokens, experts = logits.shape
    return min(tokens * experts, tokens * k + experts * (tile_m - 1))


def _draws(logits: Tensor, rule: str, generator: torch.Generator | None = None) -> Tensor | None:
    """A number in [0, 1) for each expert, for the rules that need one."""
    if not rule.startswith("stochastic"):
        return None
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.rand((logits.shape[1],), dtype=dtype, device=logits.device, generator=generator)


def _routing(rounded: Rounded, logits: Tensor) -> Routing:
    scores, cu_rows, row_token, row_slot, slot_row, cu_slots, _, _ = rounded
    return Routing(scores, cu_rows, row_token, row_slot, slot_row, cu_slots, num_tokens=logits.shape[0])


class _RouteTokenRounding(torch.autograd.Function):
    """Token rounding by the kernels: keeps logits, and two bits for each of them, for the backward."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, draws: Tensor | None, k: int, tile_m: int, rule: str, num_slots: int
    ) -> tuple[Tensor, ...]:
        outputs = ops.steps(logits, draws).token_rounding(logits, draws, k, tile_m, rule, num_slots, "cute")
        rounded = Rounded(*outputs)
        ctx.save_for_backward(logits, rounded.cu_slots, rounded.chosen, rounded.kept)
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, dscores: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        return once("route_token_rounding", _RouteTokenRounding._gradients, ctx, dscores)

    @staticmethod
    def _gradients(ctx: Any, saved: list[Tensor], dscores: Tensor) -> tuple[Tensor | None, ...]:
        logits, cu_slots, chosen, kept = saved
        run = ops.steps(dscores, logits)
        dlogits = run.token_rounding_backward(dscores, logits, cu_slots, chosen, kept, "cute")
        return dlogits, None, None, None, None, None


class TokenRounding(NamedTuple):
    """`route_token_rounding` by the kernels, for a layer that keeps by itself what the backward needs."""

    k: int
    tile_m: int
    rule: str

    def has_kernels(self, logits: Tensor) -> bool:
        """Whether they take logits of this shape and dtype. False also for what `route_token_rounding` refuses."""
        if self.rule not in RULES or self.tile_m < 1 or not 1 <= self.k <= logits.shape[1]:
            return False
        return ops.token_rounding_has_kernel(logits, self.tile_m, _num_slots(logits, self.k, self.tile_m))

    def forward(self, run: Any, logits: Tensor) -> tuple[Routing, tuple[Tensor, ...]]:
        """The routing, and what else to keep for `backward`. run: the ops, or their bodies."""
        num_slots = _num_slots(logits, self.k, self.tile_m)
        draws = _draws(logits, self.rule)
        rounded = Rounded(*run.token_rounding(logits, draws, self.k, self.tile_m, self.rule, num_slots, "cute"))
        return _routing(rounded, logits), (rounded.cu_slots, rounded.chosen, rounded.kept)

    def backward(self, run: Any, dlogits: Tensor | None, dscores: Tensor, logits: Tensor, *kept: Tensor) -> Tensor:
        """The gradients of logits from those of the routing's scores, added to dlogits if there are any."""
        if dlogits is None:
            return run.token_rounding_backward(dscores, logits, *kept, "cute")
        run.token_rounding_backward_add_(dlogits, dscores, logits, *kept, "cute")
        return dlogits


class RoundingCounts(NamedTuple):
    """Pairs per expert, (E,) int32 on the device of the routing."""

    chosen: Tensor  # by top-K: f
    routed: Tensor  # after rounding: f'
    dropped: Tensor  # chosen, but not routed
    padded: Tensor  # routed, but not chosen


def rounding_counts(routing: Routing, logits: Tensor, k: int) -> RoundingCounts:
    """What rounding did to the top-k of logits (T, E): every expert has either dropped or padded pairs, or neither."""
    check_logits(logits, k)
    check_routed(routing, logits)
    ids = best(working(logits.detach()), k)
    chosen = plan(ids, logits.shape[1]).cu_rows.diff()
    routed = routing.cu_rows.diff()
    return RoundingCounts(chosen, routed, (chosen - routed).clamp(min=0), (routed - chosen).clamp(min=0))
