"""A grid of runs, one process after another: what `longnet sweep` does.

Each cell is a run runs/<name>_sweep_<cell>, which `longnet fit ... resume=auto` trains; its log is
runs/<name>_sweep/<cell>.log. The same command again goes on where a sweep was left, however it ended.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from longnet_kit import recipe, resume, run_lock, runs, sweep_grid, sweep_view
from longnet_kit.recipe import Recipe
from longnet_kit.sweep_child import Child, Signals, Tail, open_log
from longnet_kit.sweep_grid import Cell, Grid

ERROR_LINES = 5
"""How many of the last lines of a run that failed are shown."""
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"


@dataclasses.dataclass(frozen=True)
class Run:
    """A cell and the run that it is."""

    cell: Cell
    recipe: Recipe
    command: list[str]
    log: Path

    def place(self) -> resume.Place:
        """How far it is."""
        return resume.find(self.recipe)


def sweep(path: str, items: Sequence[str]) -> int:
    """Train every cell of the grid that the items span, and compare the runs.

    Args:
        path: a recipe file, or the name of a shipped recipe.
        items: `key.path=value` for all cells, `key.path=value,value` for an axis.

    Returns:
        The exit code: 0, or 1 when a run failed.

    Raises:
        ValueError: the grid or a cell's recipe cannot be used; nothing was started then.
        KeyboardInterrupt: SIGINT, SIGTERM or SIGHUP came. The run that went on then has ended.
    """
    cells = _runs(path, sweep_grid.parse(items))
    with Signals() as signals, sweep_view.view(len(cells)) as view:
        outcomes = _Sweep(cells, signals, view).train()
    failed = [run.cell.label for run, outcome in zip(cells, outcomes, strict=True) if outcome == FAILED]
    print(f"{outcomes.count(FINISHED)} of {len(cells)} runs finished", end="")
    print(f", {len(failed)} failed: {'; '.join(failed)}" if failed else "", flush=True)
    if directories := [place.directory for place in (run.place() for run in cells) if place.directory is not None]:
        from longnet_kit.report.compare import compare

        print(f"\n{compare([str(directory) for directory in directories])}")
    return 1 if failed else 0


class _Sweep:
    """The runs of a sweep, in turn."""

    def __init__(self, cells: Sequence[Run], signals: Signals, view: sweep_view.Lines) -> None:
        self._runs, self._signals, self._view = cells, signals, view
        self._to_do = [not run.place().is_finished for run in cells]
        self._seconds: list[float] = []
        """How long each of the runs took that this sweep trained to their ends."""

    def train(self) -> list[str]:
        """Train them all; what became of each."""
        outcomes: list[str] = []
        try:
            for number, run in enumerate(self._runs, start=1):
                self._number = number
                self._view.begin(number)
                self._head = f"[{number}/{len(self._runs)}] {run.cell.label}"
                outcomes.append(self._train(run))
        except KeyboardInterrupt:
            name = signal.Signals(self._signals.received[0]).name if self._signals.received else "interrupt"
            done = f"{outcomes.count(FINISHED)} of {len(self._runs)} runs finished"
            self._view.say(f"{name}: {done}; the same command goes on from here")
            raise
        return outcomes

    def _train(self, run: Run) -> str:
        """Train one of them, unless it is finished."""
        try:
            if run.place().is_finished:
                return self._finished(run, "finished before")
            with self._free(run) as log:
                place = run.place()
                if place.is_finished:
                    return self._finished(run, "finished meanwhile")
                step = None if place.ckpt is None else int(place.ckpt.stem.removeprefix("step_"))
                self._say("started" if step is None else f"goes on from step {step}")
                _clear_away(run)
                log.write(f"$ {' '.join(run.command[1:])}\n".encode())
                log.flush()
                tail, child = Tail(run.log), Child(run.command, log)
            code, seconds = self._watch(run, child, tail)
            if code == 0:
                return self._ended_well(run, seconds)
            why = f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"
            lines = tail.last_lines(ERROR_LINES)
        except ValueError as error:
            why, lines = "not started", [str(error)]
        self._say("\n    ".join([f"failed ({why}); its log is {run.log}", *lines]))
        return FAILED

    def _free(self, run: Run) -> BinaryIO:
        """The run's log, as soon as nobody else trains the run."""
        tail, is_told = Tail(run.log), False
        while True:
            log = open_log(run.log)
            directory = run.place().directory
            words = run_lock.holder(directory) if directory is not None else ""
            if log is not None and not words:
                return log
            if log is not None:
                log.close()
            if not is_told:
                self._say(f"another run trains it ({words or 'another process'}, log {run.log}); waiting for its end")
                is_told = True
            tail.read()
            self._view.update(run.cell.label, tail.latest or "waiting", None)
            self._signals.pause()

    def _watch(self, run: Run, child: Child, tail: Tail) -> tuple[int, float]:
        """Exit code and seconds of a child; whatever happens here, it has ended then."""
        began = time.monotonic()
        try:
            while (code := child.exit_code()) is None:
                self._signals.pause()
                tail.read()
                self._view.update(run.cell.label, tail.latest, self._left(time.monotonic() - began))
        finally:
            child.end(self._signals)
        return code, time.monotonic() - began

    def _left(self, elapsed: float) -> float | None:
        """Seconds that the sweep still needs if each run takes as long as those that this sweep has trained."""
        if not self._seconds:
            return None
        mean = sum(self._seconds) / len(self._seconds)
        return max(0.0, mean - elapsed) + mean * sum(self._to_do[self._number :])

    def _ended_well(self, run: Run, seconds: float) -> str:
        if run.place().is_finished:
            self._seconds.append(seconds)
            return self._finished(run, f"finished in {seconds:.0f} s")
        self._say(f"stopped before its last step, after {seconds:.0f} s; the same command goes on with it")
        return STOPPED

    def _finished(self, run: Run, words: str) -> str:
        directory = run.place().directory
        loss = runs.read_summary(directory).get("val/loss") if directory is not None else None
        self._say(words if loss is None else f"{words}, val/loss {loss:.3f}")
        return FINISHED

    def _say(self, words: str) -> None:
        self._view.say(f"{self._head}: {words}")


def _runs(path: str, grid: Grid) -> list[Run]:
    """The run of every cell; a ValueError tells of all cells that cannot be one."""
    named = [] if grid.name is None else [f"name={json.dumps(grid.name)}"]
    recipes: list[Recipe] = []
    wrong: dict[str, list[str]] = {}
    for cell in grid.cells():
        try:
            recipes.append(recipe.load(path, [*cell.items, *named, "resume=auto"]))
        except ValueError as error:
            wrong.setdefault(str(error), []).append(cell.label)
    _complain(wrong, len(recipes))
    base = f"{recipes[0].name}_sweep"
    room = sweep_grid.NAME_LENGTH - len(base) - 1
    if room <= sweep_grid.HASH_LENGTH:
        longest = sweep_grid.NAME_LENGTH - len("_sweep_") - sweep_grid.HASH_LENGTH - 1
        raise ValueError(f"name: {base!r} leaves no room for the cells; give the sweep a name of at most {longest}")
    found = []
    for cell, r in zip(grid.cells(room), recipes, strict=True):
        name = f"{base}_{cell.name}"
        command = [sys.executable, "-m", "longnet_kit.cli", "fit", path, *cell.items, f"name={name}", "resume=auto"]
        found.append(Run(cell, dataclasses.replace(r, name=name), command, runs.ROOT / base / f"{cell.name}.log"))
        try:
            found[-1].place()
        except ValueError as error:
            wrong[f"{error}; or name the sweep otherwise, name=..."] = [cell.label]
    _complain(wrong, len(found) - len(wrong))
    return found


def _complain(wrong: dict[str, list[str]], right: int) -> None:
    """Raise for the cells that cannot be run, by what is wrong with them."""
    if not wrong:
        return
    lines = [f"{'; '.join(labels)}: {message}" for message, labels in wrong.items()]
    if not right and len(wrong) == 1:  # the cells have nothing to do with it
        raise ValueError(next(iter(wrong)))
    bad = sum(len(labels) for labels in wrong.values())
    raise ValueError("\n  ".join([f"{bad} of {bad + right} runs cannot be, so none was started", *lines]))


def _clear_away(run: Run) -> None:
    """Remove a version that was killed before it had a recipe."""
    for directory in runs.versions(run.recipe.name):
        if not (directory / runs.RECIPE).exists() and not run_lock.holder(directory):
            shutil.rmtree(directory)
