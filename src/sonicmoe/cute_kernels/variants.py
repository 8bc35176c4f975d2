"""The table of grouped GEMMs: each variant is a choice of groups, operand sources, epilogue and schedule.

| variant    | groups   | A              | B                 | epilogue                    |
|------------|----------|----------------|-------------------|-----------------------------|
| up_proj    | GroupedM | GatherRows     | Weight            | ActStore -> h, a            |
| down_proj  | GroupedM | Rows           | Weight            | StoreRows -> y              |
| down_dgrad | GroupedM | GatherRows     | WeightTransposed  | DActReduce -> dh, a_s, parts |
| up_dgrad   | GroupedM | Rows           | WeightTransposed  | StoreRows -> dx_rows        |
| down_wgrad | GroupedK | GatherColumns  | RaggedColumns     | StoreWeight                 |
| up_wgrad   | GroupedK | GatherColumns  | RaggedColumns     | StoreWeight, transposed     |
| *_add      | as the weight gradient of the name before it            | AddWeight, into fp32        |

`n` and `k` are those of one half where gate and up lie side by side. The launch takes (A tensors), (B tensors),
(output tensors), cu_rows, the counter of the pace (pace.py) or None, number of CTAs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..configs.tile import TileConfig

if TYPE_CHECKING:
    from ..activations import Activation
    from .grouped_gemm import GroupedGemm

ARCH = "sm_90a"
# How a GEMM spares the L2 cache; measured (docs/notes/2026-11-28-long-k.md, 2026-11-29-in-layers.md).
BAND, BANDED_BYTES = 16, 8 << 20  # n tiles of a band, at most; of groups with a B larger than this
PACED_K = 4096  # one pace: from this k on


def outputs(variant: str, halves: int, keep_h: bool = True) -> int:
    """Of a sub-tile, those that take buffers: by them the tuned tables tell an up_proj with h from one without."""
    if variant == "up_proj":
        return 1 + (halves if keep_h else 0)
    return 0 if variant.endswith("_add") else 1


@dataclass(frozen=True)
class GemmSpec:
    """Everything that a grouped GEMM is compiled for. Row counts are not in it: they may change from call to call.

    n, k: columns and reduction length of one half (for the weight gradients k is the m axis: the gathered columns);
    halves: 2 if gate and up lie side by side; interleaved: whether the weight's rows alternate between them.
    """

    variant: str
    groups: int
    n: int
    k: int
    dtype: str  # "bf16" | "fp16"
    tile: TileConfig
    halves: int = 1
    interleaved: bool = False
    act: Activation | None = None
    bias: bool = False
    keep_h: bool = True

    @property
    def name(self) -> str:
        return f"{self.variant}_{ARCH}"

    @property
    def adds(self) -> bool:
        """Whether the result is added to fp32 numbers instead of stored"""
        return self.variant.endswith("_add")

    @property
    def outs(self) -> int:
        return outputs(self.variant, self.halves, self.keep_h)

    @property
    def _reduces_rows(self) -> bool:
        return "wgrad" in self.variant

    @property
    def _group_bytes(self) -> int:
        """Bytes of a group's B: a weight, whose halves are none of down_dgrad's business; 0 where rows are reduced"""
        halves = self.halves if self.variant.startswith("up") else 1
        return 0 if self._reduces_rows else 2 * halves * self.n * self.k

    def band(self, n_tiles: int) -> int:
        """n tiles of a band (groups.py): all, or equal parts of them"""
        bands = -(-n_tiles // BAND) if self._group_bytes > BANDED_BYTES else 1
        return -(-n_tiles // bands)

    @property
    def paced(self) -> bool:
        """Whether CTAs keep to one pace (pace.py)"""
        k = self.k * (self.halves if self.variant == "up_dgrad" else 1)
        return k >= PACED_K and not self._reduces_rows

    @property
    def part_columns(self) -> int:
        """Columns of down_dgrad's partial row sums; with a bias the last one is left to the kernel bias_dot"""
        return -(-self.n // self.tile.tile_n) + self.bias

    def why_invalid(self) -> str | None:
        if self.n % 8 or self.k % 8:
            return f"n = {self.n} and k = {self.k} must be multiples of 8"
        if self.act is not None and self.halves != (2 if self.act.gated else 1):
            return f"{self.act} does not have {self.halves} halves"
        return self.tile.why_invalid(self.variant, self.groups, self.halves)

    def build(self) -> tuple[GroupedGemm, tuple]:
        reason = self.why_invalid()
        if reason:
            raise ValueError(f"{self.variant} {self.tile}: {reason}")
        from . import assembly

        return assembly.kernel(self), assembly.fake_arguments(self)


def aot_specs() -> list[GemmSpec]:
    """Every tile configuration of a 7B layer, and every form that an epilogue or an operand takes."""
    from ..activations import GPT_OSS, NAMES, Activation
    from ..configs.choice import candidates

    swiglu = Activation("swiglu")

    def tiles(variant: str, n: int, k: int, halves: int = 1, **form: Any) -> list[GemmSpec]:
        found = candidates(variant, form.get("groups", 128), n, halves)
        return [GemmSpec(variant, 128, n, k, "bf16", tile, halves, **form) for tile in found]

    def best(spec: GemmSpec, **form: Any) -> GemmSpec:
        changed = replace(spec, **form)
        tile = candidates(changed.variant, changed.groups, changed.n, changed.halves)[0]
        return replace(changed, tile=tile)

    up, down = tiles("up_proj", 256, 1536, 2, act=swiglu), tiles("down_proj", 1536, 256)
    dgrad, wgrad = tiles("down_dgrad", 256, 1536, 2, act=swiglu), tiles("down_wgrad", 256, 1536)
    up_dgrad, up_wgrad = tiles("up_dgrad", 1536, 512), tiles("up_wgrad", 512, 1536)
    found = up + down + dgrad + wgrad + up_dgrad + up_wgrad
    found += tiles("up_proj", 256, 1536, 2, act=swiglu, keep_h=False)
    for act in (GPT_OSS, *map(Activation, NAMES)):
        halves = 2 if act.gated else 1
        found += [best(s, act=act, halves=halves, bias=True, dtype="fp16") for s in (up[0], dgrad[0])]
    found += [best(up[0], interleaved=True, bias=True, n=72, k=200), best(down[0], bias=True, n=200, k=72)]
    found += [best(up_dgrad[0], interleaved=True, halves=2, n=200, k=72, dtype="fp16")]
    found += [best(up_wgrad[0], interleaved=True, halves=2, n=72, k=200, dtype="fp16")]
    adds = [best(s, variant=f"{s.variant}_add") for s in (wgrad[0], up_wgrad[0])]
    # CTAs that keep to one pace, with every form of tile; and with several bands, of which one has no pace.
    for of_variant in (up, down, dgrad, up_dgrad):
        forms = {(s.tile.schedule, s.tile.tile_n): s for s in reversed(of_variant)}
        found += [replace(s, k=4096) for s in forms.values()]
    found += [best(down[0], n=7168, k=2048), best(up_dgrad[0], n=7168, k=8192)]
    found += [best(s, n=2048, k=7168) for s in (up[0], dgrad[0])]
    return found + adds + [replace(adds[1], interleaved=True, halves=2, n=256), best(down[0], groups=1000)]
