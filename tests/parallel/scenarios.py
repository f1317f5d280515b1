"""Small trainings through the Trainer, the same on one process and on many, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins import DoublePrecision
from torch import Tensor
from torch.distributed.tensor import DTensor

from longnet_kit.attention import dilated_sharded
from longnet_kit.callbacks import LastValues
from longnet_kit.model import Transformer
from longnet_kit.parallel import SequenceParallelFSDPStrategy, SequenceParallelStrategy
from longnet_kit.parallel.strategies import SequenceParallel
from longnet_kit.tasks import LanguageModeling
from tests.data import corpus
from tests.tasks.tiny import options

SEQ_LEN, GLOBAL_BATCH, STEPS, SAVED_AT = 48, 2, 5, 3
LAYOUTS = {"1": (1, 1), "2": (1, 2), "4": (1, 4), "2x2": (2, 2)}
"""Data ranks and ranks per sequence."""
STRATEGIES: dict[str, type[SequenceParallel]] = {
    "ddp": SequenceParallelStrategy,
    "fsdp": SequenceParallelFSDPStrategy,
}
BRANCHES = {"segment_lengths": [6, 24, 48, 99], "dilation_rates": [1, 5, 3, 7]}  # of shards of 12 and 24: r divides few
DILATED = {"backend": "dilated", **BRANCHES}
SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {"validation": 1.0},
    "accumulation": {"accumulate": 2},
    "activation checkpointing": {"activation_checkpointing": "blocks"},
    "dropout": {"dropout": 0.3},
    "dropout under checkpointing": {"dropout": 0.3, "activation_checkpointing": "blocks"},
    "non-causal": {"causal": False},
    "xpos": {"positions": "xpos"},
    "grouped": {"attention": {**DILATED, "head_offsets": "grouped"}},
    "even": {"attention": {"backend": "dilated", "segment_lengths": [48, 12], "dilation_rates": [2, 1]}},
    "clipped": {"clip": 1e-2},
    "adam": {"optimizer": "adam"},
    "sdpa": {"attention": {"backend": "sdpa"}},
    "naive": {"attention": {"backend": "naive", "pattern": {"kind": "dilated", **BRANCHES}}},
}
MUTATIONS: dict[str, Callable[[], Any]] = {
    "gradients stay where keys were gathered": lambda: mock.patch.object(dilated_sharded._Spanning, "unpack"),
    "the loss lacks the group's factor": lambda: mock.patch.object(
        LanguageModeling, "training_step", _without_group_factor(LanguageModeling.training_step)
    ),
    "positions start anew in each shard": lambda: mock.patch.object(Transformer, "_tables", _local_positions),
}


class Outcome(NamedTuple):
    """What came out of a training: by step, and at its end."""

    losses: list[float]
    gradients: dict[int, dict[str, Tensor]]
    """Of the first and the last step, before clipping."""
    norms: list[float]
    weights: dict[str, Tensor]
    evaluated: dict[str, float]
    ignored_by_rank: list[int]


class Task(LanguageModeling):
    """The task, whose batches lose targets unevenly while they are whole, and which keeps its gradients."""

    gradients: dict[int, dict[str, Tensor]]

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        tokens = batch["tokens"]
        assert tokens.shape[1] == SEQ_LEN, "transfer hooks see whole sequences"
        place = torch.arange(SEQ_LEN, device=tokens.device)
        batch["targets"] = batch["targets"].masked_fill((tokens * 7 + place) % SEQ_LEN < place * 4 // 5, -100)
        return batch

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        step = self.trainer.global_step + 1
        if step in (1, STEPS):
            self.gradients[step] = {name: whole(p.grad).cpu().clone() for name, p in self.named_parameters()}
        super().configure_gradient_clipping(optimizer, *args, **kwargs)


class History(LastValues):
    """Keeps what was logged of each step, in the precision in which it was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None
        self.steps.setdefault(step, {}).update(metrics)

    def curve(self, tag: str) -> list[float]:
        return [metrics[tag] for _, metrics in sorted(self.steps.items()) if tag in metrics]


class Ignored(Callback):
    """Notes how many targets each rank ignored in the first batch."""

    def __init__(self) -> None:
        self.ignored: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.ignored:
            count = (batch["targets"] == -100).sum()
            self.ignored = trainer.strategy.all_gather(count).flatten().tolist()  # type: ignore[union-attr]


def train(
    folder: Path,
    layout: str,
    strategy: SequenceParallel | str,
    *,
    accelerator: str = "cpu",
    optimizer: str = "sgd",
    accumulate: int = 1,
    clip: float | None = None,
    max_steps: int = STEPS,
    validation: float | int = 2,
    ckpt_path: Path | None = None,
    save_to: Path | None = None,
    **model: Any,
) -> Outcome:
    """Train the scenario of these settings for `max_steps` under a layout and strategy."""
    replicas, _ = LAYOUTS[layout]
    seed_everything(7, workers=True, verbose=False)
    settings: dict[str, Any] = {"dim": 16, "layers": 2, "heads": 4, "ffn_dim": 24, "attention": DILATED}
    network = Transformer(257, seq_len=SEQ_LEN, **(settings | model))
    task = Task(
        network, options(name=optimizer, lr=0.05, weight_decay=0.1), max_steps=STEPS, eval_contexts=[7, 24, SEQ_LEN]
    )
    task.gradients = {}
    data = corpus.module(folder / "cache", seq_len=SEQ_LEN, batch_size=GLOBAL_BATCH // replicas)
    history, ignored = History(), Ignored()
    trainer = Trainer(
        accelerator=accelerator,
        devices=1 if layout == "1" else replicas * LAYOUTS[layout][1],
        strategy=strategy,
        plugins=[DoublePrecision()],
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        val_check_interval=max_steps * accumulate,
        limit_val_batches=validation,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        logger=history,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ignored],
    )
    trainer.fit(task, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    if save_to is not None:
        trainer.save_checkpoint(save_to)
    return Outcome(
        history.curve("train/loss"),
        task.gradients,
        history.curve("train/grad_norm"),
        {name: whole(p.detach()).cpu().clone() for name, p in task.named_parameters()},
        {tag: value for tag, value in history.steps[max_steps].items() if tag.startswith("val/")},
        ignored.ignored,
    )


def whole(x: Tensor | None) -> Tensor:
    assert x is not None
    return x.full_tensor() if isinstance(x, DTensor) else x


def _without_group_factor(training_step: Any) -> Any:
    return lambda self, *args: training_step(self, *args) / self.trainer.strategy.shard.size


def _local_positions(self: Transformer, tokens: Tensor, positions: Tensor | None) -> Any:
    assert self.positions is not None
    return self.positions.tables(torch.arange(tokens.shape[1], device=tokens.device), torch.float64)
