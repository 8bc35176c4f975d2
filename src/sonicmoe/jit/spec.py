"""What the specs of `cute_kernels` have in common."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol


class Spec(Hashable, Protocol):
    """All that a kernel is compiled for. Equal specs are the same kernel, and so are equal `repr`s."""

    @property
    def name(self) -> str:
        """The kernel's name in profiles, cache and ledger: variant and architecture."""

    def why_invalid(self) -> str | None:
        """None, or what is wrong with it."""

    def build(self) -> tuple[Any, tuple[Any, ...]]:
        """The object to compile, and the fake arguments, without stream, to compile it for. Imports the DSL."""
