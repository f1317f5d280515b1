"""What a run has used so far: tokens, FLOPs, seconds, memory; and its curves against tokens."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer

from longnet_kit.callbacks.board import Point, boards
from longnet_kit.callbacks.throughput import flops_per_token
from longnet_kit.tasks.scalars import due, write

VS_TOKENS = ("train/loss", "val/loss", "val/perplexity", "val/bits_per_byte")
"""Scalars that are also drawn against the tokens seen, under `vs_tokens/`."""

_STATUS = Path("/proc/self/status")


class Consumption(Callback):
    """Writes `train/tokens`, `train/flops`, `train/seconds` and `train/peak_memory` whenever training scalars are due.

    Tokens are those trained on by all ranks, padding among them; FLOPs 3 * model.flops for every seq_len tokens, where
    the attention backend can count them: as if all sequences were whole and every token had logits, and what is
    computed twice to save memory counts once; seconds are the run's, validations included, the last one too; memory is
    the most that a rank had at once while it trained, in bytes: allocated by torch on CUDA, resident in the process on
    a CPU; it is left out where the system does not say. A resumed run goes on with all of them.

    In TensorBoard, `vs_tokens/<tag>` shows the scalars of `VS_TOKENS` with tokens in place of steps, so that runs of
    different batches overlay.
    """

    def __init__(self) -> None:
        self._tokens = 0
        self._pending = 0
        self._peak = 0.0
        self._flops_per_token: float | None = None
        self._seconds = 0.0
        self._began: float | None = None
        self._recorded = 0

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self._tokens, "seconds": self._run_time(), "peak": self._peak}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._tokens, self._seconds = state_dict["tokens"], state_dict["seconds"]
        self._peak = state_dict.get("peak", 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began, self._recorded = time.monotonic(), trainer.global_step
        self._flops_per_token = flops_per_token(pl_module)
        _forget_peak(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._pending += batch["tokens"].numel() * trainer.world_size
        if trainer.fit_loop._should_accumulate():
            return
        self._tokens, self._pending = self._tokens + self._pending, 0  # of whole optimizer steps, as checkpoints are
        if not due(trainer, trainer.global_step):
            return
        self._count(trainer)
        self._draw(trainer, "train/")
        if trainer.global_step < trainer.max_steps:  # else a validation follows, which takes time too
            self._record(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.global_step == 0:
            return
        self._draw(trainer, "val/")
        if self._began is None:  # the last validation of a run that was killed in it
            self._record(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._recorded != trainer.global_step:
            if not due(trainer, trainer.global_step):  # a run that has stopped early
                self._count(trainer)
            self._record(trainer, pl_module)
        self._seconds, self._began = self._run_time(), None

    def _count(self, trainer: Trainer) -> None:
        """Write how much was trained by now."""
        scalars = {"train/tokens": float(self._tokens)}
        if self._flops_per_token is not None:
            scalars["train/flops"] = self._tokens * self._flops_per_token
        write(trainer, scalars, trainer.global_step)

    def _record(self, trainer: Trainer, module: LightningModule) -> None:
        """Write the time and memory that were used by now; the ranks do it together."""
        self._recorded = trainer.global_step
        scalars = {"train/seconds": self._run_time()}
        peak = peak_memory(module.device)
        if peak is not None:
            ranks = torch.tensor(float(peak), device=module.device)
            self._peak = max(self._peak, float(trainer.strategy.reduce(ranks, reduce_op="max")))
            scalars["train/peak_memory"] = self._peak
        write(trainer, scalars, trainer.global_step)

    def _run_time(self) -> float:
        return self._seconds + (0.0 if self._began is None else time.monotonic() - self._began)

    def _draw(self, trainer: Trainer, stage: str) -> None:
        values = {tag: trainer.callback_metrics[tag] for tag in VS_TOKENS if tag in trainer.callback_metrics}
        own = {f"vs_tokens/{tag}": float(value) for tag, value in values.items() if tag.startswith(stage)}
        for board in boards(trainer):
            board.log_metrics(own, self._tokens)
            board.save()


def points(rows: Iterable[Mapping[str, str]]) -> list[Point]:
    """What TensorBoard shows of rows of metrics.csv: their scalars, and the curves against tokens."""
    rows = list(rows)
    known = {0: 0.0} | {int(row["step"]): float(row["train/tokens"]) for row in rows if "train/tokens" in row}
    found = []
    for row in rows:
        step = int(row["step"])
        found += [Point(tag, step, float(value)) for tag, value in row.items() if tag != "step"]
        if len(known) > 1:  # else a run from before tokens were written
            tokens = round(float(np.interp(step, list(known), list(known.values()))))
            found += [Point(f"vs_tokens/{tag}", tokens, float(row[tag])) for tag in VS_TOKENS if tag in row]
    return found


def peak_memory(device: torch.device) -> int | None:
    """The most memory that this process had at once, in bytes; see `Consumption`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():  # getrusage would count the memory of the process that started this one
        found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def _forget_peak(device: torch.device) -> None:
    """Let the peak begin with training: what was read and tokenized before is not the model's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _STATUS.exists():
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # a container may forbid it; the peak is then the process's
            return
