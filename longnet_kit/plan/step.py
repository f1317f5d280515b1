"""One optimizer step of a recipe's task, run without data as one rank of many would run it.

The task, its model, optimizer and losses are the ones that `longnet fit` trains. What Lightning does around them is
done here in its order: gradients of the step before are let go between the forward and the backward pass.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from longnet_kit import experiment, placement
from longnet_kit.attention.sharding import bind
from longnet_kit.model import compute_dtype
from longnet_kit.model.blocks import FeedForward
from longnet_kit.parallel import batches
from longnet_kit.parallel.fsdp import fsdp_units
from longnet_kit.plan import chunks
from longnet_kit.plan.cuda_autocast import CudaAutocast
from longnet_kit.plan.ledger import Ledger, run_backward, without_data
from longnet_kit.plan.opaque import hide_backends
from longnet_kit.plan.shard import PlannedShard, Transfer
from longnet_kit.plan.spread import Spread
from longnet_kit.recipe import Recipe
from longnet_kit.tasks import LanguageModeling
from longnet_kit.tasks.training import Training

FEW = 2, 3
"""Layers of the models that are run in place of a deeper one; every further layer adds what the third did."""


@dataclass
class Step:
    """What a training batch and the optimizer step after it cost one rank."""

    peaks: dict[str, Counter[str]]
    """Bytes by what they hold, at the peak of each phase: batch, forward, backward, optimizer."""
    parameters: int
    """Of the whole model."""
    largest_unit: int
    """Parameters of the largest block, which FSDP gathers at once."""
    outside_units: int
    """Parameters outside the blocks, which FSDP keeps gathered through a step."""
    saved: int
    """Bytes of activations that the forward pass leaves to the backward pass."""
    flops: Counter[str]
    """Of matrix products, by work: forward, backward, recomputed."""
    elements: Counter[Transfer]
    """That came from the other ranks of the sequence."""
    received: Counter[Transfer]
    """The same in bytes."""

    @property
    def phase(self) -> str:
        """In which most is allocated."""
        return max(self.peaks, key=lambda phase: self.peaks[phase].total())

    @property
    def peak(self) -> Counter[str]:
        """What is allocated then, in bytes."""
        return self.peaks[self.phase]


def run(r: Recipe, spread: Spread, rank: int, *, cuda: bool, opaque: bool = False) -> Step:
    """Run the step on `rank` of the first sequence group. Deep models are extrapolated from shallow ones.

    Args:
        cuda: what differs between CUDA and the CPU is as on CUDA.
        opaque: attention is not run, but taken to keep q, k, v and its output and to need nothing else.
    """
    few, more = FEW
    if r.model.layers <= more:
        return _run(r, spread, rank, cuda, opaque)
    steps = [_run(_with_layers(r, layers), spread, rank, cuda, opaque) for layers in FEW]
    return _extended(*steps, times=(r.model.layers - few) / (more - few))


def _with_layers(r: Recipe, layers: int) -> Recipe:
    return dataclasses.replace(r, model=dataclasses.replace(r.model, layers=layers))


def _extended(low: Any, high: Any, times: float) -> Any:
    """`low` plus so many times its difference to `high`, in numbers and everything that holds numbers."""
    if isinstance(low, Step):
        return Step(**{name: _extended(low.__dict__[name], high.__dict__[name], times) for name in low.__dict__})
    if isinstance(low, dict):
        return type(low)({key: _extended(low.get(key, 0), high.get(key, 0), times) for key in {**low, **high}})
    return low + round((high - low) * times)


def _run(r: Recipe, spread: Spread, rank: int, cuda: bool, opaque: bool) -> Step:
    with without_data(cuda) as ledger:
        ledger.phase = "setup"
        task = _task(r, spread, ledger, cuda)
        if opaque:
            hide_backends(task)
        parameters = sum(p.numel() for p in task.parameters())
        units = [sum(p.numel() for p in unit.parameters()) for unit in fsdp_units(task)]
        shard = PlannedShard(rank, spread.shards, spread.per_node, lambda: ledger.work)
        if spread.strategy is not None:
            bind(task, shard)
        ledger.label("parameters", task.parameters())
        optimizer = _optimizer(task)
        trained = [p for p in task.parameters() if p.requires_grad]
        for p in trained:
            p.grad = torch.empty_like(p)  # of the step before
        ledger.label("gradients", (p.grad for p in trained if p.grad is not None))
        _update(task, optimizer, r, cuda)
        state = [x for values in optimizer.state.values() for x in values.values() if isinstance(x, Tensor)]
        ledger.label("optimizer state", state)
        if spread.has_buckets:
            buckets = [torch.empty_like(p) for p in trained]
            ledger.label("gradients in DDP's buckets", buckets)
        task.on_train_start()
        if r.trainer.get("limit_val_batches") != 0:
            task.on_validation_epoch_start()  # its metrics stay between validations
        ledger.label("metrics")
        batch = _batch(task, r, shard, ledger)
        with CudaAutocast() if cuda else nullcontext():
            ledger.phase = "forward"
            with _precision(placement.precision(r)):
                loss = task.training_step(batch, 0)
            assert isinstance(loss, Tensor)
            ledger.label("activations")
            saved = ledger.alive_as("activations")
            if r.trainer.get("accumulate_grad_batches", 1) == 1:
                optimizer.zero_grad()
            ledger.phase = "backward"
            run_backward(loss)
        ledger.label("gradients", (p.grad for p in trained if p.grad is not None))
        ledger.phase = "optimizer"
        _update(task, optimizer, r, cuda)
        peaks = {phase: rows for phase, rows in ledger.peaks().items() if phase != "setup"}
    return Step(
        peaks,
        parameters,
        max(units, default=0),
        parameters - sum(units),
        saved,
        ledger.flops,
        shard.elements,
        shard.received,
    )


def _task(r: Recipe, spread: Spread, ledger: Ledger, cuda: bool) -> LightningModule:
    """The recipe's task, its weights as its precision says, and what it asks of a Trainer."""
    precision = placement.precision(r)
    with nullcontext() if precision.endswith("mixed") else _precision(precision):
        task = experiment.build_task(experiment.without_weights(r))
    strategy = SimpleNamespace(reduce=lambda x, **_: x)
    accumulate = r.trainer.get("accumulate_grad_batches", 1)
    trainer: Any = SimpleNamespace(
        world_size=spread.devices,
        accumulate_grad_batches=accumulate,
        strategy=strategy,
        global_step=0,
        datamodule=SimpleNamespace(groups=()),  # a number for each is all that they would take
    )
    task._trainer = trainer
    if isinstance(task, LanguageModeling):
        task._losses = partial(chunks.losses, task.model, ledger)  # type: ignore[method-assign]
    if isinstance(task, Training):
        for module in task.modules():
            if isinstance(module, FeedForward) and module.chunk is not None:
                module.forward = partial(chunks.feed_forward, module, ledger)
        if cuda:
            task.model.save_on_cpu = ledger.keeping_on_host
    return task


def _optimizer(task: LightningModule) -> Optimizer:
    made: Any = task.configure_optimizers()
    return made["optimizer"] if isinstance(made, dict) else made


def _update(task: LightningModule, optimizer: Optimizer, r: Recipe, cuda: bool) -> None:
    """Clip the gradients and step."""
    for group in optimizer.param_groups:
        group["foreach"] = cuda  # torch's default on CUDA, which it does not apply to fake tensors
    if clip := r.trainer.get("gradient_clip_val"):
        torch.nn.utils.clip_grad_norm_(task.parameters(), clip)
    optimizer.step()


def _batch(task: LightningModule, r: Recipe, shard: PlannedShard, ledger: Ledger) -> dict[str, Tensor]:
    """A batch, which reaches the device whole and is cut there; of text, where the task does not say."""
    ledger.phase = "batch"
    blank: Any = getattr(type(task), "blank_batch", LanguageModeling.blank_batch)
    batch = batches.cut(blank(task, r.data.batch_size, r.data.seq_len), shard)
    ledger.label("batch", batch.values())
    return batch


@contextmanager
def _precision(name: str) -> Iterator[None]:
    """What Lightning puts around a training step: autocast, or a default dtype, which the weights have too."""
    dtype, before = compute_dtype(name), torch.get_default_dtype()
    if name.endswith("mixed"):
        with torch.autocast("cpu", dtype):
            yield
        return
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
