"""Other implementations to measure against, each optional: found where it is installed."""

from __future__ import annotations

from perf.peers import cublas, grouped_mm, loop, scattermoe, transformers
from perf.peers.base import Peer

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        cublas.Cublas(),
        scattermoe.ScatterMoE(),
        grouped_mm.GroupedMM(),
        grouped_mm.GroupedMM(compiled=True),
        transformers.Transformers("grouped_mm"),
        transformers.Transformers("batched_mm"),
        transformers.Transformers("eager"),
        transformers.ThroughTransformers(),
        loop.Loop(),
    )
}

__all__ = ["PEERS", "Peer"]
