"""SonicMoE: mixture-of-experts layers that keep only x, h and the routing, on CuTe kernels for Hopper.

    routing = sonicmoe.route_topk(logits, k=8)
    o = sonicmoe.moe_experts(x, w1, w2, routing)

or as a module, router included: `sonicmoe.MoE`. Importing neither needs nor touches a GPU.
"""

from sonicmoe.activations import GPT_OSS, Activation
from sonicmoe.errors import InvalidArgument
from sonicmoe.functional import moe_experts
from sonicmoe.moe import MoE
from sonicmoe.routing import (
    Routing,
    load_balancing_loss,
    route_assigned,
    route_pairs,
    route_rows,
    route_token_rounding,
    route_topk,
)

__version__ = "0.1.0"

__all__ = [
    "GPT_OSS",
    "Activation",
    "InvalidArgument",
    "MoE",
    "Routing",
    "__version__",
    "load_balancing_loss",
    "moe_experts",
    "route_assigned",
    "route_pairs",
    "route_rows",
    "route_token_rounding",
    "route_topk",
]
