"""Real text that ships with Python: the documentation behind `help()`, as bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

VOCABULARY = 256


class Corpus(NamedTuple):
    """Two streams of bytes without a common paragraph, uint8, one-dimensional."""

    train: Tensor
    held_out: Tensor


def load_corpus(texts: Iterable[str] | None = None, every: int = 10, block: int = 20) -> Corpus:
    """One of `every` blocks of `block` paragraphs is held out. texts: those of `pydoc_data.topics` if None.

    The texts quote each other, so only the first copy of a paragraph is kept: nothing held out is seen in training.
    """
    if texts is None:
        from pydoc_data.topics import topics

        texts = [topics[name] for name in sorted(topics)]
    stripped = (p.strip("\n") for text in texts for p in text.split("\n\n"))
    paragraphs = dict.fromkeys(p for p in stripped if p)
    parts: tuple[list[str], list[str]] = ([], [])
    for position, paragraph in enumerate(paragraphs):
        parts[position // block % every == every - 1].append(paragraph)
    return Corpus(*(_bytes("\n\n".join(part)) for part in parts))


def _bytes(text: str) -> Tensor:
    # frombuffer takes no empty buffer
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


def random_windows(stream: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """(count, length + 1) int64, on the CPU: inputs are [:, :-1] and targets [:, 1:]."""
    starts = torch.randint(len(stream) - length, (count, 1), generator=generator)
    return stream[starts + torch.arange(length + 1)].long()


def spread_windows(stream: Tensor, count: int, length: int) -> Tensor:
    """At most `count` windows as of `random_windows`, without overlap of targets and spread evenly; always the same."""
    count = min(count, (len(stream) - 1) // length)
    starts = torch.arange(count)[:, None] * ((len(stream) - 1) // count)
    return stream[starts + torch.arange(length + 1)].long()
