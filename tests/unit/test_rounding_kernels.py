"""Token rounding's device code, run on the host from its PTX: the same pairs, slots and rows as the reference's.

As in tests/gpu, the kernels are held to their own scores, here made from what the first of them reports of each token.
"""

from __future__ import annotations

import math
import struct

import pytest
import torch
from routing_cases import skewed_logits, tied_logits
from torch import Tensor

pytest.importorskip("numpy")
pytest.importorskip("cutlass", exc_type=ImportError)
import numpy as np
import ptx_machine
from ptx_machine import Kernel, Memory, exp2, parse

from sonicmoe.cute_kernels.memory_bound.rounding_choose import ABSENT, CHOSEN, LOG2_E
from sonicmoe.cute_kernels.memory_bound.rounding_choose import THREADS as CHOOSE_THREADS
from sonicmoe.cute_kernels.memory_bound.rounding_pairs import THREADS as PAIRS_THREADS
from sonicmoe.cute_kernels.memory_bound.rounding_select import Select, TokenRow
from sonicmoe.cute_kernels.rounding import RULES, RoundingSpec, masks
from sonicmoe.jit import compile as compiler
from sonicmoe.ops._cute import NAMES
from sonicmoe.reference.scores import working
from sonicmoe.reference.token_rounding import Rounded, packed, pair_scores, rounded

LARGEST = torch.finfo(torch.float32).max


class Launches:
    """Buffers full of noise, and the launches that fill them."""

    def __init__(self, logits: Tensor, k: int, tile_m: int, rule: str, draws: Tensor | None, seed: int = 0) -> None:
        tokens, experts = logits.shape
        self.tokens, self.experts, self.words, self.seed = tokens, experts, masks(tokens), seed
        self.spec = RoundingSpec(experts, k, NAMES[logits.dtype], rule, tile_m)
        self.kernels = parse(str(compiler.compile_for_inspection(self.spec).artifacts.PTX))
        slots, noise = min(tokens * experts, tokens * k + experts * (tile_m - 1)), np.random.default_rng(seed)
        shapes: dict[str, tuple[int, ...]] = {
            "softmax": (tokens, 4),
            "tiles": (experts, self.words, 4),
            "state": (2 * experts + self.words,),
            "marks": (self.words, experts, 2),
            "scores": (slots,),
            "cu_rows": (experts + 1,),
            **dict.fromkeys(("row_token", "row_slot", "slot_row"), (slots,)),
            "cu_slots": (tokens + 1,),
            **dict.fromkeys(("chosen", "kept"), (tokens, masks(experts))),
        }
        self.arrays = {n: noise.integers(-(2**31), 2**31, s).astype(np.int32) for n, s in shapes.items()}
        if self.spec.counted:
            self.arrays["state"][:] = 0
        self.arrays["logits"] = logits.view(torch.int32 if logits.element_size() == 4 else torch.int16).numpy()
        if draws is not None:
            self.arrays["draws"] = draws.numpy()
        self.memory = Memory()
        self.at = {name: self.memory.put(array) for name, array in self.arrays.items()}

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.memory.get(self.at[name], self.arrays[name]))

    def kernel(self, name: str) -> Kernel:
        return next(k for k in self.kernels if f"kernel_{name}" in k.name)

    def params(self, *names: str) -> list[bytes]:
        """Of tensors: address, the first extent that is known at run time, and of tiles a stride."""
        extents = {n: a.shape[0] for n, a in self.arrays.items()} | {"tiles": self.words}
        return [struct.pack("<QiiQ", self.at[n], extents[n], 0, 4 * self.words) for n in names if n in self.at]

    def launch(self, name: str, grid: int, threads: int, *names: str) -> None:
        ptx_machine.launch(self.kernel(name), self.memory, self.params(*names), grid, threads, self.seed)

    def choose(self) -> None:
        names = ("logits", "chosen", "softmax", "tiles", "state")
        self.launch("Choose", self.words, CHOOSE_THREADS, *names)

    def select(self) -> None:
        select = Select(TokenRow(self.experts, self.spec.dtype), self.spec.rule, self.spec.tile_m)
        names = ("logits", "softmax", "tiles", "draws", "state", "marks")
        self.launch("Select", self.experts, select.threads, *names)

    def pairs(self) -> None:
        inputs = ("logits", "softmax", "chosen", "state", "marks")
        outputs = ("scores", "cu_rows", "row_token", "row_slot", "slot_row", "cu_slots", "kept")
        self.launch("Pairs", self.words, PAIRS_THREADS, *inputs, *outputs)

    def scores(self, logits: Tensor, chosen: Tensor) -> Tensor:
        """Of all pairs, as the kernels have them."""
        softmax = self["softmax"].view(torch.float32)
        z = working(logits).float().clamp(max=LARGEST)
        terms = torch.from_numpy(exp2(((z - softmax[:, :1]) * torch.tensor(LOG2_E, dtype=torch.float32)).numpy()))
        return terms * torch.where(chosen, softmax[:, 1:2], softmax[:, 2:3])


def check(logits: Tensor, k: int, tile_m: int, rule: str, seed: int = 0) -> None:
    draws = None
    if rule.startswith("stochastic"):
        draws = torch.rand(logits.shape[1], generator=torch.Generator().manual_seed(seed))
    launches = Launches(logits, k, tile_m, rule, draws, seed)
    launches.choose()
    launches.select()
    launches.pairs()
    true_scores, chosen = pair_scores(working(logits.double()), k)
    scores = launches.scores(logits, chosen)
    assert ((scores.double() - true_scores).abs() <= 4e-6 * true_scores + 2e-38).all()
    expected = rounded(scores, chosen, draws, tile_m, rule, launches.arrays["scores"].shape[0])
    actual = Rounded(launches["scores"].view(torch.float32), *(launches[n] for n in Rounded._fields[1:]))
    for name, a, e in zip(Rounded._fields, actual, expected, strict=True):
        assert torch.equal(a, e), f"{name} of {rule}"


def not_finite() -> Tensor:
    logits = skewed_logits(40, 5)
    logits[0], logits[1, 1:], logits[2, 0], logits[3, 2] = -math.inf, -math.inf, math.nan, math.inf
    logits[4], logits[5, ::2], logits[6] = 0.0, -0.0, math.nan
    return logits


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str) -> None:
    check(skewed_logits(70, 4, 1.0), 2, 16, rule)
    check(tied_logits(70, 3, levels=2), 2, 16, rule, seed=1)


@pytest.mark.parametrize(
    ("logits", "k", "tile_m", "rule"),
    [
        (not_finite(), 3, 16, "nearest"),
        (not_finite(), 2, 8, "stochastic_mass"),
        (torch.zeros(70, 4), 2, 16, "up"),
        (skewed_logits(40, 33, 1.0).bfloat16(), 5, 8, "nearest"),
        (skewed_logits(40, 10, 1.0).half(), 10, 16, "balanced"),
        (skewed_logits(65, 5, 1.0), 2, 1, "nearest"),
        (skewed_logits(31, 6, 1.0), 2, 31, "up"),
        (skewed_logits(1, 3), 2, 1, "down"),
        (skewed_logits(400, 2, 0.3), 1, 150, "stochastic_mass"),
    ],
    ids=lambda value: "x".join(map(str, value.shape)) if isinstance(value, Tensor) else str(value),
)
def test_shapes_and_values(logits: Tensor, k: int, tile_m: int, rule: str) -> None:
    check(logits, k, tile_m, rule)


@pytest.mark.parametrize("k", [3, 10, 40])
def test_what_an_expert_knows_of_its_tiles(k: int) -> None:
    """Of many experts, where the two greatest logits of a lane are looked at first; by the first launch alone."""
    logits = skewed_logits(70, 390, 0.5)
    logits[:20, 5::32] += 20  # all of the K greatest in the same lane
    logits[20:40] = tied_logits(20, 390)
    launches = Launches(logits, k, 16, "nearest", None)
    launches.choose()
    chosen = pair_scores(working(logits.double()), k)[1]
    assert torch.equal(launches["chosen"], packed(chosen))
    bits = launches.scores(logits, chosen).view(torch.int32)
    pad = (0, 0, 0, 32 * launches.words - 70)
    by_tile = [
        torch.nn.functional.pad(t, pad, value=v).unflatten(0, (-1, 32)) for t, v in ((chosen, False), (bits, -1))
    ]
    is_chosen, score = by_tile
    others = torch.where(is_chosen, ABSENT, score).amax(dim=1)
    weakest = torch.where(is_chosen, score ^ (CHOSEN - 1), ABSENT).amax(dim=1)
    expected = torch.stack((packed(is_chosen.mT.flatten(0, 1)).view(launches.words, 390), others, weakest), dim=2)
    assert torch.equal(launches["tiles"][..., :3], expected.transpose(0, 1))
    assert not launches["state"][2 * 390 :].any()


def test_the_machine_sees_a_missing_barrier_and_a_wrong_access() -> None:
    logits = skewed_logits(70, 5, 1.0)
    launches = Launches(logits, 2, 16, "nearest", None)
    kernel = launches.kernel("Choose")
    code = tuple(i for i in kernel.code if i.name != "bar")
    assert len(code) < len(kernel.code)
    unguarded = [n for n, i in enumerate(kernel.code) if i.name == "bar"]
    labels = {label: at - sum(n < at for n in unguarded) for label, at in kernel.labels.items()}
    launches.kernels = [Kernel(kernel.name, code, labels)]
    chosen = pair_scores(working(logits.double()), 2)[1]
    seen = 0
    for seed in range(4):
        launches.seed = seed
        launches.choose()
        seen += not torch.equal(launches["chosen"], packed(chosen))
    assert seen
    with pytest.raises(AssertionError, match="outside of all buffers"):
        launches.memory.check(np.array([launches.memory.places[0][1] - 2]), 4)
