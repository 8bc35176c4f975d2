"""Runs a function in several processes that form a group."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# One process imports torch, and those of the ranks are forked from it: importing takes longer than all that is tested.
multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "sonicmoe.integrations.distributed"])


def in_processes(world: int, check: Callable[..., None], *args: Any, backend: str = "gloo") -> None:
    """check(rank, world, *args) on each rank; raises what the first failing one raised, and ends the others.

    With backend "nccl" each rank has a GPU of its own, its current one.
    """
    with tempfile.TemporaryDirectory() as folder:
        # The group removes the file itself.
        arguments = (world, backend, f"{folder}/meeting", check, args)
        mp.start_processes(_process, arguments, world, join=True, start_method="forkserver")


def _process(
    rank: int, world: int, backend: str, meeting: str, check: Callable[..., None], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    # Compiling kernels is allowed to take longer than anything on the CPU.
    timeout = timedelta(seconds=120 if backend == "nccl" else 20)
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timeout)
    check(rank, world, *args)
    dist.destroy_process_group()
