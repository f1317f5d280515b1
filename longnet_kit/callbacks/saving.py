"""When a run is saved, which of its checkpoints stay, and ending it at a checkpoint when a signal asks for that."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_warn

from longnet_kit import checkpoint_io, runs
from longnet_kit.callbacks.generators import Generators
from longnet_kit.callbacks.non_finite import NonFiniteError
from longnet_kit.parallel.agreement import greatest
from longnet_kit.signals import Interrupted, Listener

MONITORED = "val/loss"
"""The scalar whose lowest value makes the best checkpoint."""
PATIENCE = 3
"""Saves in a row that may fail before the run stops."""


class SaveError(ValueError):
    """A run that cannot be saved any more."""


class Saving(Checkpoint):
    """Saves every n-th optimizer step, the last one, a validation that is the best so far, and a run that ends early.

    The newest `keep` checkpoints stay, and the best. `latest.ckpt` and `best.ckpt` are symbolic links to them, where
    the filesystem has such. A save that fails is told of and leaves the earlier checkpoints; the third in a row ends
    the run.

    A run that ends by an error saves too, unless the error came in the middle of an update, or on a rank of several
    that may be alone with it.

    Args:
        every_n_steps: optimizer steps from one save to the next.
        keep: how many of the newest stay.
        keep_best: whether the one with the lowest `val/loss` is saved and stays.
        generators: the callback that keeps the random generators, and knows whether a step is half done.
        listener: which signal has come.

    Raises:
        SaveError: during training, if three saves in a row have failed.
        Interrupted: during training, on all ranks, when a signal has come to one.
    """

    def __init__(
        self, *, every_n_steps: int, keep: int, keep_best: bool, generators: Generators, listener: Listener
    ) -> None:
        self.folder = Path(runs.CHECKPOINTS)
        self._every_n_steps = every_n_steps
        self._keep = keep
        self._keep_best = keep_best
        self._generators = generators
        self._listener = listener
        self._validated: dict[int, float] = {}
        self._failures = 0
        self._first_step = 0
        self._is_updating = False

    def begin(self, folder: Path, validated: Mapping[int, float]) -> None:
        """Say where checkpoints go, and the `val/loss` of earlier steps that a resumed run goes on from."""
        self.folder, self._validated = folder, dict(validated)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listener.install()  # Lightning has put its own handlers there
        self._first_step = trainer.global_step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._is_updating = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._generators.is_mid_step:
            return
        self._is_updating = False
        if trainer.global_step % self._every_n_steps == 0 or trainer.global_step >= trainer.max_steps:
            self._save(trainer)
        self._end_if_asked(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._end_if_asked(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = float(trainer.callback_metrics.get(MONITORED, math.nan))
        if trainer.sanity_checking or math.isnan(loss):
            return
        best_before = self._best()
        self._validated[trainer.global_step] = loss
        if self._keep_best and self._best() != best_before:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > self._first_step:
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        on_all_ranks = trainer.world_size == 1 or isinstance(exception, (Interrupted, NonFiniteError))
        is_sound = on_all_ranks and not self._is_updating and not isinstance(exception, SaveError)
        if is_sound and trainer.global_step > self._first_step:
            self._save(trainer, is_last=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._generators.is_mid_step:
            _take_back_half_a_step(checkpoint["loops"]["fit_loop"], trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if int(checkpoint["global_step"]) not in self._validated:
            _ask_for_validation(checkpoint["loops"]["fit_loop"])

    def _end_if_asked(self, trainer: Trainer) -> None:
        (signum,) = greatest(trainer, self._listener.received)
        if signum:
            raise Interrupted(signum, trainer.global_step)

    def _save(self, trainer: Trainer, is_last: bool = False) -> None:
        """Save the step where the run is, unless that was done, and sort out what stays."""
        io: Any = trainer.strategy.checkpoint_io
        path = runs.checkpoint_of(self.folder, trainer.global_step)
        problem = ""
        if not trainer.strategy.broadcast(path.exists()):
            trainer.save_checkpoint(path)
            problem = trainer.strategy.broadcast(io.problem)
        if not problem:
            self._failures = 0
            if trainer.is_global_zero:
                with suppress(OSError):  # links and old checkpoints are no reason to end a run
                    self._sort_out()
            return
        self._failures += 1
        told = f"step {trainer.global_step} could not be saved in {self.folder} ({problem})"
        if self._failures < PATIENCE or is_last:
            newest = next((p.name for p in reversed(runs.checkpoints_in(self.folder))), "none")
            goes_on = "" if is_last else "; training goes on. Make room there: the run stops when it fails three times"
            rank_zero_warn(f"{told}; the newest checkpoint is {newest}{goes_on}")
        else:
            raise SaveError(
                f"{told}, nor could the two saves before. The run has stopped: make room, then go on with resume=auto"
            )

    def _sort_out(self) -> None:
        found = runs.checkpoints_in(self.folder)
        newest, best = found[-self._keep :], self._best_of(found)
        _link(self.folder / runs.LATEST, found[-1])
        if best is not None:
            _link(self.folder / runs.BEST, best)
        for path in found:
            if path not in newest and path != best:
                checkpoint_io.remove(path)

    def _best(self) -> int | None:
        """The step with the lowest loss; the first of equals."""
        return min(self._validated, key=lambda step: (self._validated[step], step), default=None)

    def _best_of(self, checkpoints: list[Path]) -> Path | None:
        steps = {runs.step_of(path): path for path in checkpoints}
        measured = [step for step in steps if step in self._validated] if self._keep_best else []
        return steps[min(measured, key=lambda step: (self._validated[step], step))] if measured else None


def _link(link: Path, target: Path) -> None:
    """Make a symbolic link to a file beside it, in place of an earlier one."""
    staged = link.with_name(f".{link.name}.link")
    with suppress(OSError, NotImplementedError):
        staged.unlink(missing_ok=True)
        staged.symlink_to(target.name)
        os.replace(staged, link)


def _take_back_half_a_step(loops: dict[str, Any], trainer: Trainer) -> None:
    """Make saved loops those of the end of the last whole optimizer step, as if saved in `on_train_batch_end`."""
    batches = loops["epoch_loop.batch_progress"]
    half = batches["current"]["processed"] % trainer.accumulate_grad_batches
    for counts in (batches["total"], batches["current"]):
        counts["ready"] = counts["started"] = counts["processed"] = counts["processed"] - half
        counts["completed"] = counts["processed"] - 1
    batches["is_last_batch"] = False
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = trainer.global_step - 1
    progress = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    for kind in ("step", "zero_grad"):
        for counts in progress[kind].values():
            counts.update(dict.fromkeys(counts, counts["completed"]))


def _ask_for_validation(loops: dict[str, Any]) -> None:
    """Make saved loops those of a validation before its first batch; where none was due, Lightning does not look there.

    Otherwise Lightning leaves out the validation that was due at the step of a checkpoint.
    """
    progress = loops["epoch_loop.val_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        counts.update(ready=1, started=1, processed=0, completed=0)
