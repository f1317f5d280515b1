"""From a recipe to a run: the one place that puts task, data, callbacks, loggers and Trainer together."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning import LightningModule, Trainer, seed_everything

from longnet_kit import (
    data,
    fitting,
    model,
    parallel,
    placement,
    recipe,
    resume,
    run_lock,
    runs,
    signals,
    tasks,
    terminal,
    trainers,
    weights,
)
from longnet_kit.data import LanguageModelingData
from longnet_kit.errors import UserError
from longnet_kit.recipe import Recipe
from longnet_kit.trainers import say, si

T = TypeVar("T")


def build_data(r: Recipe) -> LanguageModelingData:
    """The recipe's data module, its cache not yet built."""
    return data.build(r.data, seed=r.seed)


def build_task(r: Recipe) -> LightningModule:
    """The recipe's LightningModule; its `.model` is the bare network.

    Raises:
        UserError: the model cannot be built, or the weights of `init_from` do not fit it.
    """
    precision = placement.precision(r)
    task_class: Any = tasks.registry.get(r.task)
    build_network = getattr(task_class, "build_network", tasks.LanguageModeling.build_network)
    network = build_network(r, model.compute_dtype(precision))
    if precision == "64-true" and torch.get_default_dtype() != torch.float64:
        network.double()  # now: Lightning does it after a checkpoint is loaded, and what is loaded would be rounded
    task = task_class(network, r.optimizer, max_steps=r.trainer["max_steps"], eval_contexts=r.data.eval_contexts)
    if r.init_from is not None and (note := weights.start_from(network, Path(r.init_from), say)):
        say(f"note: {note}")
    return task


@terminal.outliving()
def run(r: Recipe) -> Path:
    """Train what the recipe says; what `longnet fit` does. A console that goes away does not end it.

    Returns:
        The run directory.

    Raises:
        UserError: the recipe, its data or its checkpoint cannot be used. Nothing was trained then.
    """
    listener = signals.Listener()
    trainer = trainers.build(r, fitting.watchers(r, listener))
    for note in r.notes:
        say(f"note: {note}")
    seed_everything(r.seed, workers=True, verbose=False)
    datamodule, task = _on_all_ranks(r, trainer, lambda: _built(r, trainer))
    with ExitStack() as held:
        place = parallel.agree(trainer, lambda: fitting.claim(r, held))
        if not place.is_finished:
            return fitting.fit(r, trainer, task, datamodule, place, listener)
    say(f"{place.directory} has finished its {r.trainer['max_steps']} steps; raise trainer.max_steps to train it on")
    assert place.directory is not None
    return place.directory


def evaluate(path: str | Path, overrides: list[str] | None = None, which: str = "validate") -> dict[str, float]:
    """Validate or test the newest checkpoint of a run.

    Args:
        path: a run directory, runs/<name> (see `runs.find`), or a recipe whose run is in runs/<its name>.
        overrides: dotlist items over the run's recipe.
        which: `validate` or `test`.

    Returns:
        Every metric by its tag; they are printed too.

    Raises:
        UserError: there is no run or no checkpoint, or its data cannot be used.
    """
    path = Path(path)
    if not os.path.isdir(path):  # False for a name that no folder can have
        path = runs.ROOT / recipe.load(path, overrides or []).name
    ckpt = runs.newest(path, say)
    r = recipe.load_saved(runs.of_checkpoint(ckpt), overrides or [])
    trainer = trainers.build(r, trainers.progress(r))

    def built() -> tuple[LanguageModelingData, LightningModule]:
        datamodule = build_data(r)
        if trainer.is_global_zero:
            datamodule.prepare_data()
            datamodule.setup(which)
        task = build_task(r)
        weights.load(task.model, ckpt)  # type: ignore[arg-type]
        return datamodule, task

    datamodule, task = _on_all_ranks(r, trainer, built, checkpoint=ckpt.name)
    placement.check_checkpoint(trainer, ckpt)
    placement.check_data(trainer, r, datamodule, which)
    with trainers.lightning_errors():
        results: dict[str, float] = {}
        for metrics in getattr(trainer, which)(task, datamodule=datamodule, verbose=False):
            results.update(metrics)
    say("\n".join([f"{which} of {ckpt}", *(f"  {tag:<28} {value:.4f}" for tag, value in sorted(results.items()))]))
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
        per_token = f"{si(forward)} forward, {si(3 * forward)} in training (matrix products, {r.data.seq_len:,} tokens)"
    lines = [
        recipe.dumps(r).rstrip(),
        "",
        f"parameters       {parameters:,} ({si(parameters)}; {si(parameters - embedding)} without the embedding)",
        f"FLOPs per token  {per_token}",
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in r.notes)])


def _on_all_ranks(r: Recipe, trainer: Trainer, build: Callable[[], T], **same: Any) -> T:
    """What `build` returns, once it has on all ranks, connected, with one recipe and the same values of `same`.

    A process that starts the others builds before it does: errors end the run before a process is started.
    """
    built = None if parallel.is_started_by_others(trainer) else build()
    parallel.connect(trainer)
    placement.check_recipes(trainer, r, **same)
    return parallel.together(trainer, lambda: build() if built is None else built)


def _built(r: Recipe, trainer: Trainer) -> tuple[LanguageModelingData, LightningModule]:
    """Data and task of a training."""
    datamodule = build_data(r)
    datamodule.trainer = trainer  # which says whether there is to be validation
    return datamodule, _built_by_the_first(r, datamodule) if trainer.is_global_zero else build_task(without_weights(r))


def _built_by_the_first(r: Recipe, datamodule: LanguageModelingData) -> LightningModule:
    """The task of the first rank, once its data is there: errors end the run before a process is started."""
    place = resume.find(r, say)
    if not place.is_finished:
        if place.directory is not None:
            run_lock.check_free(place.directory)
        datamodule.prepare_data()
        datamodule.setup("fit")
    task = build_task(r if place.ckpt is None else without_weights(r))
    if place.ckpt is not None and not place.is_finished:
        step = weights.check_resumable(task.model, place.ckpt)  # type: ignore[arg-type]
        if place.directory is None and step >= r.trainer["max_steps"]:
            raise UserError(
                f"resume: {place.ckpt} has done {step} steps, and trainer.max_steps is {r.trainer['max_steps']}; "
                f"set it above {step} to train on from there"
            )
    return task


def without_weights(r: Recipe) -> Recipe:
    """The recipe without the weights that it starts from."""
    return dataclasses.replace(r, init_from=None)
