"""From logits, or a model's own choice, to a `Routing`, by ops or by plain torch. Nothing waits for the device."""

from sonicmoe.routing.given import route_assigned, route_pairs, route_rows
from sonicmoe.routing.invariants import check_invariants
from sonicmoe.routing.losses import load_balancing_loss, router_z_loss
from sonicmoe.routing.plan import Routing
from sonicmoe.routing.token_rounding import RULES, RoundingCounts, round_counts, rounding_counts, route_token_rounding
from sonicmoe.routing.topk import SCORINGS, route_topk

__all__ = [
    "RULES",
    "SCORINGS",
    "RoundingCounts",
    "Routing",
    "check_invariants",
    "load_balancing_loss",
    "round_counts",
    "rounding_counts",
    "route_assigned",
    "route_pairs",
    "route_rows",
    "route_token_rounding",
    "route_topk",
    "router_z_loss",
]
