"""Activations by name, as a value that can be compared, hashed and written as text; no torch here.

The mathematics lives in `sonicmoe.reference.activation` (ground truth) and in the kernels' epilogues.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from sonicmoe.errors import InvalidArgument

GATED = ("swiglu", "geglu", "geglu_tanh", "reglu")
PLAIN = ("relu", "relu2", "gelu", "gelu_tanh", "silu")
NAMES = GATED + PLAIN

_ACCEPTED = f"one of {', '.join(NAMES)}; swiglu takes (alpha=..., limit=..., up_offset=...)"


@dataclass(frozen=True)
class Activation:
    """What happens between the two projections of an expert.

    name       gated: swiglu, geglu (erf), geglu_tanh, reglu: act(gate) * up, where w1 has 2*I rows per expert;
               plain: relu, relu2 (square of relu), gelu (erf), gelu_tanh, silu, where w1 has I rows per expert.
    alpha, limit, up_offset
               of swiglu only, as gpt-oss uses it: with gate = min(gate, limit) and up = clamp(up, -limit, limit),
               gate * sigmoid(alpha * gate) * (up + up_offset). No limit: None.

    `str(activation)` and `Activation.parse` are inverse to each other. Raises InvalidArgument for an unknown name, for
    constants given to another activation than swiglu, and for constants that are not finite (limit: not positive).
    """

    name: str
    alpha: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0
    _text: str = field(init=False, repr=False, compare=False, default="")

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise InvalidArgument("activation", repr(self.name), _ACCEPTED)
        for constant, value in self._constants():
            try:  # numpy's numbers are written in another way
                object.__setattr__(self, constant, float(value))
            except (TypeError, ValueError):
                raise InvalidArgument("activation", f"{constant}={value!r}", f"a number as {constant}") from None
            if self.name != "swiglu":
                raise InvalidArgument("activation", f"{constant} for {self.name}", f"{constant} only for swiglu")
        if not (math.isfinite(self.alpha) and math.isfinite(self.up_offset)):
            got = f"alpha={self.alpha}, up_offset={self.up_offset}"
            raise InvalidArgument("activation", got, "finite alpha and up_offset")
        if self.limit is not None and not (math.isfinite(self.limit) and self.limit > 0):
            raise InvalidArgument("activation", f"limit={self.limit}", "a positive finite limit, or None")
        # Written once: formatting floats is slow on the host, and impossible where torch.compile traces them.
        constants = ",".join(f"{name}={value!r}" for name, value in self._constants())
        object.__setattr__(self, "_text", f"{self.name}({constants})" if constants else self.name)

    def _constants(self) -> list[tuple[str, float]]:
        """The constants that differ from their defaults, in the order of the fields."""
        given = [(f.name, getattr(self, f.name), f.default) for f in fields(self) if f.init and f.name != "name"]
        return [(name, value) for name, value, default in given if value != default]

    @property
    def gated(self) -> bool:
        """Whether w1 holds a gate and an up row for each intermediate element."""
        return self.name in GATED

    def __str__(self) -> str:
        return self._text

    @staticmethod
    def parse(spec: str | Activation) -> Activation:
        """The activation that a text such as ``"geglu"`` or ``"swiglu(alpha=1.702,limit=7.0)"`` names."""
        if isinstance(spec, Activation):
            return spec
        if not isinstance(spec, str):
            raise InvalidArgument("activation", repr(spec), _ACCEPTED)
        known = _WITHOUT_CONSTANTS.get(spec)
        return _parse(spec) if known is None else known


def _parse(text: str) -> Activation:
    name, bracket, rest = text.strip().partition("(")
    if bracket and not rest.endswith(")"):
        raise InvalidArgument("activation", repr(text), _ACCEPTED)
    constants: dict[str, float] = {}
    for item in filter(None, rest[:-1].split(",")):
        key, _, value = (part.strip() for part in item.partition("="))
        try:
            constants[key] = float(value)
        except ValueError:
            raise InvalidArgument("activation", repr(text), _ACCEPTED) from None
    try:
        return Activation(name, **constants)
    except TypeError:
        raise InvalidArgument("activation", repr(text), _ACCEPTED) from None


_WITHOUT_CONSTANTS = {name: Activation(name) for name in NAMES}

GPT_OSS = Activation("swiglu", alpha=1.702, limit=7.0, up_offset=1.0)
