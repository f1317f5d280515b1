"""Writing scalars so that the step axis counts finished optimizer steps.

Lightning's own logging counts from 0 and is one step behind during validation; a logged `step` would correct that but
stay behind in `callback_metrics`, where ModelCheckpoint reads it. So during fit the loggers are called here.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from lightning import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor


def due(trainer: Trainer, step: int) -> bool:
    """Whether an optimizer step, counted from 1, is one whose scalars are written: every n-th, and the last."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]  (Lightning sets it from afar)
    return step == trainer.max_steps or (every > 0 and step % every == 0)


def record(module: LightningModule, scalars: Mapping[str, Tensor | float], step: int) -> None:
    """Write scalars at an optimizer step, and let callbacks monitor them.

    Call it on every rank, with values that are already those of all ranks.
    """
    trainer = module.trainer
    values = {tag: float(value) for tag, value in scalars.items()}
    fitting = trainer.state.fn == TrainerFn.FITTING or trainer.global_step > 0  # a training's last validation by itself
    # Outside of a training Lightning writes them itself, and returns them from validate() and test().
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*but have no logger configured")
        module.log_dict(values, logger=not fitting, sync_dist=not trainer.training)
    if fitting:
        write(trainer, values, step)


def write(trainer: Trainer, scalars: Mapping[str, float], step: int) -> None:
    """Write scalars at an optimizer step, for nobody to monitor."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(scalars), step)
        logger.save()
