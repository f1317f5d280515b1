"""Tokens per second and model FLOPs utilisation, from counted tokens and counted FLOPs."""

from __future__ import annotations

import time
import warnings
from collections import deque
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.throughput import get_available_flops

from longnet_kit.model import compute_dtype
from longnet_kit.tasks.scalars import due, record

BURST = 0.02
"""Seconds that the CPU's rate is measured for, again and again while a run goes on."""
SHARE = 0.005
"""Of a run's time, what all bursts together may take."""


class Moment(NamedTuple):
    """How far training was at some time."""

    seconds: float
    tokens: int


class Throughput(Callback):
    """Writes `train/tokens_per_second` and `train/mfu` whenever training scalars are due.

    Tokens are those of every batch on every rank, accumulated ones included. The rate is over the last `window`
    intervals between writes; validation does not count, nor does the first optimizer step (compilation, first
    allocations) once there are others.

    `train/mfu` is 3 * model.flops per sequence, over what the devices could do: the vendor's figure on CUDA; on the CPU
    it is the share of the measured matrix-multiplication rate: a product in the training dtype, timed for 0.2 s when
    fit starts (so too where Lightning does not know the chip). Since the CPU may have been busy then, it is timed again
    for 0.02 s at writes, in under 0.5% of the run, which does not count; the highest rate is taken. MFU is left out
    where the attention backend cannot count its FLOPs.

    Args:
        window: how many intervals between writes the rate is averaged over.
    """

    def __init__(self, window: int = 10) -> None:
        self._moments: deque[Moment] = deque(maxlen=window + 1)
        self._tokens = 0
        self._first_step = 0
        self._paused = 0.0
        self._pause_began: float | None = None
        self._flops_per_token: float | None = None
        self._peak: float | None = None
        self._began = 0.0
        self._in_bursts = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flops_per_token = flops_per_token(pl_module)
        if self._flops_per_token is not None:
            self._peak = trainer.world_size * peak_flops(pl_module.device, compute_dtype(str(trainer.precision)))
        self._began, self._in_bursts = _clock(pl_module.device), 0.0
        self._tokens, self._paused, self._pause_began, self._first_step = 0, 0.0, None, trainer.global_step
        self._moments.clear()
        self._moments.append(self._now(pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._tokens += batch["tokens"].numel() * trainer.world_size
        if trainer.fit_loop._should_accumulate():
            return
        step = trainer.global_step
        if due(trainer, step):
            self._measure_again(trainer, pl_module)
            self._moments.append(self._now(pl_module))
            record(pl_module, self._rates(), step)
        if step == self._first_step + 1:
            self._moments.clear()
            self._moments.append(self._now(pl_module))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause_began = _clock(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # The pause ends only here, since what other callbacks make of a validation is no training either.
        if self._pause_began is not None:
            self._paused += _clock(pl_module.device) - self._pause_began
            self._pause_began = None

    def _measure_again(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure the CPU's rate once more, if there is time for it. No rank waits for another here."""
        before = _clock(module.device)
        if self._peak is None or module.device.type != "cpu":
            return
        if self._in_bursts + BURST > SHARE * (before - self._began):
            return
        rate = measured_flops(module.device, compute_dtype(str(trainer.precision)), seconds=BURST)
        self._peak = max(self._peak, trainer.world_size * rate)
        spent = _clock(module.device) - before
        self._in_bursts += spent
        self._paused += spent

    def _rates(self) -> dict[str, float]:
        first, last = self._moments[0], self._moments[-1]
        tokens_per_second = (last.tokens - first.tokens) / (last.seconds - first.seconds)
        rates = {"train/tokens_per_second": tokens_per_second}
        if self._flops_per_token is not None and self._peak is not None:
            rates["train/mfu"] = tokens_per_second * self._flops_per_token / self._peak
        return rates

    def _now(self, module: LightningModule) -> Moment:
        return Moment(_clock(module.device) - self._paused, self._tokens)


def flops_per_token(module: LightningModule) -> float | None:
    """FLOPs that training takes for each token of a whole sequence; None where the attention backend cannot say."""
    model: Any = module.model
    flops = model.flops(model.seq_len)
    return None if flops is None else 3 * flops / model.seq_len


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second that one device could do: the vendor's figure where Lightning knows it, else measured."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FLOPs not found for")
        known = get_available_flops(device, dtype) if device.type == "cuda" else None
    return known or measured_flops(device, dtype)


def measured_flops(
    device: torch.device, dtype: torch.dtype, seconds: float = 0.2, size: int | None = None
) -> float:  # fmt: skip
    """FLOPs per second of the fastest of some matrix products, size x size each.

    The size is by default one that keeps the device busy: 512 on the CPU, 8192 elsewhere.
    """
    size = size or (512 if device.type == "cpu" else 8192)
    own = torch.Generator(device).manual_seed(0)  # a run must not depend on how often this was called
    a, b = (torch.rand(size, size, device=device, generator=own).to(dtype) for _ in range(2))
    torch.mm(a, b)
    fastest, deadline = float("inf"), time.perf_counter() + seconds
    while fastest == float("inf") or time.perf_counter() < deadline:
        began = _clock(device)
        torch.mm(a, b)
        fastest = min(fastest, _clock(device) - began)
    return 2 * size**3 / fastest


def _clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
