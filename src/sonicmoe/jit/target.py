"""Which device the kernels run on. Imports neither the DSL nor anything of a GPU."""

from __future__ import annotations

import torch

HOPPER = (9, 0)

_capabilities: dict[torch.device, tuple[int, int]] = {}


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a CUDA device, None for any other device."""
    if device.type != "cuda":
        return None
    # Properties, not get_device_capability, and no cache: torch.compile traces through the first only, and guards what
    # the second holds, so that a later entry would have it compile again.
    if torch.compiler.is_compiling():
        return _read(device)
    if device not in _capabilities:
        _capabilities[device] = _read(device)
    return _capabilities[device]


def _read(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


def is_hopper(device: torch.device) -> bool:
    """Whether the kernels run on this device."""
    return capability(device) == HOPPER
