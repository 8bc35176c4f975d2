"""A small causal transformer over bytes, with `sonicmoe.MoE` as the feed-forward of every block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from sonicmoe.demo.data import VOCABULARY
from sonicmoe.moe import MoE


@dataclass(frozen=True)
class Size:
    """A model, the batches it is trained on, and for how long."""

    blocks: int
    hidden: int
    heads: int
    experts: int
    per_token: int
    intermediate: int
    context: int
    batch: int
    tile_m: int
    steps: int
    learning_rate: float

    @property
    def tokens(self) -> int:
        """T: of one step."""
        return self.batch * self.context

    @property
    def rows_per_expert(self) -> float:
        """The mean. Token rounding keeps the quality of top-K while this is at least 2 tile_m."""
        return self.tokens * self.per_token / self.experts


SIZES = {
    # Two trainings take about two minutes on two CPU cores.
    "small": Size(3, 128, 4, 16, 2, 64, 128, 16, 32, 400, 3e-3),
    # Fine-grained experts and the kernels' row tile; as many tiles per expert as above.
    "base": Size(6, 512, 8, 64, 8, 256, 256, 32, 128, 300, 1e-3),
}


class Attention(nn.Module):
    """Causal self-attention: (B, L, H) -> (B, L, H)."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotated(q), rotated(k)
        o = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(o.transpose(1, 2).reshape(batch, length, hidden))


def rotated(x: Tensor) -> Tensor:
    """Rotary positions: x (..., L, D) with D even; the two halves of a head's D are the planes' coordinates."""
    length, width = x.shape[-2:]
    # Wavelengths from 2π to about 6000 bytes.
    frequencies = 1000.0 ** -(torch.arange(0, width, 2, device=x.device) / width)
    angles = torch.arange(length, device=x.device)[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Block(nn.Module):
    """Attention, then experts, each after a norm and added to its input."""

    def __init__(self, size: Size, moe: MoE) -> None:
        super().__init__()
        self.attention_norm, self.moe_norm = nn.RMSNorm(size.hidden), nn.RMSNorm(size.hidden)
        self.attention = Attention(size.hidden, size.heads)
        self.moe = moe

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attention(self.attention_norm(x))
        o, aux_loss = self.moe(self.moe_norm(x))
        return x + o, aux_loss


class LanguageModel(nn.Module):
    """Bytes (B, L) -> logits (B, L, 256) and the mean load balancing loss of the blocks.

    Args:
        size: of everything; `size.tile_m` is token rounding's.
        routing, rule, backend: of `sonicmoe.MoE`.
    """

    def __init__(self, size: Size, routing: str = "topk", rule: str = "nearest", backend: str = "auto") -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, size.hidden)
        self.blocks = nn.ModuleList(
            Block(
                size,
                MoE(
                    size.experts,
                    size.per_token,
                    size.hidden,
                    size.intermediate,
                    std=size.hidden**-0.5,
                    routing=routing,
                    rule=rule,
                    tile_m=size.tile_m,
                    backend=backend,
                ),
            )
            for _ in range(size.blocks)
        )
        self.norm = nn.RMSNorm(size.hidden)
        self.apply(_initialise)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(tokens)
        aux_losses = []
        for block in self.blocks:
            x, aux_loss = block(x)
            aux_losses.append(aux_loss)
        # The output layer is the embedding's transpose.
        return functional.linear(self.norm(x), self.embed.weight), torch.stack(aux_losses).mean()

    def moes(self) -> list[MoE]:
        """The MoE layers, in order."""
        return [module for module in self.modules() if isinstance(module, MoE)]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)


def next_byte_loss(logits: Tensor, windows: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte: logits (B, L, 256) of windows[:, :-1] against windows[:, 1:]."""
    return functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
