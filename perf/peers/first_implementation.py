"""The first implementation of SonicMoE, in an environment of its own, as its README uses it:

    python -m perf.run 7b --outside first PYTHON perf/peers/first_implementation.py

The parameters are told by their shapes. Gate and up rows of w1 are interleaved there.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Made = tuple[Callable[[], Any], list[Tensor], tuple[Tensor, Tensor, Tensor]]


def make(x: Tensor, T: int, H: int, I: int, E: int, K: int) -> Made:  # noqa: E741
    """See outside.py."""
    package, enums = importlib.import_module("sonicmoe"), importlib.import_module("sonicmoe.enums")  # theirs
    torch.manual_seed(0)
    moe = package.MoE(
        num_experts=E,
        num_experts_per_tok=K,
        hidden_size=H,
        intermediate_size=I,
        activation_function=enums.ActivationType.SWIGLU,
        add_bias=False,
        std=H**-0.5,
    ).to(device=x.device, dtype=x.dtype)
    parameters = list(moe.parameters())
    of_shape = {tuple(p.shape): p.detach() for p in parameters}
    if len(parameters) != 3 or of_shape.keys() != {(E, H), (E, 2 * I, H), (E, H, I)}:
        raise ValueError(f"parameters of shapes {[tuple(p.shape) for p in parameters]} are not a router, w1 and w2")
    w1 = of_shape[E, 2 * I, H]
    weights = of_shape[E, H], torch.cat([w1[:, 0::2], w1[:, 1::2]], dim=1), of_shape[E, H, I]
    return lambda: moe(x, kernel_backend_moe=package.KernelBackendMoE.sonicmoe), [x, *parameters], weights
