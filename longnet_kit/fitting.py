"""Training in a run directory: claiming it, going on from its checkpoint, and leaving it whole whatever happens."""

from __future__ import annotations

import math
import os
import shlex
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from longnet_kit import (
    callbacks,
    checkpoint_io,
    durable,
    out_of_memory,
    parallel,
    placement,
    recipe,
    resume,
    run_lock,
    runs,
    signals,
    weights,
)
from longnet_kit.data import LanguageModelingData
from longnet_kit.errors import UserError
from longnet_kit.parallel.strategies import SequenceParallel
from longnet_kit.recipe import Recipe
from longnet_kit.tasks.scalars import due
from longnet_kit.trainers import lightning_errors, progress, say, si

Rows = list[dict[str, str]]


def claim(r: Recipe, held: ExitStack) -> resume.Place:
    """Where the run goes on or starts, its directory made and locked as long as `held` is open, its recipe in it."""
    place = resume.find(r)
    if place.is_finished:
        return place
    directory = place.directory or runs.claim(r.name)
    if note := held.enter_context(run_lock.hold(directory)):
        say(f"note: {note}")
    if place.directory is not None:
        place = resume.at(r, directory)  # what another process has done until it let go
        if place.is_finished:
            return place
    problems: list[str] = []
    if place.directory is not None:
        runs.read_summary(directory, problems)
    for problem in problems:
        say(f"note: {directory}: {problem}; the run counts as one that has not ended")
    if (directory / runs.SUMMARY).is_dir():
        raise UserError(f"{directory / runs.SUMMARY} is a directory, where the run writes its summary; move it away")
    with _writing_to(directory):
        (directory / runs.SUMMARY).unlink(missing_ok=True)
        checkpoint_io.remove_staged(directory / runs.CHECKPOINTS)
        if place.ckpt is not None and place.directory is not None:
            for note in resume.set_damaged_aside(directory, place.ckpt):
                say(f"note: {note}")
        with durable.replacing(directory / runs.RECIPE) as staged:
            recipe.save(r, staged)
    return place._replace(directory=directory, is_new=place.directory is None)


def watchers(r: Recipe, listener: signals.Listener) -> list[Callback]:
    """The callbacks of a training, in the order in which they must be called."""
    generators = callbacks.Generators()
    return [
        generators,
        callbacks.NonFinite(generators, r.optimizer.max_skipped_steps),
        callbacks.Throughput(),  # before the bar, which shows what it measured
        callbacks.Consumption(),
        *progress(r),
        callbacks.AttentionPattern(),
        callbacks.BranchWeights(),
        callbacks.LossByPosition(),
        callbacks.PerplexityByContext(),
        callbacks.Confusion(),
        callbacks.FinalValidation(),
        *([callbacks.Profile()] if r.trainer.get("profiler") == "pytorch" else []),
        callbacks.Saving(
            every_n_steps=r.checkpoint.every_n_steps,
            keep=r.checkpoint.keep,
            keep_best=r.checkpoint.keep_best,
            generators=generators,
            listener=listener,
        ),
    ]


def fit(
    r: Recipe,
    trainer: Trainer,
    task: LightningModule,
    datamodule: LanguageModelingData,
    place: resume.Place,
    listener: signals.Listener,
) -> Path:
    """Train, and leave a checkpoint and a summary behind whatever happens.

    Where the user's error comes before the first step, a new directory is removed: there was no run.
    """
    directory = place.directory
    assert directory is not None
    first_step, validated, last_values = _prepare(r, trainer, place)
    say(f"{r.name}: {trainer.max_steps} steps into {directory}{_beginning(r, place, first_step)}")
    started, status = time.monotonic(), "failed"
    try:
        with lightning_errors(), listener.listening():
            if trainer.world_size > 1:
                _check_ranks(r, trainer, task, datamodule, place)
            trainer.fit(task, datamodule=datamodule, ckpt_path=place.ckpt, weights_only=True)
            has_finished = trainer.global_step >= trainer.max_steps
            if has_finished and trainer.global_step == first_step and first_step not in validated:
                trainer.validate(task, datamodule=datamodule, verbose=False)  # killed in its last validation
            status = "finished" if has_finished else "stopped"
    except signals.Interrupted as error:
        status, error.checkpoint = "stopped", next(reversed(runs.checkpoints(directory)), None)
        if error.signum == getattr(signal, "SIGUSR1", None) and trainer.is_global_zero:
            signals.requeue(say, goes_on=r.resume == "auto" and error.checkpoint is not None)
        raise
    except callbacks.NonFiniteError as error:
        newest = (runs.checkpoints(directory) or ["nothing: it was the first"])[-1]
        raise callbacks.NonFiniteError(f"{error}. What was trained before it is {newest}") from error
    except Exception as error:
        if out_of_memory.is_out_of_memory(error):
            if trainer.world_size > 1:
                raise UserError("memory ran out, see above") from error
            raise UserError(out_of_memory.advice(r, error, trainer.global_step + 1)) from error
        if isinstance(error, (OSError, callbacks.SaveError)) and not (directory / runs.RECIPE).exists():
            raise UserError(
                f"{directory} was removed while the run wrote into it: its checkpoints, metrics and events are lost. "
                f"The run ended after step {trainer.global_step}; start it again, and leave its directory alone"
            ) from error
        refused = isinstance(error, UserError) and place.is_new and trainer.global_step <= first_step
        if refused and trainer.is_global_zero:
            runs.discard(directory)
        raise
    finally:
        if trainer.is_global_zero and directory.is_dir():
            try:
                runs.write_summary(directory, status, last_values.values)
            except OSError as error:
                say(f"note: {directory / runs.SUMMARY} cannot be written ({error.strerror})")
    say(_closing_lines(directory, status, trainer.global_step, time.monotonic() - started, last_values.values))
    return directory


def _check_ranks(
    r: Recipe, trainer: Trainer, task: LightningModule, datamodule: LanguageModelingData, place: resume.Place
) -> None:
    """Give all ranks the weights of `init_from`, and refuse ranks whose weights, checkpoint or data differ."""
    if place.ckpt is not None:
        placement.check_checkpoint(trainer, place.ckpt)
    if r.init_from is not None and place.ckpt is None:
        source, network = Path(r.init_from), task.model
        parallel.together(trainer, lambda: trainer.is_global_zero or weights.start_from(network, source, say))  # type: ignore[arg-type]
        digest = weights.digest(network.state_dict())  # type: ignore[union-attr]
        parallel.check_same(trainer, {"the digest of init_from's weights": digest}, "give every rank the same file")
    placement.check_data(trainer, r, datamodule, "fit")


def _prepare(r: Recipe, trainer: Trainer, place: resume.Place) -> tuple[int, dict[int, float], callbacks.LastValues]:
    """Set the trainer up for a run directory.

    Returns:
        The step to go on from, what is validated by then, and the logger of the summary.
    """
    directory, ckpt = place.directory, place.ckpt
    assert directory is not None
    first_step, earlier = 0, []
    is_fork = ckpt is not None and runs.of_checkpoint(ckpt) != directory
    if ckpt is not None and trainer.is_global_zero:
        first_step = int(torch.load(ckpt, map_location="cpu", weights_only=True, mmap=True)["global_step"])
        table = runs.of_checkpoint(ckpt) / runs.METRICS
        with _readable(table):
            earlier = runs.rows_until(table, first_step, None if is_fork else _note)
    validated: dict[int, float]
    first_step, validated = trainer.strategy.broadcast((first_step, _validations(earlier)))
    if is_fork:
        earlier = []  # they are those of the run that it comes from
    elif trainer.is_global_zero and (lost := _lost(earlier, first_step, trainer)):
        which = f"of {len(lost)} steps from {lost[0]} to {lost[-1]}" if earlier else f"up to step {first_step}"
        _note(f"{directory / runs.METRICS} has no rows {which}")
    last_values = callbacks.LastValues(earlier)
    with _writing_to(directory):
        trainer.loggers = [*_loggers(r, directory, earlier, None if place.is_new else first_step + 1), last_values]
    if isinstance(trainer.strategy, SequenceParallel):
        trainer.strategy.explain = lambda error: _explained(r, error, trainer)
    saving = trainer.checkpoint_callback
    assert isinstance(saving, callbacks.Saving)
    saving.begin(directory / runs.CHECKPOINTS, validated, last_values.values)
    return first_step, validated, last_values


def _beginning(r: Recipe, place: resume.Place, first_step: int) -> str:
    """Where a run that is to be resumed goes on, in words; empty for another one."""
    if place.ckpt is not None:
        return f"; goes on from step {first_step}, {place.ckpt}"
    if not place.is_new:
        return "; starts from scratch, since no checkpoint was saved there"
    return "; starts from scratch, since there is no run of this name yet" if r.resume == "auto" else ""


def _lost(rows: Rows, last_step: int, trainer: Trainer) -> list[int]:
    """The steps up to the last that must have a row and have none; a fork's begin with its first row."""
    found = {int(row["step"]) for row in rows}
    wanted = range(min(found, default=1), last_step + 1)
    return [step for step in wanted if due(trainer, step) and step not in found]


def _note(text: str) -> None:
    say(f"note: {text}")


def _explained(r: Recipe, error: BaseException, trainer: Trainer) -> str:
    is_ours = out_of_memory.is_out_of_memory(error)
    return out_of_memory.advice(r, error, trainer.global_step + 1) if is_ours else ""


@contextmanager
def _usable(path: Path, use: str, cure: str) -> Iterator[None]:
    """Report an OSError as the user's error: the path cannot be `use`; the cure says what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be {use} ({error.strerror or error}); {cure}") from error


def _readable(path: Path) -> AbstractContextManager[None]:
    """Report a file of a resumed run that cannot be read, or copied where it is damaged."""
    return _usable(path, "read", "make it readable, or move it away")


def _writing_to(directory: Path) -> AbstractContextManager[None]:
    """Report a directory that cannot be written when a run starts."""
    return _usable(directory, "written", "make room there, or allow writing")


def _validations(rows: Rows) -> dict[int, float]:
    """`val/loss` by the step of every validation; NaN where it was not measured."""
    validations = (row for row in rows if any(tag.startswith("val/") for tag in row))
    return {int(row["step"]): float(row.get(callbacks.MONITORED, math.nan)) for row in validations}


def _loggers(r: Recipe, directory: Path, earlier: Rows, purge_step: int | None) -> list[Logger]:
    """TensorBoard and metrics.csv in the run directory; a resumed run goes on where its checkpoint stands.

    Args:
        earlier: the rows of metrics.csv up to there.
        purge_step: the first step that TensorBoard is to forget; None for none.
    """
    board = callbacks.Board(directory, purge_step, callbacks.points(earlier))
    table = callbacks.MetricsTable(directory / runs.METRICS, earlier)
    if rank_zero_only.rank == 0:
        board.describe(recipe.to_dict(r), recipe.dumps(r))
        board.save()
    return [board, table]


def _closing_lines(directory: Path, status: str, steps: int, seconds: float, scalars: Mapping[str, float]) -> str:
    """Which run it was, its numbers, and what to type next."""
    quality = ("val/loss", "val/accuracy", "val/perplexity", "val/bits_per_byte", "train/loss")
    tags = (*quality, "train/tokens_per_second", "train/mfu")
    numbers = "  ".join(f"{tag} {si(scalars[tag]) if scalars[tag] >= 1000 else f'{scalars[tag]:.3f}'}"
                        for tag in tags if tag in scalars)  # fmt: skip
    command = shlex.quote(os.environ.get("LONGNET_COMMAND", "longnet"))
    return "\n".join(
        [
            f"{status}  {directory}: {steps} steps in {seconds:.0f} s",
            f"          {numbers}",
            f"next      {command} test {directory}",
            f"          {command} compare {runs.ROOT}",
            f"          {command} board",
        ]
    )
