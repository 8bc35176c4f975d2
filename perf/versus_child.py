"""Compiles grouped GEMMs of the sonicmoe that it imports, into the cache on disk; started by versus.py.

Reads {"gpu": key of its table, "jobs": processes, "gemms": [[variant, E, n, k, dtype, halves, activation or null]...]}
and prints, in that order, [file or null, tile configuration or what went wrong, whether it takes a pace's counter].
"""

import json
import multiprocessing
import os
import sys
from typing import Any

import cutlass.cute  # noqa: F401  # once, before the processes are forked

from sonicmoe.activations import Activation
from sonicmoe.configs.choice import choose
from sonicmoe.cute_kernels.variants import GemmSpec, outputs
from sonicmoe.jit import cache


def compiled(request: tuple[str, list[Any]]) -> tuple[str | None, str, bool]:
    gpu, (variant, groups, n, k, dtype, halves, activation) = request
    try:
        tile = choose(variant, groups, n, k, outputs(variant, halves, True), halves, gpu)
        act = activation and Activation.parse(activation)
        spec = GemmSpec(variant, groups, n, k, dtype, tile, halves, act=act)
        cache.fill(spec)
        folder = cache.folder()
        assert folder is not None, "SONICMOE_CACHE_DIR is empty"
        path = cache.path_of(spec, folder)
        found = [form for form in (path, path.with_suffix(".o")) if form.exists()]  # also of trees without libraries
        paced = getattr(spec, "paced", False)  # older trees know no pace
        return (str(found[0]), str(tile), paced) if found else (None, spec.why_invalid() or "another has it", False)
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error).strip()[:500]}", False


def main() -> None:
    told = json.load(sys.stdin)
    requests = [(told["gpu"], gemm) for gemm in told["gemms"]]
    with multiprocessing.get_context("fork").Pool(told["jobs"], maxtasksperchild=1) as pool:
        found = pool.map(compiled, requests, chunksize=1)
    # Straight to the descriptor: compilers print as they like.
    os.write(1, f"\n{json.dumps(found)}\n".encode())


if __name__ == "__main__":
    main()
