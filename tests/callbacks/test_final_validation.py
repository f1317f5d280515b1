"""A validation at the last step, and no stop left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning import Callback
from lightning.pytorch.callbacks import EarlyStopping

from longnet_kit.callbacks import FinalValidation
from tests.tasks.tiny import Data, logged, task, trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


@pytest.mark.parametrize(("interval", "validated"), [(2, [2, 4, 5]), (3, [3, 5]), (5, [5]), (1, [1, 2, 3, 4, 5])])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_last_step_is_validated_once(tmp_path: Path, interval: int, validated: list, accumulate: int) -> None:
    run = trainer(
        tmp_path,
        FinalValidation(),
        max_steps=5,
        accumulate_grad_batches=accumulate,
        val_check_interval=interval * accumulate,
    )
    run.fit(task(5), datamodule=Data())
    assert list(logged(tmp_path)["val/loss"]) == validated
    assert run.global_step == 5
    assert not run.should_stop, "a finished run looks stopped"


def test_without_validation_nothing_is_asked_for(tmp_path: Path) -> None:
    run = trainer(tmp_path, FinalValidation(), limit_val_batches=0)
    run.fit(task(), datamodule=Data())
    assert not run.should_stop and run.global_step == 4
    assert "val/loss" not in logged(tmp_path)


@pytest.mark.parametrize("step", [2, 4])
def test_a_real_stop_stays_a_stop(tmp_path: Path, step: int) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == step

    run = trainer(tmp_path, Stop(), FinalValidation())
    run.fit(task(), datamodule=Data())
    assert run.should_stop and run.global_step == step
    assert list(logged(tmp_path)["val/loss"]) == [step]


def test_early_stopping_at_the_last_validation_is_not_taken_back(tmp_path: Path) -> None:
    never_better = EarlyStopping("val/loss", patience=1, min_delta=100)
    run = trainer(tmp_path, FinalValidation(), never_better, max_steps=6, val_check_interval=2)
    run.fit(task(6), datamodule=Data())
    assert run.should_stop and run.global_step == 4


def test_a_shorter_run_than_the_epoch_is_validated_too(tmp_path: Path) -> None:
    """Where the loader holds more batches than max_steps takes."""

    class Longer(Data):
        def train_dataloader(self) -> Any:
            import torch

            from tests.tasks.tiny import BATCH, Windows

            return torch.utils.data.DataLoader(Windows(100), BATCH)

    run = trainer(tmp_path, FinalValidation(), val_check_interval=50)
    run.fit(task(), datamodule=Longer())
    assert list(logged(tmp_path)["val/loss"]) == [4]
