"""Which run directory and checkpoint a recipe's `resume` means, and whether the recipe may go on from there."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from longnet_kit import checkpoint_io, recipe, runs
from longnet_kit.dotted import leaves
from longnet_kit.errors import UserError
from longnet_kit.recipe import Recipe

FREE_ON_RESUME = (
    ("trainer", "max_steps"),
    ("trainer", "max_time"),
    ("trainer", "devices"),
    ("trainer", "num_nodes"),
    ("strategy",),
    ("checkpoint",),
    ("optimizer", "max_skipped_steps"),
    ("model", "activation_checkpointing"),
    ("model", "ffn_chunk"),
    ("model", "loss_chunk"),
)
"""What may differ from the saved recipe when a run is resumed; its origin and the words about it aside."""


class Place(NamedTuple):
    """Where a run goes on or starts."""

    directory: Path | None = None
    """The run directory to go on in; None for a new one."""
    ckpt: Path | None = None
    """The checkpoint to go on from; None for a start from scratch."""
    is_finished: bool = False
    """Whether the run there has done all the steps that the recipe asks for."""
    is_new: bool = False
    """Whether the directory was made for this run."""


def find(r: Recipe, say: runs.Say = lambda _: None) -> Place:
    """Where a recipe's run goes on, by its `resume`; a checkpoint that this names is not looked into.

    Args:
        say: takes a note where a newer version of the run that `resume` names is passed over.

    Raises:
        UserError: there is nothing to resume, or it was trained under another recipe.
    """
    if r.resume is None:
        return Place()
    if r.resume == "auto":
        saved = [d for d in runs.versions(r.name) if (d / runs.RECIPE).is_file()]
        if not saved:
            return Place()
        return at(r, saved[-1])
    path = Path(r.resume)
    ckpt = path if runs.is_file(path) else runs.checkpoint(runs.find(path, say))
    run_directory = runs.of_checkpoint(ckpt)
    if (run_directory / runs.RECIPE).is_file():
        _check_same(r, run_directory)
    return Place(ckpt=ckpt)


def at(r: Recipe, directory: Path) -> Place:
    """How far a recipe's run has come in a run directory; the newest checkpoints do not count if they are damaged.

    Raises:
        UserError: it was trained under another recipe, or for longer, or all its checkpoints are damaged.
    """
    _check_same(r, directory)
    is_finished, found = _is_finished(directory, r), runs.checkpoints(directory)
    sound = next((ckpt for ckpt in reversed(found) if not checkpoint_io.damage(ckpt)), None)
    if found and sound is None and not is_finished:
        raise UserError(
            f"resume: all checkpoints of {directory} are damaged; to start it again from scratch, remove its "
            f"{runs.CHECKPOINTS}/, or leave it as it is and train without resume"
        )
    if sound is not None and runs.step_of(sound) > r.trainer["max_steps"]:
        raise UserError(
            f"resume: {sound} has done more than the {r.trainer['max_steps']} steps of trainer.max_steps; set it to "
            f"at least {runs.step_of(sound)}"
        )
    return Place(directory, sound, is_finished)


def set_damaged_aside(directory: Path, ckpt: Path) -> list[str]:
    """Rename the checkpoints after the one that a run goes on from, which were found damaged; returns notes on them."""
    notes = []
    for damaged in runs.checkpoints(directory):
        if runs.step_of(damaged) > runs.step_of(ckpt):
            wrong = checkpoint_io.damage(damaged)
            what = f"{damaged} is damaged ({wrong}) and is now {checkpoint_io.set_aside(damaged).name}"
            notes.append(f"{what}; goes on from {ckpt.name}")
    for link in (runs.LATEST, runs.BEST):
        place = directory / runs.CHECKPOINTS / link
        if place.is_symlink() and not place.exists():
            checkpoint_io.point(place, ckpt)
    return notes


def _is_finished(directory: Path, r: Recipe) -> bool:
    """Whether a run has done all the steps that the recipe asks for."""
    if runs.read_summary(directory).get("status") != "finished":
        return False
    return recipe.load_saved(directory).trainer["max_steps"] >= r.trainer["max_steps"]


def _check_same(r: Recipe, run_directory: Path) -> None:
    """Refuse to resume a run under a recipe that would make it another experiment."""
    saved, now = (dict(leaves(recipe.to_dict(x))) for x in (recipe.load_saved(run_directory), r))
    fewest = min(x["trainer.max_steps"] for x in (saved, now))
    for values in (saved, now):  # a warm-up that was clipped to the steps of either is the same warm-up
        values["optimizer.warmup_steps"] = min(values["optimizer.warmup_steps"], fewest)
    free = ("init_from", "resume", "name", "description", "extends", *(".".join(key) for key in FREE_ON_RESUME))
    changed = [
        f"{key}: {saved.get(key)!r} there, {now.get(key)!r} here"
        for key in dict.fromkeys((*saved, *now))
        if saved.get(key) != now.get(key) and not any(key == f or key.startswith(f + ".") for f in free)
    ]
    if changed:
        allowed = ", ".join(".".join(key) for key in FREE_ON_RESUME)
        raise UserError(
            f"resume: {run_directory} was trained under another recipe ({'; '.join(changed)}); only {allowed} may "
            "change. Set them back, or start a new run with init_from"
        )
