"""Train a byte-level MoE language model, on one device or many.

    python examples/train_lm.py examples/train_lm.toml
    python examples/train_lm.py examples/train_lm.toml --set training.steps=200 model.routing='"topk"'
    torchrun --nproc-per-node 8 examples/train_lm.py examples/train_lm.toml

Parameters, gradients and optimizer states are sharded over the ranks with FSDP2; one process is a group of one. With
`training.expert_parallel`, that many ranks share the experts of each layer, and FSDP2 shards the rest. On a GPU the
products are in bf16, weights and their updates in fp32. Called again, it goes on from the newest checkpoint in
`run.out`, also with other numbers of ranks. What a step sees depends on the seed and the step alone, so a run that was
stopped computes what it would have computed otherwise (up to how sums are ordered, and how token rounding rounds each
rank's part of a batch, where the number of ranks has changed).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from tqdm import tqdm

from sonicmoe.demo.data import load_corpus, random_windows, spread_windows
from sonicmoe.demo.model import LanguageModel, Size, next_byte_loss
from sonicmoe.integrations.distributed import ExpertParallel, shard_moe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LOGGED = 10  # steps between two lines of the log: reading a loss waits for the device


@dataclass(frozen=True)
class ModelConfig:
    blocks: int
    hidden: int
    heads: int
    experts: int
    per_token: int
    intermediate: int
    context: int
    routing: str
    rule: str
    tile_m: int
    backend: str


@dataclass(frozen=True)
class TrainingConfig:
    steps: int
    batch: int
    learning_rate: float
    warm_up: int
    weight_decay: float
    clip: float
    aux_weight: float
    expert_parallel: int
    seed: int


@dataclass(frozen=True)
class RunConfig:
    out: str
    text: list[str]
    held_out_every: int
    held_out_windows: int
    checkpoint_every: int
    checkpoints: int
    tensorboard: bool


@dataclass(frozen=True)
class Config:
    """The sections of the configuration file; every value must be there, and no other."""

    model: ModelConfig
    training: TrainingConfig
    run: RunConfig


SECTIONS: dict[str, Any] = {"model": ModelConfig, "training": TrainingConfig, "run": RunConfig}


def read_config(path: Path, changes: Sequence[str] = ()) -> Config:
    """The file, with changes like training.steps=200 whose values are TOML. Raises ValueError for a wrong name."""
    values = tomllib.loads(path.read_text())
    for change in changes:
        name, _, value = change.partition("=")
        section, _, key = name.partition(".")
        if section not in values or key not in values[section]:
            raise ValueError(f"--set {change}: {path} has no {name}")
        values[section][key] = tomllib.loads(f"value = {value}")["value"]
    if set(values) != set(SECTIONS):
        raise ValueError(f"{path}: sections {sorted(values)}, accepted {sorted(SECTIONS)}")
    sections = {}
    for section, of_type in SECTIONS.items():
        names = {field.name for field in dataclasses.fields(of_type)}
        if wrong := names.symmetric_difference(values[section]):
            raise ValueError(f"{path}: [{section}] lacks or has too much: {', '.join(sorted(wrong))}")
        sections[section] = of_type(**values[section])
    if sections["run"].tensorboard and find_spec("tensorboard") is None:
        raise ValueError("run.tensorboard: true, but there is no tensorboard: pip install tensorboard")
    return Config(**sections)


def start_ranks() -> DeviceMesh:
    """This process's place among those of torchrun, or alone; on its own GPU if there is one."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    # Checkpoints are coordinated, and rank 0 is waited for, on the CPU.
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(kind, (dist.get_world_size(),))


def build_model(config: Config, mesh: DeviceMesh) -> LanguageModel:
    """Equal on every rank, then sharded block by block."""
    torch.manual_seed(config.training.seed)
    of_size = {f.name for f in dataclasses.fields(Size)}
    shape = {k: v for k, v in vars(config.model).items() if k in of_size}
    of_training = config.training
    size = Size(**shape, batch=of_training.batch, steps=of_training.steps, learning_rate=of_training.learning_rate)
    model = LanguageModel(size, config.model.routing, config.model.rule, config.model.backend).to(mesh.device_type)
    bf16 = torch.bfloat16 if mesh.device_type == "cuda" else None
    policy = MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=torch.float32)
    sharing = of_training.expert_parallel
    if mesh.size() % sharing:
        raise ValueError(f"training.expert_parallel: got {sharing}, accepted divisors of {mesh.size()} ranks")
    if sharing > 1:
        shape_2d = (mesh.size() // sharing, sharing)
        both = init_device_mesh(mesh.device_type, shape_2d, mesh_dim_names=("data", "experts"))
        for moe in model.moes():
            parallelize_module(moe, both["experts"], ExpertParallel())
            shard_moe(moe, both["data"], mesh, mp_policy=policy)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def experts_and_others(model: LanguageModel) -> list[list[nn.Parameter]]:
    """Parameters in two groups, each of which is sharded over one mesh."""
    of_experts = {id(p) for moe in model.moes() for p in moe.parameters(recurse=False)}
    return [[p for p in model.parameters() if (id(p) in of_experts) is wanted] for wanted in (True, False)]


def clip(groups: Sequence[Sequence[nn.Parameter]], largest: float) -> Tensor:
    """Scale all gradients so that their norm, over all groups and ranks, is at most `largest`; what it was before."""
    norms = []
    for parameters in groups:
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.linalg.vector_norm(torch.stack(norms))
    for parameters in groups:
        nn.utils.clip_grads_with_norm_(parameters, largest, total)
    return total


class Trainer:
    """Model, optimizer and step, and how to save and find them again."""

    def __init__(self, config: Config, mesh: DeviceMesh) -> None:
        self.config, self.mesh = config, mesh
        self.rank, self.ranks = mesh.get_rank(), mesh.size()
        self.device = torch.device(mesh.device_type)
        if config.training.batch % self.ranks:
            raise ValueError(f"training.batch: got {config.training.batch}, accepted multiples of {self.ranks} ranks")
        texts = [Path(name).read_text() for name in config.run.text]
        self.corpus = load_corpus(texts or None)
        self.model = build_model(config, mesh)
        self.groups = experts_and_others(self.model)
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters} for parameters in self.groups],
            lr=config.training.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=config.training.weight_decay,
        )
        self.step = 0
        self.folder = Path(config.run.out)

    def mine(self, windows: Tensor) -> Tensor:
        """This rank's part of what all ranks drew alike."""
        return windows[self.rank :: self.ranks].to(self.device, non_blocking=True)

    def train_step(self) -> tuple[Tensor, Tensor, Tensor]:
        """One step; this rank's loss and load balancing loss, and the gradient's norm, on the device."""
        of_training = self.config.training
        self.step += 1
        generator = torch.Generator().manual_seed(of_training.seed * 2**32 + self.step)
        # Stochastic rules of token rounding draw from torch's own generator.
        torch.manual_seed((of_training.seed * 2**32 + self.step) * self.ranks + self.rank)
        windows = self.mine(random_windows(self.corpus.train, of_training.batch, self.config.model.context, generator))
        for group in self.optimizer.param_groups:
            group["lr"] = of_training.learning_rate * self.rate()
        self.model.train()
        logits, aux_loss = self.model(windows[:, :-1])
        loss = next_byte_loss(logits, windows)
        (loss + of_training.aux_weight * aux_loss).backward()
        norm = clip(self.groups, of_training.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), aux_loss.detach(), norm

    def rate(self) -> float:
        """Of the learning rate: up linearly, then down along a cosine to a tenth."""
        warm, steps = self.config.training.warm_up, self.config.training.steps
        if self.step < warm:
            return self.step / warm
        return 0.55 + 0.45 * math.cos(math.pi * (self.step - warm) / max(1, steps - warm))

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Nats per byte over the ranks' shares of the held-out windows; top-K, as always in eval mode."""
        count = -(-self.config.run.held_out_windows // self.ranks) * self.ranks
        windows = spread_windows(self.corpus.held_out, count, self.config.model.context)
        # Every rank runs the same number of batches of the same size, or one would wait for the others' weights.
        mine = self.mine(windows[: len(windows) // self.ranks * self.ranks])
        self.model.eval()
        total = torch.zeros((), device=self.device)
        for part in mine.split(max(1, self.config.training.batch // self.ranks)):
            total += next_byte_loss(self.model(part[:, :-1])[0], part) * len(part)
        return self.mean(total / len(mine))

    def mean(self, value: Tensor) -> float:
        """Over the ranks."""
        value = value.detach().float().clone()
        dist.all_reduce(value)
        return value.item() / self.ranks

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": torch.tensor(self.step)}

    def save(self) -> None:
        """Into a folder that gets its name when it is complete; older ones beyond `run.checkpoints` go."""
        path, unfinished = self.folder / f"step-{self.step:08d}", self.folder / "unfinished"
        if self.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        dist.barrier()
        dcp.save(self._state(), checkpoint_id=unfinished)
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(path, ignore_errors=True)
            unfinished.rename(path)
            for old in sorted(self.folder.glob("step-*"))[: -self.config.run.checkpoints]:
                shutil.rmtree(old)
        dist.barrier()

    def resume(self) -> None:
        """From the newest checkpoint, if there is one."""
        found = sorted(self.folder.glob("step-*"))
        if found:
            state = self._state()
            dcp.load(state, checkpoint_id=found[-1])
            set_state_dict(
                self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
            )
            self.step = int(state["step"])


class Log:
    """Bar, lines, log.jsonl and TensorBoard, all from rank 0 alone."""

    def __init__(self, config: Config, first: int, chief: bool) -> None:
        self.chief, self.folder = chief, Path(config.run.out)
        self.bar = tqdm(total=config.training.steps, initial=first, unit="step", disable=None if chief else True)
        self.board = None
        if chief:
            self.folder.mkdir(parents=True, exist_ok=True)
            if config.run.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(self.folder / "tensorboard"))

    def write(self, step: int, **values: float) -> None:
        if not self.chief:
            return
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        self.bar.write(f"step {step}  " + "  ".join(f"{name} {value:.4f}" for name, value in values.items()))


def run(config: Config, mesh: DeviceMesh) -> None:
    """Train to the end, from wherever the newest checkpoint is."""
    trainer = Trainer(config, mesh)
    trainer.resume()
    log = Log(config, trainer.step, chief=trainer.rank == 0)
    steps = config.training.steps

    def due(every: int) -> bool:
        return trainer.step % every == 0 or trainer.step == steps

    while trainer.step < steps:
        loss, aux_loss, norm = trainer.train_step()
        log.bar.update()
        if due(LOGGED):
            log.write(trainer.step, loss=trainer.mean(loss), aux_loss=trainer.mean(aux_loss), norm=norm.item())
        if due(config.run.held_out_every):
            log.write(trainer.step, held_out=trainer.held_out_loss())
        if due(config.run.checkpoint_every):
            trainer.save()
    log.bar.close()


def main(arguments: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("config", type=Path, help="see examples/train_lm.toml")
    p.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="changes to it, values in TOML")
    parsed = p.parse_args(arguments)
    try:
        config = read_config(parsed.config, parsed.set)
    except ValueError as error:
        p.error(str(error))
    mesh = start_ranks()
    try:
        run(config, mesh)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
