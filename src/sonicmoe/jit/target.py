"""Which device the kernels run on. Imports neither the DSL nor anything of a GPU."""

from __future__ import annotations

import torch

HOPPER = (9, 0)

_capabilities: dict[torch.device, tuple[int, int]] = {}


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a CUDA device, None for any other device."""
    if device.type != "cuda":
        return None
    # A dictionary, not lru_cache, and properties, not get_device_capability: torch.compile traces through these only.
    found = _capabilities.get(device)
    if found is None:
        properties = torch.cuda.get_device_properties(device)
        found = _capabilities[device] = (properties.major, properties.minor)
    return found


def is_hopper(device: torch.device) -> bool:
    """Whether the kernels run on this device."""
    return capability(device) == HOPPER
