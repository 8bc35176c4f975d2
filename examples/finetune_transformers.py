"""Fine-tune a mixture-of-experts model of transformers with its Trainer, the experts by sonicmoe.

    python examples/finetune_transformers.py
    python examples/finetune_transformers.py --model ALREADY/DOWNLOADED --text notes.txt --out out/notes
    torchrun --nproc-per-node 8 examples/finetune_transformers.py ...

Without `--model` it is a small random Qwen3-MoE over bytes, and without `--text` the documentation that ships with
Python: that runs anywhere and downloads nothing. Two lines of `build_model` are sonicmoe's. Called again, it goes on
from the newest checkpoint in `--out`. On a GPU the model is in bf16; several processes train replicas, as the Trainer
does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3MoeConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import get_last_checkpoint

import sonicmoe.integrations.transformers as sonicmoe_experts  # registers the implementation
from sonicmoe.demo.data import VOCABULARY, load_corpus

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "output_router_logits": True,  # adds the load balancing loss
    "router_aux_loss_coef": 0.01,
    "initializer_range": 0.06,
}


class Windows(Dataset[dict[str, torch.Tensor]]):
    """A stream of tokens in windows of one length, one after the other."""

    def __init__(self, stream: torch.Tensor, length: int) -> None:
        self.windows = stream[: len(stream) // length * length].view(-1, length).long()

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        # The model shifts the labels itself.
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def build_model(name: str | None, implementation: str) -> Any:
    """A model with its experts by `implementation`; random and small if it has no name."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    options = {"experts_implementation": implementation, "dtype": dtype}
    if name is not None:
        model = AutoModelForCausalLM.from_pretrained(name, **options)
    else:
        model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SMALL), **options)
    # Does something only for models such as gpt-oss, whose weights the kernels read in another order.
    return sonicmoe_experts.lay_out_for_kernels(model)


def tokens_of(stream: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """Bytes as they are without a tokenizer, else what it makes of their text."""
    if tokenizer is None:
        return stream
    text = bytes(stream.tolist()).decode(errors="ignore")
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"])


def settings(a: argparse.Namespace) -> TrainingArguments:
    every = min(a.every, a.steps)
    return TrainingArguments(
        output_dir=a.out,
        max_steps=a.steps,
        per_device_train_batch_size=a.batch,
        per_device_eval_batch_size=a.batch,
        learning_rate=a.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, a.steps // 20),
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=every,
        eval_strategy="steps",
        eval_steps=every,
        save_steps=every,
        save_total_limit=2,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        seed=a.seed,
    )


def boards(a: argparse.Namespace) -> list[TrainerCallback]:
    """TensorBoard, if it is there, with all of a run in the run's folder.

    By itself it learns of that folder when training begins; what is evaluated before would go where the program began.
    """
    if find_spec("tensorboard") is None:
        return []
    board = TensorBoardCallback()
    board.logging_dir = str(Path(a.out) / "runs" / time.strftime("%Y-%m-%d_%H-%M-%S"))
    return [board]


def run(a: argparse.Namespace) -> dict[str, float]:
    """Train, evaluate and save; what the Trainer measured on held-out text before and after."""
    transformers.set_seed(a.seed)
    tokenizer = None if a.model is None else AutoTokenizer.from_pretrained(a.model)
    newest = get_last_checkpoint(a.out) if Path(a.out).is_dir() else None
    corpus = load_corpus([path.read_text() for path in a.text] or None)
    train, held_out = (Windows(tokens_of(stream, tokenizer), a.length) for stream in corpus)
    held_out.windows = held_out.windows[: a.held_out]
    trainer = Trainer(
        # The Trainer itself would not find the experts in its checkpoint: transformers writes them one by one, and only
        # from_pretrained stacks them again.
        model=build_model(newest or a.model, a.experts),
        args=settings(a),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=boards(a),
    )
    before = trainer.evaluate()["eval_loss"] if newest is None else float("nan")
    trainer.train(resume_from_checkpoint=newest)
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(Path(a.out) / "final"))
    return {"before": before, "after": after}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--model", help="a name or folder that from_pretrained takes; default: small, random, over bytes")
    p.add_argument("--text", type=Path, nargs="+", default=[], help="files; a tenth of their paragraphs is held out")
    p.add_argument("--experts", default=sonicmoe_experts.NAME, help="another implementation to compare, such as eager")
    p.add_argument("--out", default="out/finetune")
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--batch", type=int, default=16, help="windows per process and step")
    p.add_argument("--length", type=int, default=128, help="tokens of a window")
    p.add_argument("--learning-rate", type=float, default=2e-3, help="for the small model; 1e-5 for a pretrained one")
    p.add_argument("--held-out", type=int, default=64, help="windows to evaluate on")
    p.add_argument("--every", type=int, default=50, help="steps between two evaluations and checkpoints")
    p.add_argument("--seed", type=int, default=0)
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    losses = run(parser().parse_args(arguments))
    print(f"held-out loss: {losses['before']:.3f} before, {losses['after']:.3f} after")


if __name__ == "__main__":
    main()
