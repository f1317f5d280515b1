"""Run directories: runs/<name>/version_<n>/, claimed, found again and summed up. Nothing here imports torch.

A run directory holds recipe.yaml, TensorBoard events, metrics.csv, checkpoints/ and summary.json.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from longnet_kit import durable, terminal
from longnet_kit.errors import UserError

ROOT = Path("runs")
RECIPE, SUMMARY, METRICS, CHECKPOINTS = "recipe.yaml", "summary.json", "metrics.csv", "checkpoints"
METRICS_SIZE = 2 << 30
"""The most bytes that metrics.csv may have."""
FINISHED = "finished"
Say = Callable[[str], Any]
LATEST, BEST = "latest.ckpt", "best.ckpt"
"""Links to checkpoints, beside them."""


def claim(name: str, root: Path = ROOT) -> Path:
    """Make the next free runs/<name>/version_<n>; two processes never get the same one.

    Raises:
        UserError: the folder cannot be made.
    """
    parent = root / name
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a file of that name is there, or nothing may be written
        raise UserError(
            f"{parent}: cannot make this folder for the run ({error.strerror}); rename what is in its way, or start "
            "from a working directory where runs/ can be written"
        ) from error
    number = max((_number(d) for d in versions(name, root)), default=-1) + 1
    while True:
        try:
            directory = parent / f"version_{number}"
            directory.mkdir()
            return directory
        except FileExistsError:
            number += 1


def versions(name: str, root: Path = ROOT) -> list[Path]:
    """The run directories of a name, oldest first."""
    return sorted((d for d in (root / name).glob("version_*") if d.is_dir() and _number(d) >= 0), key=_number)


def find(path: Path, say: Say = terminal.tell) -> Path:
    """The run directory that `path` means: itself, or one of its versions.

    Of the versions it is the newest one that is finished, else the newest one that has a checkpoint, else the newest.

    Args:
        say: takes a note where a newer version is passed over.

    Raises:
        UserError: there is no run there.
    """
    if (path / RECIPE).is_file():
        return path
    started = [d for d in versions(path.name, path.parent) if (d / RECIPE).is_file()]
    if started:
        saved = [d for d in started if checkpoints(d)]
        finished = [d for d in saved if _status(d) == FINISHED]
        found = (finished or saved or started)[-1]
        if newer := started[started.index(found) + 1 :]:
            others = ", ".join(f"{d.name} ({_state(d)})" for d in newer)
            told = f"{path} means {found.name} here ({_state(found)}); newer: {others}"
            say(f"note: {told}. To use that, give {newer[-1]}")
        return found
    present = sorted(str(d.parent) for d in path.parent.glob(f"**/{RECIPE}")) if path.parent.is_dir() else []
    hint = f"; there are: {', '.join(present)}" if present else ""
    raise UserError(
        f"{path}: no run here (no {RECIPE}, no version_<n> that has one); give a directory like "
        f"{ROOT}/quickstart/version_0, or train one with `longnet fit`{hint}"
    )


def is_file(path: Path) -> bool:
    """Whether a path that may be a run directory is a regular file.

    Raises:
        UserError: it is a pipe, a device or a socket.
    """
    if path.is_file() or path.is_dir() or not path.exists():
        return path.is_file()
    raise UserError(f"{path} is no regular file; give a run directory or a file")


def discard(run: Path) -> None:
    """Remove a run directory, and the folders above it that only it was in."""
    shutil.rmtree(run)
    for folder in (run.parent, run.parent.parent):
        try:
            folder.rmdir()
        except OSError:  # other runs are there
            return


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, by their steps."""
    return checkpoints_in(run / CHECKPOINTS)


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, by their steps."""
    return sorted(folder.glob("step_*.ckpt"), key=_number)


def checkpoint_of(folder: Path, step: int) -> Path:
    """What the checkpoint of an optimizer step is called."""
    return folder / f"step_{step:08d}.ckpt"


def step_of(checkpoint: Path) -> int:
    """The optimizer step of a checkpoint, by its name; -1 where that does not say."""
    return _number(checkpoint)


def newest(path: Path, say: Say = terminal.tell) -> Path:
    """The newest checkpoint of the run that `path` means, as of `find`; which one it is goes to `say`.

    Raises:
        UserError: there is no run, or it has no checkpoint.
    """
    found = checkpoint(find(path, say))
    say(f"reads {found}")
    return found


def checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run, by its step.

    Raises:
        UserError: the run has none.
    """
    found = checkpoints(run)
    if not found:
        raise UserError(
            f"{run}: the run has no checkpoint in {CHECKPOINTS}/; let it train for longer, or start it again"
        )
    return found[-1]


def of_checkpoint(checkpoint: Path) -> Path:
    """The run directory that a checkpoint is in."""
    return checkpoint.parent.parent


def read_summary(run: Path, problems: list[str] | None = None) -> dict[str, Any]:
    """What summary.json holds; empty when the run has not ended or was killed, or the file cannot be used.

    Args:
        problems: receives a sentence where the file is there and cannot be used.
    """
    return read_object(run / SUMMARY, [] if problems is None else problems)


def read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    """The JSON object in a file, in whatever state the file is.

    Args:
        problems: receives a sentence where the file is there and cannot be used.

    Returns:
        The object; empty where there is no file, or no object in it.
    """
    try:
        values = json.loads(durable.read(path))
    except FileNotFoundError:
        if path.is_symlink():
            problems.append(f"{path.name}: a link to nothing")
        return {}
    except OSError as error:
        problems.append(f"{path.name}: cannot be read ({error.strerror})")
        return {}
    except (ValueError, RecursionError):  # also where it is not UTF-8
        problems.append(f"{path.name}: not JSON")
        return {}
    if isinstance(values, dict):
        return values
    problems.append(f"{path.name}: holds no keys")
    return {}


def write_summary(run: Path, status: str, scalars: Mapping[str, float]) -> None:
    """Write `status` (finished, stopped or failed) and the last value of every scalar; null for what is not finite."""
    write_values(run / SUMMARY, {"status": status, **dict(sorted(scalars.items()))})


def write_values(path: Path, values: Mapping[str, Any]) -> None:
    """Write plain values as JSON; null for a number that is not finite."""
    plain = {k: None if isinstance(x, float) and not math.isfinite(x) else x for k, x in values.items()}
    with durable.replacing(path) as staged:
        staged.write_text(json.dumps(plain, indent=1) + "\n")


def metrics_until(run: Path, step: int) -> list[dict[str, str]]:
    """The rows of metrics.csv up to and including an optimizer step."""
    return rows_until(run / METRICS, step)


def rows_until(path: Path, step: float, tell: Callable[[str], None] | None = None) -> list[dict[str, str]]:
    """The rows of a table up to and including a step, without their empty cells; none where it is not there.

    Args:
        path: the table.
        step: the last step; infinity for all rows.
        tell: called with a note on lines that cannot be read. Pass it before the table is replaced by its rows: the
            damaged file is then copied to `<name>.damaged`.
    """
    from longnet_kit.report.metrics_file import Metrics

    if not os.path.lexists(path):
        return []
    metrics = Metrics(durable.read(path, METRICS_SIZE))
    rows = metrics.rows_until(step)
    if metrics.problems and tell is not None:
        aside = path.with_name(f"{path.name}.damaged")
        shutil.copy2(path, aside)
        tell(f"{path} is damaged and loses what cannot be read: {'; '.join(metrics.problems)}. A copy is {aside.name}")
    return rows


def _status(run: Path) -> str:
    return read_summary(run).get("status", "killed, or under way")


def _state(run: Path) -> str:
    """How far a run is, in words."""
    saved = checkpoints(run)
    return f"{_status(run)}, {f'step {step_of(saved[-1])}' if saved else 'no checkpoint'}"


def _number(path: Path) -> int:
    match = re.fullmatch(r"\w+?_0*(\d+)", path.stem)
    return int(match[1]) if match else -1
