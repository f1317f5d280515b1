"""Progress on the terminal: a bar where there is one, lines where output goes to a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from longnet_kit.tasks.scalars import due


def progress_bar() -> ProgressBar:
    """A bar if standard output is a terminal, else lines."""
    return Bar() if sys.stdout.isatty() else Lines()


class Reporter(ProgressBar):
    """What bar and lines share: words for where a run is. Lightning silences it on all ranks but the first."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self._began = 0.0
        self._first_step = 0

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began, self._first_step = time.monotonic(), trainer.global_step

    def time_left(self, trainer: Trainer) -> str:
        """At the pace of this run so far, validations included."""
        done = trainer.global_step - self._first_step
        if not done:
            return "-:--:--"
        seconds = (time.monotonic() - self._began) / done * (trainer.max_steps - trainer.global_step)
        return str(timedelta(seconds=round(seconds)))

    @staticmethod
    def training_words(scalars: Mapping[str, Any]) -> str:
        """Loss and speed, as far as they are known."""
        words = []
        if "train/loss" in scalars:
            words.append(f"loss {float(scalars['train/loss']):.3f}")
        if "train/tokens_per_second" in scalars:
            words.append(f"{float(scalars['train/tokens_per_second']):,.0f} tokens/s")
        return "  ".join(words)

    @staticmethod
    def evaluation_words(scalars: Mapping[str, Any], stage: str) -> str:
        """Every scalar of a validation or test, without the stage's name."""
        own = {tag.removeprefix(f"{stage}/"): value for tag, value in scalars.items() if tag.startswith(f"{stage}/")}
        in_order = sorted(own, key=lambda tag: (len(tag.partition("@")[2]), tag))  # contexts last
        return "  ".join(f"{tag.replace('_', ' ')} {float(own[tag]):.4g}" for tag in in_order)

    def validation_line(self, trainer: Trainer) -> str:
        """Every scalar of a validation, and during a fit the step: outside of one the trainer does not know it."""
        step = f"step {trainer.global_step}  " if trainer.state.fn == TrainerFn.FITTING else ""
        return f"{step}validation: {self.evaluation_words(trainer.callback_metrics, 'val')}"


class Lines(Reporter):
    """A line now and then: step, loss, tokens per second, time left; and one per validation.

    Args:
        seconds: the least time between two lines about training.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        super().__init__()
        self._seconds = seconds
        self._last_line = float("-inf")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step, now = trainer.global_step, time.monotonic()
        if trainer.fit_loop._should_accumulate() or not due(trainer, step):
            return
        if now - self._last_line >= self._seconds or step == trainer.max_steps:
            self._last_line = now
            words = self.training_words(trainer.callback_metrics)
            self._say(f"step {step}/{trainer.max_steps}  {words}  {self.time_left(trainer)} left")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._say(self.validation_line(trainer))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._say(f"test: {self.evaluation_words(trainer.callback_metrics, 'test')}")

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self.enabled:
            print(*args, **kwargs)

    def _say(self, line: str) -> None:
        self.print(line, flush=True)


class Bar(Reporter):
    """A bar over the optimizer steps of a fit, and another over the batches of a validation or test."""

    def __init__(self) -> None:
        super().__init__()
        self._progress: Progress | None = None
        self._training: TaskID | None = None
        self._evaluation: TaskID | None = None

    def disable(self) -> None:
        super().disable()
        self._stop()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._training = self._add("train", trainer.max_steps, trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._progress is None or self._training is None or trainer.fit_loop._should_accumulate():
            return
        words = self.training_words(trainer.callback_metrics)
        self._progress.update(
            self._training, completed=trainer.global_step, words=f"{words}  {self.time_left(trainer)} left"
        )

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluation = self._add("check", sum(trainer.num_sanity_val_batches))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._evaluation = self._add("validate", sum(trainer.num_val_batches))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._advance()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove()
        if not trainer.sanity_checking:
            self.print(self.validation_line(trainer))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluation = self._add("test", sum(trainer.num_test_batches))

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._advance()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove()
        self.print(f"test: {self.evaluation_words(trainer.callback_metrics, 'test')}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        if self.enabled and self._progress is not None:
            self._progress.console.print(*args, **kwargs, highlight=False, markup=False)
        elif self.enabled:
            print(*args, **kwargs)

    def _add(self, name: str, total: float, done: int = 0) -> TaskID | None:
        if not self.enabled:
            return None
        if self._progress is None:
            columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}")
            self._progress = Progress(*columns, TextColumn("{task.fields[words]}", markup=False), refresh_per_second=4)
            self._progress.start()
        return self._progress.add_task(name, total=total, completed=done, words="")

    def _advance(self) -> None:
        if self._progress is not None and self._evaluation is not None:
            self._progress.advance(self._evaluation)

    def _remove(self) -> None:
        if self._progress is not None and self._evaluation is not None:
            self._progress.remove_task(self._evaluation)
        self._evaluation = None

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._training = self._evaluation = None
