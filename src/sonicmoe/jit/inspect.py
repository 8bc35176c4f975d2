"""What a compiled kernel contains: registers, spills, shared memory, opcodes. Reads machine code, runs nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sonicmoe.configs.tile import RESERVED, SHARED_MEMORY

OPCODES = (
    "HGMMA UTMALDG UTMASTG LDGSTS LDSM STSM USETMAXREG LDL STL LDG STG LDS STS MUFU SHFL REDUX MATCH RED REDG ATOM "
    "ATOMG ATOMS SYNCS BAR FENCE ACQBULK PREEXIT"
).split()
_GLOBAL = re.compile(r"\b(?:LDG|STG|LDGSTS|UTMALDG|UTMASTG|UBLKCP|RED|REDG|ATOM|ATOMG)\b")
SHARED_MEMORY_IN_ALL = SHARED_MEMORY + RESERVED


@dataclass(frozen=True)
class Resources:
    """Of all kernels of a spec together: the largest registers, stack and shared memory, the sum of opcodes.

    kernels     how many there are
    registers   at launch; a kernel that redistributes them (setmaxnreg) shows the launch limit
    setmaxnreg  what they are redistributed to, producers first
    early       accesses to global memory before the wait for earlier launches
    """

    kernels: int
    registers: int
    stack: int
    shared: int
    setmaxnreg: tuple[int, ...]
    early: int
    opcodes: dict[str, int]

    def faults(self) -> list[str]:
        """What must not be, whatever the record says."""
        found = [f"{name} {self.opcodes[name]}: spills" for name in ("LDL", "STL") if self.opcodes.get(name)]
        if self.stack:
            found.append(f"a stack frame of {self.stack} bytes")
        if self.opcodes.get("ACQBULK") != self.kernels:
            found.append("a kernel does not wait, once, for the launches before it")
        if self.setmaxnreg and self.setmaxnreg[0] + 2 * self.setmaxnreg[1] > 3 * self.registers:
            found.append(f"setmaxnreg {self.setmaxnreg} of three times {self.registers}: waits for ever")
        if self.shared > SHARED_MEMORY_IN_ALL:
            found.append(f"{self.shared} bytes of shared memory, {SHARED_MEMORY_IN_ALL} are there")
        return found

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"setmaxnreg": list(self.setmaxnreg)}


def resources(compiled: Any) -> Resources:
    """Of a function of `compile_for_inspection`. Needs cuobjdump and nvdisasm, of the wheels or on the PATH."""
    ptx = str(compiled.artifacts.PTX or "")
    usage, sass = disassembled(compiled)
    kernels = [tuple(map(int, k)) for k in re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)]
    found = Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", sass, re.MULTILINE))
    return Resources(
        kernels=len(kernels),
        registers=max(k[0] for k in kernels),
        stack=max(k[1] for k in kernels),
        shared=dynamic_shared_memory(compiled) + max(RESERVED, *(k[2] for k in kernels)),
        setmaxnreg=tuple(int(n) for n in re.findall(r"setmaxnreg\.\w+\.\S+\s+(\d+)", ptx)),
        early=early(sass),
        opcodes={name: found[name] for name in OPCODES if found[name]},
    )


def early(sass: str) -> int:
    """Accesses to global memory before the wait for earlier launches, of all kernels together."""
    kernels = re.split(r"^\s*\.section\s+\.text\.", sass, flags=re.MULTILINE)[1:]
    return sum(len(_GLOBAL.findall(kernel.partition("ACQBULK")[0])) for kernel in kernels)


def disassembled(compiled: Any) -> tuple[str, str]:
    """(what cuobjdump says of registers and memory, the machine code) of a function of `compile_for_inspection`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.artifacts.CUBIN)
        file.flush()
        return _output("cuobjdump", "-res-usage", file.name), _output("nvdisasm", "-c", file.name)


def dynamic_shared_memory(compiled: Any) -> int:
    """Of a launch, in bytes.

    It is not in the machine code but in the generated host code: the largest constant that is stored and is a legal
    size of a block's shared memory.
    """
    sizes = [0]
    for function in re.split(r"^\s*llvm\.func", str(compiled.ir_module), flags=re.MULTILINE):
        constants = dict(re.findall(r"(%\w+) = llvm\.mlir\.constant\((\d+) : i64\)", function))
        stored = re.findall(r"llvm\.store (%\w+), %\w+ : i64, !llvm\.ptr", function)
        sizes += [n for s in stored if (n := int(constants.get(s, 0))) <= SHARED_MEMORY_IN_ALL and n % 8 == 0]
    return max(sizes)


def _tool(name: str) -> str:
    """The path of a tool: of its wheel, which is as new as the compiler, else of the PATH."""
    for entry in sys.path:
        for found in sorted(Path(entry, "nvidia").glob(f"*/bin/{name}")):
            if os.access(found, os.X_OK):
                return str(found)
    on_path = shutil.which(name)
    if on_path is None:
        raise FileNotFoundError(f"{name} is missing: pip install 'sonicmoe[test]' brings it")
    return on_path


def _output(tool: str, *arguments: str) -> str:
    # cuobjdump calls nvdisasm by its name.
    path = os.pathsep.join((str(Path(_tool("nvdisasm")).parent), os.environ.get("PATH", "")))
    command = [_tool(tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}).stdout
