"""Cross-compile every kernel for sm_90a and compare its resources with the record: `python -m sonicmoe.jit.aot`.

Needs neither a GPU nor a driver. The record holds counts, not machine code: registers, stack, shared memory, opcodes. A
kernel that spills, has a stack frame or asks for more shared memory than there is fails whatever the record says.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from sonicmoe.jit.spec import Spec

# The modules of cute_kernels that list specs.
FAMILIES = ("variants", "aggregate", "bias_grad", "bias_dot", "plan", "topk", "balance", "rounding")
RECORD = Path("tests") / "compile" / "resources.json"


def specs(families: Iterable[str] = FAMILIES) -> list[Spec]:
    """Every spec that is cross-compiled, each once."""
    found: dict[Spec, None] = {}
    for family in families:
        module = importlib.import_module(f"sonicmoe.cute_kernels.{family}")
        found.update(dict.fromkeys(module.aot_specs()))
    return list(found)


def measured(spec: Spec) -> dict[str, Any]:
    """The resources of a spec, or what went wrong."""
    from sonicmoe.jit import compile as compiler
    from sonicmoe.jit import inspect

    start = time.perf_counter()
    try:
        found = inspect.resources(compiler.compile_for_inspection(spec))
    except Exception as error:
        return {"faults": [f"{type(error).__name__}: {str(error).strip()[:2000]}"], "seconds": 0.0}
    return {"resources": found.as_dict(), "faults": found.faults(), "seconds": time.perf_counter() - start}


def label(spec: Spec) -> str:
    """The spec as the record's key: what differs from kernel to kernel, in one line."""
    return repr(spec)


def differences(recorded: dict[str, Any] | None, found: dict[str, Any]) -> list[str]:
    """What of a kernel's resources is not as recorded."""
    if recorded is None:
        return ["not in the record"]
    old, new = ({**r, **r["opcodes"]} for r in (recorded, found))
    names = [n for n in dict.fromkeys((*old, *new)) if n != "opcodes"]
    return [f"{n} {old.get(n, 0)} -> {new.get(n, 0)}" for n in names if old.get(n, 0) != new.get(n, 0)]


def dsl_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("nvidia-cutlass-dsl")


def compile_all(wanted: Sequence[Spec], jobs: int, quiet: bool) -> dict[str, dict[str, Any]]:
    """The result of `measured` by label, compiled by processes side by side."""
    found: dict[str, dict[str, Any]] = {}
    context = multiprocessing.get_context("spawn")  # the DSL's state does not survive a fork
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for number, (spec, result) in enumerate(zip(wanted, pool.map(measured, wanted), strict=True), 1):
            found[label(spec)] = result
            if not quiet:
                verdict = "; ".join(result["faults"]) or f"{result['seconds']:.1f} s"
                print(f"[{number}/{len(wanted)}] {label(spec)}: {verdict}", flush=True)
    return found


def verdicts(found: dict[str, dict[str, Any]], record: dict[str, Any], complete: bool) -> list[str]:
    """One line for each thing that is wrong."""
    lines = [f"{name}: {fault}" for name, result in found.items() for fault in result["faults"]]
    if record.get("dsl") != dsl_version():
        print(f"The record is of DSL {record.get('dsl')}, this is {dsl_version()}: counts are not compared.")
        return lines
    kernels = record["kernels"]
    for name, result in found.items():
        if "resources" in result:
            changes = differences(kernels.get(name), result["resources"])
            lines += [f"{name}: {', '.join(changes)}"] if changes else []
    if complete:
        lines += [f"{name}: in the record, but no longer compiled" for name in kernels if name not in found]
    return lines


def written(found: dict[str, dict[str, Any]]) -> str:
    """The record as text, a line for each kernel."""
    lines = [
        f"  {json.dumps(name)}: {json.dumps(result['resources'])}"
        for name, result in sorted(found.items())
        if "resources" in result
    ]
    return f'{{"dsl": "{dsl_version()}", "kernels": {{\n' + ",\n".join(lines) + "\n}}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m sonicmoe.jit.aot", description=__doc__.split("\n")[0])
    p.add_argument("--record", type=Path, default=RECORD)
    p.add_argument("--update", action="store_true", help="write the record instead of comparing with it")
    p.add_argument("--only", nargs="+", default=list(FAMILIES), choices=FAMILIES, help="these modules' kernels")
    p.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    p.add_argument("--quiet", action="store_true", help="only what is wrong")
    a = p.parse_args(arguments)
    start, complete = time.perf_counter(), set(a.only) == set(FAMILIES)
    record: dict[str, Any] = {"dsl": dsl_version(), "kernels": {}}
    if a.record.exists():
        record = json.loads(a.record.read_text())
    if a.update and not complete and record["kernels"] and record["dsl"] != dsl_version():
        # One version is written for all entries: those that are kept would pass for this one's.
        p.error(f"the record is of DSL {record['dsl']}, this is {dsl_version()}: --update all of it, without --only")
    found = compile_all(specs(a.only), a.jobs, a.quiet)
    if a.update:
        kept = {} if complete else {name: {"resources": r} for name, r in record["kernels"].items()}
        a.record.parent.mkdir(parents=True, exist_ok=True)
        a.record.write_text(written({**kept, **found}))
        wrong = [f"{name}: {fault}" for name, result in found.items() for fault in result["faults"]]
    else:
        wrong = verdicts(found, record, complete)
    print("\n".join([*wrong, f"{len(found)} kernels, {time.perf_counter() - start:.0f} s, {len(wrong)} wrong"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
