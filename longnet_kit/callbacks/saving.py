"""When a run is saved, which of its checkpoints stay, and ending it at a checkpoint when a signal asks for that."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_warn

from longnet_kit import checkpoint_io, runs
from longnet_kit.callbacks.generators import Generators
from longnet_kit.callbacks.non_finite import NonFiniteError, wrong_weights
from longnet_kit.errors import UserError
from longnet_kit.parallel.agreement import gathered, greatest
from longnet_kit.signals import Interrupted, Listener

MONITORED = "val/loss"
"""The scalar whose lowest value makes the best checkpoint."""
PATIENCE = 3
"""Saves in a row that may fail before the run stops."""


class SaveError(UserError):
    """A run that cannot be saved any more."""


class Saving(Checkpoint):
    """Saves every n-th optimizer step, the last one, a validation that is the best so far, and a run that ends early.

    The newest `keep` checkpoints stay, and the best. `latest.ckpt` and `best.ckpt` are symbolic links to them, where
    the filesystem has such. A save that fails is told of and leaves the earlier checkpoints; the third step in a row
    ends the run.

    A run that ends by an error saves too, unless the error came in the middle of an update, or on a rank of several
    that may be alone with it.

    Args:
        every_n_steps: optimizer steps from one save to the next.
        keep: how many of the newest stay.
        keep_best: whether the one with the lowest `val/loss` is saved and stays.
        generators: the callback that keeps the random generators, and knows whether a step is half done.
        listener: which signal has come.

    Raises:
        SaveError: during training, if three steps in a row could not be saved, or the last one.
        NonFiniteError: during training, if an update has made a weight that is not finite.
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
        self._scalars: Mapping[str, float] = {}
        self._validated: dict[int, float] = {}
        self._failed: set[int] = set()
        self._first_step = 0
        self._is_updating = False

    def begin(self, folder: Path, validated: Mapping[int, float], scalars: Mapping[str, float]) -> None:
        """Prepare for a run directory.

        Args:
            folder: the folder of checkpoints.
            validated: `val/loss` by step, for every validation in the metrics.csv of a resumed run.
            scalars: the last value of every scalar, kept up to date by a logger on every rank.
        """
        self.folder, self._validated, self._scalars = folder, {**validated}, scalars

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = trainer.global_step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._is_updating = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._generators.is_mid_step:
            return
        self._is_updating = False
        if trainer.global_step % self._every_n_steps == 0 or trainer.global_step >= trainer.max_steps:
            if wrong := _wrong_on_any_rank(trainer, pl_module):
                raise NonFiniteError(
                    f"step {trainer.global_step}: its update has made {wrong[0]} not finite; not saved"
                )
            self._save(trainer)
        self._end_if_asked(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._end_if_asked(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        loss = self._scalars.get(MONITORED, math.nan)  # as metrics.csv has it; callback_metrics rounds to float32
        best = self._best_of(runs.checkpoints_in(self.folder))
        is_best = best is None or loss < self._validated[runs.step_of(best)]
        self._validated[trainer.global_step] = loss
        if trainer.strategy.broadcast(self._keep_best and is_best and not math.isnan(loss)):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > self._first_step and (problem := self._save(trainer, is_last=True)):
            raise SaveError(
                f"step {trainer.global_step}, the last, could not be saved in {self.folder} ({problem}); make room, "
                "then go on with resume=auto"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Catch up with what a kill has left undone, where there was nothing more to train."""
        if trainer.is_global_zero and runs.checkpoints_in(self.folder):
            with suppress(OSError):
                self._sort_out()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        on_all_ranks = trainer.world_size == 1 or isinstance(exception, (Interrupted, NonFiniteError))
        is_sound = on_all_ranks and not self._is_updating and not isinstance(exception, SaveError)
        if is_sound and trainer.global_step > self._first_step and not _wrong_on_any_rank(trainer, pl_module):
            self._save(trainer, is_last=True)

    def state_dict(self) -> dict[str, Any]:
        return {"validated": self._validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up losses that metrics.csv may not have."""
        self._validated = state_dict["validated"] | self._validated

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        _settle(checkpoint["loops"]["fit_loop"], trainer)
        checkpoint["epoch"] = 0

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        is_validated = int(checkpoint["global_step"]) in self._validated  # in metrics.csv: load_state_dict comes later
        _ask_for_validation(checkpoint["loops"]["fit_loop"], trainer, is_wanted=not is_validated)
        for callback in [name for name in checkpoint["callbacks"] if name.startswith("Timer")]:
            del checkpoint["callbacks"][callback]  # trainer.max_time is that of one start

    def _end_if_asked(self, trainer: Trainer) -> None:
        (signum,) = greatest(trainer, self._listener.received)
        if signum:
            raise Interrupted(signum, trainer.global_step)

    def _save(self, trainer: Trainer, is_last: bool = False) -> str:
        """Save the step where the run is, unless that was done, and sort out what stays; returns what was wrong.

        Args:
            is_last: no other step comes, so that a failure is only told of.

        Raises:
            SaveError: it was the third step in a row that could not be saved.
        """
        io: Any = trainer.strategy.checkpoint_io
        step, problem = trainer.global_step, ""
        path = runs.checkpoint_of(self.folder, step)
        if not trainer.strategy.broadcast(path.exists()):
            trainer.save_checkpoint(path)
            problem = trainer.strategy.broadcast(io.problem)
        if not problem:
            self._failed = set()
            if trainer.is_global_zero:
                with suppress(OSError):  # links and old checkpoints are no reason to end a run
                    self._sort_out()
            return ""
        if not is_last and trainer.strategy.broadcast(not self.folder.parent.is_dir()):
            raise SaveError(f"step {step} could not be saved: {self.folder.parent} is gone")
        is_told = step in self._failed
        self._failed.add(step)
        told = f"step {step} could not be saved in {self.folder} ({problem})"
        if len(self._failed) >= PATIENCE and not is_last:
            raise SaveError(
                f"{told}, nor could the two saves before. The run has stopped: make room, then go on with resume=auto"
            )
        if not is_told:
            newest = next((p.name for p in reversed(runs.checkpoints_in(self.folder))), "none")
            goes_on = "" if is_last else "; training goes on. Make room there: the run stops when three steps fail"
            rank_zero_warn(f"{told}; the newest checkpoint is {newest}{goes_on}")
        return problem

    def _sort_out(self) -> None:
        """Point the links to the newest and the best checkpoint, and remove what is neither among the newest nor best.

        What a link points to that could not be changed stays too.
        """
        found = runs.checkpoints_in(self.folder)
        best = self._best_of(found)
        stay = {*found[-self._keep :], *([best] if best else [])}
        for name, target in ((runs.LATEST, found[-1]), (runs.BEST, best)):
            link = self.folder / name
            if target is not None and not checkpoint_io.point(link, target) and link.exists():
                stay.add(link.with_name(link.resolve().name))
        for path in found:
            if path not in stay:
                checkpoint_io.remove(path)

    def _best_of(self, checkpoints: list[Path]) -> Path | None:
        """The one with the lowest loss; the first of equals."""
        losses = [(self._validated.get(runs.step_of(path), math.nan), path) for path in checkpoints]
        measured = [(loss, path) for loss, path in losses if not math.isnan(loss)] if self._keep_best else []
        return min(measured, key=lambda x: x[0])[1] if measured else None


def _wrong_on_any_rank(trainer: Trainer, module: LightningModule) -> list[str]:
    """The weights that an update has made not finite."""
    return [name for names in gathered(trainer, wrong_weights(module)) for name in names]


def _settle(loops: dict[str, Any], trainer: Trainer) -> None:
    """Make saved loops depend on the optimizer step alone: those of `on_train_batch_end` in the one epoch of a run.

    It does not matter then where a run is when it saves (in a batch, in a validation, after the last epoch), nor where
    it was killed and resumed before. Half an accumulated step is taken back.
    """
    batches = loops["epoch_loop.batch_progress"]
    whole = batches["total"]["processed"] // trainer.accumulate_grad_batches * trainer.accumulate_grad_batches
    _set_all(batches, whole, completed=whole - 1)
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = trainer.global_step - 1
    for progress in loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"].values():
        _set_all(progress, trainer.global_step)
    _set_all(loops["epoch_loop.val_loop.batch_progress"], 0)
    _set_all(loops["epoch_progress"], 1, processed=0, completed=0)


def _ask_for_validation(loops: dict[str, Any], trainer: Trainer, is_wanted: bool) -> None:
    """Let Lightning begin with the validation that is due at the step of a checkpoint, or else without it.

    Lightning validates where the saved loops are those of a validation before its first batch.
    """
    batches, validation = loops["epoch_loop.batch_progress"], loops["epoch_loop.val_loop.batch_progress"]
    count = batches["total"]["processed"]
    is_due = trainer.enable_validation and count % int(trainer.val_check_interval) == 0
    _set_all(validation, 0)
    if is_wanted and is_due:
        _set_all(batches, count)
        _set_all(validation, 1, processed=0, completed=0)


def _set_all(progress: dict[str, Any], count: int, **others: int) -> None:
    """Set what a saved loop counts, in total and in the current epoch."""
    for counts in (progress["total"], progress["current"]):
        counts.update(dict.fromkeys(counts, count) | others)
    if "is_last_batch" in progress:
        progress["is_last_batch"] = False
