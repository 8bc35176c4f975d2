"""Runs the PTX of a kernel on the host, a CTA at a time: for what can be found out about device code without a device.

All threads of a CTA are lanes of numpy arrays. Of the threads that may run those with the lowest program counter take a
step together, so that what has diverged meets again. Which warps may run is drawn anew every few steps, so that a
missing barrier shows; atomics come in any order; shared memory holds noise at first. Warp instructions demand that
the whole warp takes part, accesses that they are aligned and inside of a buffer. Only what the routing kernels need is
known: integers, fp32, and memory; an exponential is numpy's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

WARP = 32
U32, I32, U64, I64, F32 = np.uint32, np.int32, np.uint64, np.int64, np.float32
BASE = 1 << 32  # where global memory begins
_TYPES: dict[str, Any] = {"b16": np.uint16, "f16": np.float16, "b32": U32, "u32": U32, "s32": I32, "f32": F32}
_TYPES |= {"b64": U64, "u64": U64, "s64": I64}
_BITS: dict[int, Any] = {2: np.uint16, 4: U32, 8: U64}  # by bytes
_COMPARE = {"eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal"}
_BINARY: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "max": np.maximum,
    "min": np.minimum,
}


class Memory:
    """Global memory: copies of arrays, each in a place of its own with nothing around it."""

    def __init__(self) -> None:
        self.bytes = np.zeros(0, np.uint8)
        self.places: list[tuple[int, int]] = []

    def put(self, array: np.ndarray) -> int:
        start = -(-len(self.bytes) // 256) * 256 + 256
        raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        self.bytes = np.concatenate((self.bytes, np.zeros(start - len(self.bytes), np.uint8), raw))
        self.places.append((start, start + len(raw)))
        return BASE + start

    def get(self, address: int, like: np.ndarray) -> np.ndarray:
        start = address - BASE
        return self.bytes[start : start + like.nbytes].view(like.dtype).reshape(like.shape).copy()

    def check(self, offsets: np.ndarray, size: int) -> None:
        starts, ends = (np.array(column) for column in zip(*self.places, strict=True))
        place = np.searchsorted(starts, offsets, side="right") - 1
        assert (place >= 0).all() and (offsets + size <= ends[place]).all(), "an access outside of all buffers"


@dataclass(frozen=True)
class Instruction:
    guard: str
    negated: bool
    name: str
    parts: tuple[str, ...]
    operands: tuple[str, ...]
    line: str


@dataclass(frozen=True)
class Kernel:
    name: str
    code: tuple[Instruction, ...]
    labels: dict[str, int]


def parse(ptx: str) -> list[Kernel]:
    """The entry points, in their order."""
    kernels = []
    for text in re.split(r"\.visible \.entry", ptx)[1:]:
        name = text[: text.index("(")].strip()
        body = re.sub(r"//[^\n]*", "", text[text.index(")\n") + 1 :])
        code: list[Instruction] = []
        labels: dict[str, int] = {}
        for raw in re.split(r"[;\n]", body):
            line = raw.strip()
            while line.startswith("{") and not re.match(r"\{[%\w]+,", line):
                line = line[1:].strip()
            if line.endswith(":"):
                labels[line[:-1]] = len(code)
            elif line and line[0] not in ".})":
                code.append(_instruction(line))
        kernels.append(Kernel(name, tuple(code), labels))
    return kernels


def _instruction(line: str) -> Instruction:
    found = re.match(r"(?:@(!?)([%\w]+)\s+)?([\w.:]+)\s*(.*)$", line)
    assert found, line
    negated, guard, opcode, rest = found.groups()
    operands = tuple(o.strip() for o in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", rest) if o.strip())
    parts = opcode.split(".")
    return Instruction(guard or "", bool(negated), parts[0], tuple(parts[1:]), operands, line)


class Cta:
    """One CTA of a launch."""

    def __init__(
        self, kernel: Kernel, memory: Memory, params: list[bytes], threads: int, index: int, grid: int, seed: int
    ) -> None:
        self.kernel, self.memory, self.params, self.threads = kernel, memory, params, threads
        self.random = np.random.default_rng(seed)
        self.shared = self.random.integers(0, 256, 1 << 18, dtype=np.uint8)
        self.registers: dict[str, np.ndarray] = {}
        self.pc = np.zeros(threads, np.int64)
        self.special = {"%tid.x": np.arange(threads), "%ctaid.x": index, "%nctaid.x": grid, "%ntid.x": threads}

    def run(self) -> None:
        end = len(self.kernel.code)
        waiting = np.zeros(self.threads, bool)
        warps = self.threads // WARP
        allowed, steps = np.ones(self.threads, bool), 0
        while (self.pc < end).any():
            if steps % 16 == 0:
                allowed = np.repeat(self.random.random(warps) < 0.7, WARP)
            steps += 1
            can = (self.pc < end) & ~waiting
            if not can.any():
                waiting[:] = False
                self.pc[self.pc < end] += 1
                continue
            able = can & allowed if (can & allowed).any() else can
            at = int(self.pc[able].min())
            active = able & (self.pc == at)
            instruction = self.kernel.code[at]
            if instruction.name == "bar":
                waiting |= active
                continue
            self.step(instruction, active)

    def step(self, i: Instruction, active: np.ndarray) -> None:
        lanes = active
        if i.guard:
            lanes = active & (self.registers[i.guard] ^ i.negated)
        if i.name == "bra":
            self.pc[active] += 1
            self.pc[lanes] = self.kernel.labels[i.operands[0]]
            return
        if i.name == "ret":
            self.pc[active] += 1
            self.pc[lanes] = len(self.kernel.code)
            return
        if i.name not in ("griddepcontrol",) and lanes.any():
            with np.errstate(all="ignore"):
                getattr(self, "do_" + i.name, self.do_arithmetic)(i, lanes)
        self.pc[active] += 1

    # Operands

    def read(self, operand: str, dtype: Any, lanes: np.ndarray) -> np.ndarray:
        count = int(lanes.sum())
        if operand in self.registers:
            value = self.registers[operand][lanes]
            if value.dtype == bool or dtype is bool:
                return value
            return value.astype(_BITS[np.dtype(dtype).itemsize]).view(dtype)
        if operand in self.special:
            return np.broadcast_to(self.special[operand], self.threads)[lanes].astype(dtype)
        if operand.startswith("0f"):
            return np.full(count, int(operand[2:], 16), U32).view(F32)
        if operand == "__dynamic_shmem__0":
            return np.zeros(count, dtype)
        number = int(operand, 0)
        size = np.dtype(dtype).itemsize
        return np.full(count, number % (1 << 8 * size), _BITS[size]).view(dtype)

    def write(self, operand: str, value: np.ndarray, lanes: np.ndarray) -> None:
        if value.dtype != bool:
            value = value.view(_BITS[value.dtype.itemsize])
        old = self.registers.get(operand)
        if old is None or old.dtype != value.dtype:
            # What was never written is noise.
            old = np.full(self.threads, 0x5A, value.dtype)
            self.registers[operand] = old
        old[lanes] = value

    def addresses(self, operand: str, lanes: np.ndarray, dtype: Any) -> np.ndarray:
        base, _, offset = operand.strip("[]").partition("+")
        value = self.read(base, dtype, lanes).astype(np.int64)
        return value + int(offset or 0)

    def space(self, i: Instruction, operand: str, lanes: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """(bytes, offsets)"""
        if "shared" in i.parts:
            offsets, memory = self.addresses(operand, lanes, U32), self.shared
        else:
            offsets, memory = self.addresses(operand, lanes, U64) - BASE, self.memory.bytes
            self.memory.check(offsets, size)
        assert not (offsets % size).any(), f"not aligned: {i.line}"
        return memory, offsets

    # Instructions

    def do_ld(self, i: Instruction, lanes: np.ndarray) -> None:
        dtype = _TYPES[i.parts[-1]]
        size = np.dtype(dtype).itemsize
        if "param" in i.parts:
            found = re.match(r"\[.*_param_(\d+)(?:\+(\d+))?\]", i.operands[1])
            assert found
            start = int(found[2] or 0)
            value = np.frombuffer(self.params[int(found[1])][start : start + size], dtype)
            self.write(i.operands[0], np.repeat(value, int(lanes.sum())), lanes)
            return
        targets = i.operands[0].strip("{}").split(",")
        memory, offsets = self.space(i, i.operands[1], lanes, size * len(targets))
        words = memory.view(dtype)
        for n, target in enumerate(targets):
            self.write(target.strip(), words[offsets // size + n], lanes)

    def do_st(self, i: Instruction, lanes: np.ndarray) -> None:
        dtype = _TYPES[i.parts[-1]]
        size = np.dtype(dtype).itemsize
        sources = i.operands[1].strip("{}").split(",")
        memory, offsets = self.space(i, i.operands[0], lanes, size * len(sources))
        words = memory.view(dtype)
        for n, source in enumerate(sources):
            words[offsets // size + n] = self.read(source.strip(), dtype, lanes)

    def do_red(self, i: Instruction, lanes: np.ndarray) -> None:
        dtype = _TYPES[i.parts[-1]]
        memory, offsets = self.space(i, i.operands[0], lanes, 4)
        _BINARY[i.parts[-2]].at(memory.view(dtype), offsets // 4, self.read(i.operands[1], dtype, lanes))

    def do_atom(self, i: Instruction, lanes: np.ndarray) -> None:
        memory, offsets = self.space(i, i.operands[1], lanes, 4)
        values, words = self.read(i.operands[2], U32, lanes), memory.view(U32)
        old = np.empty_like(values)
        for n in self.random.permutation(len(values)):
            old[n] = words[offsets[n] // 4]
            words[offsets[n] // 4] += values[n]
        self.write(i.operands[0], old, lanes)

    def whole_warps(self, lanes: np.ndarray, i: Instruction) -> np.ndarray:
        """Numbers of the warps that take part, all of whose lanes must."""
        of_warp = lanes.reshape(-1, WARP)
        assert (of_warp.all(axis=1) == of_warp.any(axis=1)).all(), f"a part of a warp: {i.line}"
        return of_warp.any(axis=1)

    def do_shfl(self, i: Instruction, lanes: np.ndarray) -> None:
        self.whole_warps(lanes, i)
        target = i.operands[0].split("|")[0]
        values = self.read(i.operands[1], U32, lanes).reshape(-1, WARP)
        other = self.read(i.operands[2], I32, lanes).reshape(-1, WARP)
        own = np.arange(WARP)
        source = {"bfly": own ^ other, "idx": other % WARP, "up": own - other}[i.parts[1]]
        source = np.where(source < 0, own, source)
        self.write(target, np.take_along_axis(values, source, axis=1).reshape(-1), lanes)

    def do_vote(self, i: Instruction, lanes: np.ndarray) -> None:
        self.whole_warps(lanes, i)
        bits = self.read(i.operands[1], bool, lanes).reshape(-1, WARP).astype(U64) << np.arange(WARP, dtype=U64)
        self.write(i.operands[0], np.repeat(bits.sum(axis=1).astype(U32), WARP), lanes)

    def do_redux(self, i: Instruction, lanes: np.ndarray) -> None:
        self.whole_warps(lanes, i)
        dtype = _TYPES[i.parts[-1]]
        values = self.read(i.operands[1], dtype, lanes).reshape(-1, WARP)
        self.write(i.operands[0], np.repeat(_BINARY[i.parts[1]].reduce(values, axis=1).astype(dtype), WARP), lanes)

    def do_setp(self, i: Instruction, lanes: np.ndarray) -> None:
        assert len(i.parts) == 2, i.line
        a, b = (self.read(o, _TYPES[i.parts[1]], lanes) for o in i.operands[1:3])
        self.write(i.operands[0], getattr(np, _COMPARE[i.parts[0]])(a, b), lanes)

    def do_selp(self, i: Instruction, lanes: np.ndarray) -> None:
        a, b = (self.read(o, _TYPES[i.parts[0]], lanes) for o in i.operands[1:3])
        self.write(i.operands[0], np.where(self.read(i.operands[3], bool, lanes), a, b), lanes)

    def do_cvt(self, i: Instruction, lanes: np.ndarray) -> None:
        to, source = (_TYPES[p] for p in i.parts[-2:])
        self.write(i.operands[0], self.read(i.operands[1], source, lanes).astype(to), lanes)

    def do_mov(self, i: Instruction, lanes: np.ndarray) -> None:
        if i.parts[0] == "pred":
            if i.operands[1] in ("0", "1", "-1"):
                value = np.full(int(lanes.sum()), i.operands[1] != "0")
            else:
                value = self.read(i.operands[1], bool, lanes)
        elif i.operands[1].startswith("{"):
            low, high = (self.read(o.strip(), np.uint16, lanes) for o in i.operands[1].strip("{}").split(","))
            value = low.astype(U32) | (high.astype(U32) << U32(16))
        else:
            value = self.read(i.operands[1], _TYPES[i.parts[0]], lanes)
        self.write(i.operands[0], value, lanes)

    def do_arithmetic(self, i: Instruction, lanes: np.ndarray) -> None:
        if i.parts[-1] == "pred":
            values = [self.read(o, bool, lanes) for o in i.operands[1:]]
            value = ~values[0] if i.name == "not" else _BINARY[i.name](*values)
            self.write(i.operands[0], value, lanes)
            return
        dtype = _TYPES[i.parts[-1]]
        if "wide" in i.parts or "hi" in i.parts:
            a, b = (self.read(o, dtype, lanes).astype(I64 if dtype is I32 else U64) for o in i.operands[1:3])
            self.write(i.operands[0], (a * b >> 32).astype(dtype) if "hi" in i.parts else a * b, lanes)
            return
        if i.name in ("shl", "shr"):
            value, by = self.read(i.operands[1], dtype, lanes), self.read(i.operands[2], U32, lanes)
            size = np.dtype(dtype).itemsize * 8
            shift = np.left_shift if i.name == "shl" else np.right_shift
            shifted = shift(value, np.minimum(by, size - 1).astype(dtype))
            self.write(i.operands[0], np.where(by < size, shifted, value * 0).astype(dtype), lanes)
            return
        values = [self.read(o, dtype, lanes) for o in i.operands[1:]]
        if i.name in ("mad", "fma"):
            value = values[0] * values[1] + values[2]
        elif i.name in ("min", "max") and dtype is F32:
            value = (np.fmin if i.name == "min" else np.fmax)(*values)
        elif i.name in _BINARY:
            value = _BINARY[i.name](*values)
        else:
            value = _UNARY[i.name](values[0])
        self.write(i.operands[0], value.astype(U32 if i.name == "popc" else dtype), lanes)


def exp2(x: np.ndarray) -> np.ndarray:
    value = np.exp2(x.astype(F32)).astype(F32)
    return np.where(value < F32(1.1754944e-38), F32(0), value)


def reciprocal(x: np.ndarray) -> np.ndarray:
    return F32(1) / x


_UNARY: dict[str, Callable[..., Any]] = {
    "neg": np.negative,
    "abs": np.abs,
    "not": np.bitwise_not,
    "popc": lambda x: np.unpackbits(x.view(np.uint8).reshape(-1, 4), axis=1).sum(axis=1),
    "ex2": exp2,
    "rcp": reciprocal,
}


def launch(kernel: Kernel, memory: Memory, params: list[bytes], grid: int, threads: int, seed: int = 0) -> None:
    """All CTAs, one after the other, in any order."""
    order = np.random.default_rng(seed).permutation(grid)
    for n in order:
        Cta(kernel, memory, params, threads, int(n), grid, seed + int(n)).run()
