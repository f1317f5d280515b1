"""From a recipe to a run: the one place that puts task, data, callbacks, loggers and Trainer together."""

from __future__ import annotations

import dataclasses
import logging
import os
import shlex
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins import DoublePrecision
from lightning.pytorch.profilers import AdvancedProfiler, SimpleProfiler

from longnet_kit import (
    callbacks,
    checkpoint_io,
    data,
    model,
    parallel,
    placement,
    recipe,
    recipe_schema,
    resume,
    run_lock,
    runs,
    tasks,
    weights,
)
from longnet_kit.data import tokenizers
from longnet_kit.parallel.strategies import SequenceParallel
from longnet_kit.recipe import Recipe

VALIDATIONS = 5
"""How often a run validates when its recipe does not say."""


def build_data(r: Recipe) -> LightningDataModule:
    """The recipe's data module, its cache not yet built."""
    return data.build(r.data, seed=r.seed)


def build_task(r: Recipe) -> LightningModule:
    """The recipe's LightningModule; its `.model` is the bare network.

    Raises:
        ValueError: the model cannot be built, or the weights of `init_from` do not fit it.
    """
    precision = placement.precision(r)
    vocab_size = tokenizers.build(r.data.tokenizer).vocab_size
    network = model.build(r.model, vocab_size, r.data.seq_len, dtype=model.compute_dtype(precision))
    if precision == "64-true" and torch.get_default_dtype() != torch.float64:
        network.double()  # now: Lightning does it after a checkpoint is loaded, and what is loaded would be rounded
    task_class = tasks.registry.get(r.task)
    task = task_class(network, r.optimizer, max_steps=r.trainer["max_steps"], eval_contexts=r.data.eval_contexts)
    if r.init_from is not None:
        weights.load(network, Path(r.init_from))
    return task


def run(r: Recipe) -> Path:
    """Train what the recipe says; what `longnet fit` does.

    Returns:
        The run directory.

    Raises:
        ValueError: the recipe, its data or its checkpoint cannot be used. Nothing was trained then.
    """
    trainer = _trainer(r, logger=False, callbacks=_callbacks(r))  # from here on each process knows its rank
    for note in r.notes:
        _say(f"note: {note}")
    seed_everything(r.seed, workers=True, verbose=False)
    datamodule = build_data(r)
    task = _built_by_the_first(r, datamodule) if trainer.is_global_zero else build_task(without_weights(r))
    with ExitStack() as held:
        place = parallel.agree(trainer, lambda: _claim(r, held))
        if r.init_from is not None and place.ckpt is None and not trainer.is_global_zero:
            weights.load(task.model, Path(r.init_from))  # type: ignore[arg-type]
        if not place.is_finished:
            return _fit(r, trainer, task, datamodule, place)
    _say(f"{place.directory} has finished its {r.trainer['max_steps']} steps; raise trainer.max_steps to train it on")
    assert place.directory is not None
    return place.directory


def evaluate(path: str | Path, overrides: list[str] | None = None, which: str = "validate") -> dict[str, float]:
    """Validate or test the newest checkpoint of a run.

    Args:
        path: a run directory, runs/<name> (its newest version), or a recipe whose run is in runs/<its name>.
        overrides: dotlist items over the run's recipe.
        which: `validate` or `test`.

    Returns:
        Every metric by its tag; they are printed too.

    Raises:
        ValueError: there is no run or no checkpoint, or its data cannot be used.
    """
    path = Path(path)
    if not path.is_dir():
        path = runs.ROOT / recipe.load(path, overrides or []).name
    directory = runs.find(path)
    r = recipe.load_saved(directory, overrides or [])
    ckpt = runs.checkpoint(directory)
    trainer = _trainer(r, logger=False, callbacks=_progress(r))
    datamodule = build_data(r)
    if trainer.is_global_zero:
        datamodule.prepare_data()
        datamodule.setup(which)
    task = build_task(r)
    weights.load(task.model, ckpt)  # type: ignore[arg-type]
    with _lightning_errors():
        results: dict[str, float] = {}
        for metrics in getattr(trainer, which)(task, datamodule=datamodule, verbose=False):
            results.update(metrics)
    _say("\n".join([f"{which} of {ckpt}", *(f"  {tag:<28} {value:.4f}" for tag, value in sorted(results.items()))]))
    return results


def show(r: Recipe) -> str:
    """The resolved recipe, the parameter count and the FLOPs per token, as text. No weight is allocated."""
    with torch.device("meta"):
        network = build_task(without_weights(r)).model
    parameters = sum(p.numel() for p in network.parameters())  # type: ignore[union-attr]
    embedding = network.embedding.weight.numel()  # type: ignore[union-attr]
    flops = network.flops(r.data.seq_len)  # type: ignore[operator]
    per_token = "unknown: the attention backend does not count its FLOPs"
    if flops is not None:
        forward = flops / r.data.seq_len
        per_token = (
            f"{_si(forward)} forward, {_si(3 * forward)} in training (matrix products, {r.data.seq_len:,} tokens)"
        )
    lines = [
        recipe.dumps(r).rstrip(),
        "",
        f"parameters       {parameters:,} ({_si(parameters)}; {_si(parameters - embedding)} without the embedding)",
        f"FLOPs per token  {per_token}",
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in r.notes)])


def _built_by_the_first(r: Recipe, datamodule: LightningDataModule) -> LightningModule:
    """The task of the first rank, once its data is there: errors end the run before a process is started."""
    place = resume.find(r)
    if not place.is_finished:
        if place.directory is not None:
            run_lock.check_free(place.directory)
        datamodule.prepare_data()
        datamodule.setup("fit")
    task = build_task(r if place.ckpt is None else without_weights(r))
    if place.ckpt is not None and not place.is_finished:
        step = weights.check_resumable(task.model, place.ckpt)  # type: ignore[arg-type]
        if place.directory is None and step >= r.trainer["max_steps"]:
            raise ValueError(
                f"resume: {place.ckpt} has done {step} steps, and trainer.max_steps is {r.trainer['max_steps']}; "
                f"set it above {step} to train on from there"
            )
    return task


def _claim(r: Recipe, held: ExitStack) -> resume.Place:
    """Where the run goes on or starts, its directory made and locked as long as `held` is open, its recipe in it."""
    place = resume.find(r)
    if place.is_finished:
        return place
    directory = place.directory or runs.claim(r.name)
    if note := held.enter_context(run_lock.hold(directory)):
        _say(f"note: {note}")
    if place.directory is not None:
        place = resume.at(r, directory)  # what another process has done until it let go
        if place.is_finished:
            return place
    (directory / runs.SUMMARY).unlink(missing_ok=True)
    checkpoint_io.remove_staged(directory / runs.CHECKPOINTS)
    staged = directory / f".{runs.RECIPE}"
    recipe.save(r, staged)
    os.replace(staged, directory / runs.RECIPE)  # whoever finds a recipe finds a whole one
    return place._replace(directory=directory, is_new=place.directory is None)


def _fit(
    r: Recipe, trainer: Trainer, task: LightningModule, datamodule: LightningDataModule, place: resume.Place
) -> Path:
    """Train, and leave a checkpoint and a summary behind whatever happens.

    Where the user's error comes before the first step, a new directory is removed: there was no run.
    """
    directory, ckpt = place.directory, place.ckpt
    assert directory is not None
    first_step = 0 if ckpt is None else int(torch.load(ckpt, map_location="cpu", weights_only=True)["global_step"])
    earlier = runs.metrics_until(directory, first_step) if ckpt is not None and trainer.is_global_zero else []
    last_values = callbacks.LastValues(earlier)
    purge_step = None if place.is_new else first_step + 1
    trainer.loggers = [*_loggers(r, directory, earlier, purge_step), last_values]
    assert isinstance(trainer.checkpoint_callback, ModelCheckpoint)
    trainer.checkpoint_callback.dirpath = str((directory / runs.CHECKPOINTS).absolute())
    _say(f"{r.name}: {trainer.max_steps} steps into {directory}")
    started, status = time.monotonic(), "failed"
    try:
        with _lightning_errors():
            trainer.fit(task, datamodule=datamodule, ckpt_path=ckpt, weights_only=True)
        status = "finished" if trainer.global_step >= trainer.max_steps else "stopped"
        last = directory / runs.CHECKPOINTS / f"step_{trainer.global_step:08d}.ckpt"
        if trainer.strategy.broadcast(trainer.global_step > first_step and not last.exists()):
            trainer.save_checkpoint(last)
    except ValueError:
        if trainer.is_global_zero and place.is_new and trainer.global_step <= first_step:
            runs.discard(directory)
        raise
    finally:
        if trainer.is_global_zero and directory.is_dir():
            (directory / "hparams.yaml").unlink(missing_ok=True)  # the loggers', empty: recipe.yaml says it all
            runs.write_summary(directory, status, last_values.values)
    if trainer.is_global_zero:
        _say(_closing_lines(directory, status, trainer.global_step, time.monotonic() - started, last_values.values))
    return directory


def _callbacks(r: Recipe) -> list[Callback]:
    return [
        callbacks.Throughput(),  # before the bar, which shows what it measured
        callbacks.Consumption(),
        *_progress(r),
        callbacks.AttentionPattern(),
        callbacks.BranchWeights(),
        callbacks.LossByPosition(),
        callbacks.PerplexityByContext(),
        callbacks.FinalValidation(),
        *([callbacks.Profile()] if r.trainer.get("profiler") == "pytorch" else []),
        ModelCheckpoint(
            filename="step_{step:08d}",
            auto_insert_metric_name=False,
            every_n_train_steps=r.checkpoint.every_n_steps,
            monitor="step",
            mode="max",
            save_top_k=r.checkpoint.keep,
        ),
    ]


def _progress(r: Recipe) -> list[Callback]:
    return [] if r.trainer.get("enable_progress_bar") is False else [callbacks.progress_bar()]


def _loggers(r: Recipe, directory: Path, earlier: list[dict[str, str]], purge_step: int | None) -> list[Logger]:
    """TensorBoard and metrics.csv in the run directory; a resumed run goes on where its checkpoint stands.

    Args:
        earlier: the rows of metrics.csv up to there.
        purge_step: the first step that TensorBoard is to forget; None for none.
    """
    board = callbacks.Board(directory, purge_step)
    table = CSVLogger(directory.parent.parent, name=directory.parent.name, version=directory.name)
    if rank_zero_only.rank == 0:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Experiment logs directory"
            )  # it holds the recipe, and the rows kept here
            table.experiment.metrics.extend(earlier)
        board.describe(recipe.to_dict(r), recipe.dumps(r))
        callbacks.draw_again(board, earlier)
    return [board, table]


def _trainer(r: Recipe, **own: Any) -> Trainer:
    """The Trainer of a recipe. The step count is fixed, so one epoch is the whole run."""
    arguments = dict(r.trainer)
    batches = arguments["max_steps"] * arguments.get("accumulate_grad_batches", 1)
    arguments.setdefault("val_check_interval", max(1, batches // VALIDATIONS))
    if isinstance(arguments["val_check_interval"], int):
        arguments["val_check_interval"] = min(arguments["val_check_interval"], batches)
    if isinstance(arguments.get("devices"), list) and not placement.on_accelerator(r):
        raise ValueError(f"trainer.devices: {recipe_schema.listed_on_cpu(arguments['devices'])}")
    kinds = {"simple": SimpleProfiler, "advanced": AdvancedProfiler}
    kind = kinds.get(arguments.pop("profiler", None))  # pytorch's is a callback's work, see callbacks.Profile
    own["profiler"] = kind(filename="profile") if kind else None  # without a name it would write to a log
    placement.check_world(r)
    strategy = placement.strategy(r)
    plugins: list[Any] = [checkpoint_io.StagedCheckpointIO()]
    if isinstance(strategy, parallel.SequenceParallelFSDPStrategy) and arguments.get("precision") == "64-true":
        del arguments["precision"]  # Lightning takes it for a model-parallel strategy as a plugin only
        plugins.append(DoublePrecision())
    with _lightning_errors():
        trainer = Trainer(
            **arguments,
            strategy=strategy,
            plugins=plugins,
            use_distributed_sampler=False,
            enable_model_summary=False,
            **own,
        )
    if isinstance(trainer.strategy, SequenceParallel):
        try:
            _ = trainer.strategy.sequence_parallel_size  # of devices that only the machine knows
        except ValueError as error:
            raise ValueError(f"strategy.sequence_parallel_size: {error}") from error
    return trainer


@contextmanager
def _lightning_errors() -> Iterator[None]:
    """What Lightning finds wrong with a configuration is the user's error too; its advertisements are not shown."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec", FutureWarning)
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # of a resumed run
            yield
    except MisconfigurationException as error:
        raise ValueError(f"trainer: {error}") from error


def without_weights(r: Recipe) -> Recipe:
    """The recipe without the weights that it starts from."""
    return dataclasses.replace(r, init_from=None)


def _say(text: str) -> None:
    if rank_zero_only.rank == 0:
        print(text, flush=True)


def _closing_lines(directory: Path, status: str, steps: int, seconds: float, scalars: Mapping[str, float]) -> str:
    """Which run it was, its numbers, and what to type next."""
    tags = ("val/loss", "val/perplexity", "val/bits_per_byte", "train/loss", "train/tokens_per_second", "train/mfu")
    numbers = "  ".join(f"{tag} {_si(scalars[tag]) if scalars[tag] >= 1000 else f'{scalars[tag]:.3f}'}"
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


def _si(number: float) -> str:
    """1,234,567 as 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
