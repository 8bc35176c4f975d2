"""One training, and what is measured on the way."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sonicmoe.demo.data import Corpus, random_windows, spread_windows
from sonicmoe.demo.model import LanguageModel, Size, next_byte_loss
from sonicmoe.moe import MoE
from sonicmoe.routing import route_topk

AUX_WEIGHT = 0.01
WARM_UP = 0.1  # share of the steps in which the learning rate rises
UNTIMED = 3  # first steps: kernels are compiled, memory is found


@dataclass(frozen=True)
class Plan:
    """How to train. every: steps between two looks at the held-out text; held_out_windows: how much of it."""

    routing: str
    seed: int = 0
    rule: str = "nearest"
    backend: str = "auto"
    device: torch.device = torch.device("cpu")
    every: int = 50
    held_out_windows: int = 128

    @property
    def name(self) -> str:
        """The routing, with its rule unless that is the usual one."""
        usual = self.routing != "token_rounding" or self.rule == "nearest"
        return self.routing if usual else f"{self.routing} ({self.rule})"


class Point(NamedTuple):
    """Losses in nats per byte after `step` steps: held out, and the mean over the training batches since the last."""

    step: int
    train: float
    held_out: float


class Pairs(NamedTuple):
    """(token, expert) pairs over all layers, counted on the batches at the points of the history."""

    chosen: int  # by top-K
    dropped: int  # chosen, but not computed
    padded: int  # computed, but not chosen


@dataclass
class Run:
    """What came of a training."""

    routing: str
    seed: int
    history: list[Point] = field(default_factory=list)
    tokens_per_second: float = 0.0
    kept_bytes: int = 0
    kept_bytes_moe: int = 0
    pairs: Pairs = Pairs(0, 0, 0)


def train(size: Size, plan: Plan, corpus: Corpus, report: Callable[[int, Point | None], None]) -> Run:
    """Train a model from scratch. report(step, point) is called after every step, with a point where there is one."""
    torch.manual_seed(plan.seed)
    model = LanguageModel(size, plan.routing, plan.rule, plan.backend).to(plan.device)
    batches = torch.Generator().manual_seed(plan.seed)
    held_out = spread_windows(corpus.held_out, plan.held_out_windows, size.context).to(plan.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, size.steps))
    run = Run(plan.name, plan.seed)
    losses: list[Tensor] = []
    clock = _Clock(plan.device)
    for step in range(1, size.steps + 1):
        windows = random_windows(corpus.train, size.batch, size.context, batches).to(plan.device, non_blocking=True)
        losses.append(_step(model, windows, optimizer, schedule))
        point = None
        if step == UNTIMED:
            clock.start(step)
        if step % plan.every == 0 or step == size.steps:
            clock.stop(step)
            mean = torch.stack(losses).mean().item()
            point = Point(step, mean, held_out_loss(model, held_out, size.batch))
            run.history.append(point)
            run.pairs = Pairs(*map(sum, zip(run.pairs, count_pairs(model, windows), strict=True)))
            losses.clear()
            clock.start(step)
        report(step, point)
    run.tokens_per_second = clock.steps * size.tokens / clock.seconds if clock.steps else math.nan
    run.kept_bytes, run.kept_bytes_moe = kept_bytes(model, windows[:, :-1])
    return run


def _rate(step: int, steps: int) -> float:
    """Of the learning rate: up linearly, then down along a cosine to a tenth."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm))


def _precision(device: torch.device) -> AbstractContextManager[None]:
    """bf16 products on a GPU, by autocast; fp32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def _step(
    model: LanguageModel,
    windows: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> Tensor:
    """One step; the loss stays on the device."""
    model.train()
    with _precision(windows.device):
        logits, aux_loss = model(windows[:, :-1])
        loss = next_byte_loss(logits, windows)
    (loss + AUX_WEIGHT * aux_loss).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    schedule.step()
    return loss.detach()


@torch.no_grad()
def held_out_loss(model: LanguageModel, windows: Tensor, batch: int) -> float:
    """In eval mode, so with top-K whatever the routing was in training."""
    model.eval()
    total = torch.zeros((), device=windows.device)
    for part in windows.split(batch):
        with _precision(windows.device):
            total += next_byte_loss(model(part[:, :-1])[0], part) * len(part)
    return total.item() / len(windows)


@torch.no_grad()
def count_pairs(model: LanguageModel, windows: Tensor) -> Pairs:
    """Of one batch in training mode. Rounding changes only the last tile of an expert, up or down."""
    moes, logits = model.moes(), list[Tensor]()
    hooks = [moe.router.register_forward_hook(lambda _, __, out: logits.append(out)) for moe in moes]
    model.train()
    with _precision(windows.device):
        model(windows[:, :-1])
    for hook in hooks:
        hook.remove()
    counted = [_pairs(moe, of_layer) for moe, of_layer in zip(moes, logits, strict=True)]
    return Pairs(*(int(torch.stack(column).sum()) for column in zip(*counted, strict=True)))


def _pairs(moe: MoE, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    chosen = route_topk(logits, moe.num_experts_per_tok).cu_rows.diff()
    more = moe.route(logits).cu_rows.diff() - chosen
    return chosen.sum(), (-more).clamp(min=0).sum(), more.clamp(min=0).sum()


def kept_bytes(model: LanguageModel, tokens: Tensor) -> tuple[int, int]:
    """Bytes that a forward keeps for its backward: of the whole model, and of its MoE layers.

    On a GPU of a copy in bf16: autocast keeps a cast of every weight, which is no activation.
    """
    if tokens.device.type == "cuda":
        model = copy.deepcopy(model).bfloat16()
    model.train()
    whole = _kept(lambda: model(tokens), model.parameters(), tokens.device)
    moes = model.moes()
    x = model.norm(model.embed(tokens)).detach().requires_grad_()
    of_one = _kept(lambda: moes[0](x), moes[0].parameters(), tokens.device)
    if tokens.device.type == "cuda":
        of_one += x.nbytes  # kept, but not allocated here
    return whole, of_one * len(moes)


def _kept(forward: Callable[[], Iterable[Tensor]], parameters: Iterable[Tensor], device: torch.device) -> int:
    """By the allocator on a GPU, less what is returned. Elsewhere by the tensors that autograd saves, less weights."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        outputs = list(forward())
        return torch.cuda.memory_allocated(device) - before - sum(out.nbytes for out in outputs)
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    storages: dict[int, int] = {}

    def note(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        outputs = list(forward())  # alive, so that no storage is used twice
    del outputs
    return sum(storages.values())


class _Clock:
    """Time of training steps alone."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds, self.steps = 0.0, 0
        self._since: tuple[float, int] | None = None

    def start(self, step: int) -> None:
        self._since = self._now(), step

    def stop(self, step: int) -> None:
        if self._since is not None:
            self.seconds += self._now() - self._since[0]
            self.steps += step - self._since[1]
            self._since = None

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
