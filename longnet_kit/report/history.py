"""One run read back: its recipe, how it ended, its metrics, and in words whatever of it cannot be read.

Reading raises nothing: a run that is half written, killed or damaged gives what is left of it. The recipe is read as
plain YAML, so that a run whose plug-ins are gone is read too.
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from longnet_kit import durable, recipe_yaml, run_lock, runs
from longnet_kit.dotted import leaves
from longnet_kit.report.metrics_file import Metrics

RUNNING, KILLED = "running", "killed"
PATIENCE = 300.0
"""A run without a summary is running while it holds the lock on its directory, else killed. Where the lock does not
tell, since it is another machine's or was never had, it counts as running while something in its directory is younger
than this, in seconds."""


@dataclass
class History:
    """What a run directory holds."""

    path: Path
    status: str
    """finished, stopped or failed, as summary.json says; running or killed, see PATIENCE, where there is none."""
    idle: float | None
    """Seconds since something was written, where the run is running or killed."""
    recipe: dict[str, Any]
    """Values by dotted keys; lists are values."""
    summary: dict[str, float]
    metrics: Metrics
    steps: int | None
    """Optimizer steps done, as far as rows and checkpoints say."""
    problems: list[str]

    @property
    def is_usable(self) -> bool:
        """Whether there is anything to compare."""
        return bool(self.recipe or self.summary or self.metrics.last_step is not None)

    @property
    def tags(self) -> list[str]:
        """The tags that have a value."""
        logged = [tag for tag in self.metrics.tags if self.metrics.last(tag) is not None]
        return list(dict.fromkeys([*logged, *self.summary]))

    def final(self, tag: str) -> float | None:
        """The last value of a tag: the summary's, which is written when a run ends; else that of metrics.csv."""
        return self.summary[tag] if tag in self.summary else self.metrics.last(tag)

    def best(self, tag: str, largest: bool) -> float | None:
        """The least value of a tag, or the largest; NaN only where nothing else is."""
        values = np.append(self.metrics.series(tag).values, self.summary.get(tag, []))
        numbers = values[values == values]
        if not len(numbers):
            return float("nan") if len(values) else None
        return float(numbers.max() if largest else numbers.min())

    def notes(self) -> list[str]:
        """Everything to know before the numbers are believed: that the run goes on or was killed, and what is wrong."""
        found = [f"metrics.csv: {problem}" for problem in self.metrics.problems]
        if self.idle is not None:
            found.insert(0, f"{self.status}: last written {ago(self.idle)}")
        return [*found, *self.problems]


def read(path: Path, now: float | None = None) -> History:
    """Read a run directory.

    Args:
        now: seconds since the epoch; by default the present.
    """
    problems: list[str] = []
    recipe = _recipe(path, problems)
    summary = runs.read_summary(path, problems)
    status, idle = summary.pop("status", None), None
    if not isinstance(status, str) or not status:
        if summary:
            problems.append("summary.json: has no status")
        is_damaged = bool(summary) or os.path.lexists(path / runs.SUMMARY)
        idle = max(0.0, (time.time() if now is None else now) - _last_written(path))
        held = False if is_damaged else run_lock.is_held(path)  # a summary is written at the end
        status = RUNNING if held or (held is None and idle < PATIENCE) else KILLED
    metrics = _metrics(path, problems, "no metrics" if idle is None else "no metrics yet")
    scalars = {tag: number for tag, value in summary.items() if (number := _scalar(value)) is not None}
    done = [step for step in (metrics.last_step, _checkpoint_step(path)) if step is not None]
    return History(path, status, idle, recipe, scalars, metrics, max(done, default=None), problems)


def ago(seconds: float) -> str:
    """How long ago something was, in the largest unit that fits twice."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _recipe(path: Path, problems: list[str]) -> dict[str, Any]:
    content = _content(path / runs.RECIPE, problems)
    if content is None:
        return {}
    try:
        values = yaml.load(content, recipe_yaml.Loader)  # libyaml is faster, but deep nesting crashes it
        if isinstance(values, Mapping) and values:
            return dict(leaves(values))
        reason = "holds no keys"
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:  # or a tag that misfits
        where = recipe_yaml.place(runs.RECIPE, error) if isinstance(error, yaml.YAMLError) else ""
        reason = f"not YAML (line {where.partition(':')[2]})" if ":" in where else "not YAML"
    problems.append(f"{runs.RECIPE}: {reason}")
    return {}


def _metrics(path: Path, problems: list[str], none: str) -> Metrics:
    content = _content(path / runs.METRICS, problems, none)
    metrics = Metrics(content or b"")
    if content is not None and metrics.last_step is None:
        problems.append(f"{none}: {runs.METRICS} {'has no row' if content else 'is empty'}")
    return metrics


def _content(file: Path, problems: list[str], means: str = "") -> bytes | None:
    """The bytes of a file; None where there is none to read, which is noted with what it means."""
    try:
        return durable.read(file, runs.METRICS_SIZE if file.name == runs.METRICS else durable.SMALL)
    except FileNotFoundError:
        problems.append(f"{means}: there is no {file.name}" if means else f"no {file.name}")
    except OSError as error:
        problems.append(f"{file.name}: cannot be read ({error.strerror})")
    return None


def _scalar(value: Any) -> float | None:
    """A number of the summary, where null stands for what is not finite; None for anything else."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > sys.float_info.max:
        return None
    return float(value)


def _last_written(path: Path) -> float:
    """When anything in a directory was last written, in seconds since the epoch; 0 where nothing tells."""
    latest = 0.0
    for folder, _, files in os.walk(path):
        for name in (".", *files):
            try:
                latest = max(latest, os.stat(os.path.join(folder, name)).st_mtime)
            except OSError:  # gone meanwhile, or a link to nothing
                continue
    return latest


def _checkpoint_step(path: Path) -> int | None:
    steps = [re.match(r"step_(\d+)", checkpoint.name) for checkpoint in runs.checkpoints(path)]
    return max((int(match[1]) for match in steps if match), default=None)
