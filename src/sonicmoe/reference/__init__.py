"""The steps of the layer in plain torch: ground truth for the kernels, and the ops' body for backend="torch".

Every step has the name, the arguments and the results of the op and of the kernel. Any device, any float dtype:
products and sums are computed in at least fp32 and rounded to the storage dtype exactly where the kernels store (h,
also where it is not kept, a, y, dh, a_s, dx_rows, weight gradients). fp64 stays fp64, for gradcheck. Rows of the
buffers that no expert has are zero.

The loops over experts read cu_rows on the host: on a GPU every step synchronises. That is accepted of a reference.
"""

from sonicmoe.reference.backward import (
    bias_grad,
    down_dgrad,
    down_dgrad_,
    down_wgrad,
    down_wgrad_add_,
    down_wgrad_aggregate_,
    up_dgrad,
    up_wgrad,
    up_wgrad_add_,
)
from sonicmoe.reference.balance import load_balance, load_balance_backward
from sonicmoe.reference.forward import aggregate, down_proj, up_proj
from sonicmoe.reference.plan import plan
from sonicmoe.reference.token_rounding import token_rounding, token_rounding_backward, token_rounding_backward_add_
from sonicmoe.reference.topk import topk, topk_backward, topk_backward_add_

__all__ = [
    "aggregate",
    "bias_grad",
    "down_dgrad",
    "down_dgrad_",
    "down_proj",
    "down_wgrad",
    "down_wgrad_add_",
    "down_wgrad_aggregate_",
    "plan",
    "load_balance",
    "load_balance_backward",
    "token_rounding",
    "token_rounding_backward",
    "token_rounding_backward_add_",
    "topk",
    "topk_backward",
    "topk_backward_add_",
    "up_dgrad",
    "up_proj",
    "up_wgrad",
    "up_wgrad_add_",
]
