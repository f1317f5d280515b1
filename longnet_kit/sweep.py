"""A grid of runs, one process after another: what `longnet sweep` does.

Several recipes share one grid. Each cell is a run runs/<name>_sweep_<cell>, which `longnet fit` trains from a recipe of
its own, as it was when the sweep started: runs/<name>_sweep/<cell>.yaml, beside its log. The same command again goes on
where a sweep was left, however it ended.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from longnet_kit import recipe, resume, run_lock, runs, shipped, sweep_grid, sweep_view, terminal
from longnet_kit.errors import UserError
from longnet_kit.recipe import Recipe
from longnet_kit.sweep_child import Child, Signals, Tail, open_log
from longnet_kit.sweep_grid import Cell, Grid

ERROR_LINES = 5
"""How many of the last lines of a run that failed are shown."""
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"


@dataclass(frozen=True)
class Run:
    """A cell and the run that it is."""

    cell: Cell
    recipe: Recipe
    log: Path

    @property
    def frozen(self) -> Path:
        """The file of its recipe, which a change to the sweep's recipe does not reach."""
        return self.log.with_name(f"{self.cell.name}.yaml")

    @property
    def command(self) -> list[str]:
        """What trains it."""
        return [sys.executable, "-m", "longnet_kit.cli", "fit", str(self.frozen)]

    def place(self) -> resume.Place:
        """How far it is."""
        return resume.find(self.recipe)


@terminal.outliving()
def sweep(paths: str | Sequence[str], items: Sequence[str]) -> int:
    """Train every cell of the grid that the items span, and compare the runs.

    Args:
        paths: a recipe file, the name of a shipped recipe, or a folder, which stands for every recipe in it; or several
            of these, each of which is trained on the whole grid.
        items: `key.path=value` for all cells, `key.path=value,value` for an axis.

    Returns:
        The exit code: 0 if all runs are finished, else 1.

    Raises:
        UserError: the grid or a cell's recipe cannot be used; nothing was started then.
        Ended: one of `sweep_child.SIGNALS` was received. The run that was trained then has ended.
    """
    cells = _of_all(_recipes([paths] if isinstance(paths, str) else paths), sweep_grid.parse(items))
    with Signals() as signals, sweep_view.view(len(cells)) as view:
        outcomes = _Sweep(cells, signals, view).train()
    words = [f"{outcomes.count(FINISHED)} of {len(cells)} runs finished"]
    for kind in (STOPPED, FAILED):
        labels = [run.cell.label for run, outcome in zip(cells, outcomes, strict=True) if outcome == kind]
        words += [f"{len(labels)} {kind}: {'; '.join(labels)}"] if labels else []
    terminal.say(", ".join(words))
    versions = [found[-1] for run in cells if (found := runs.versions(run.recipe.name))]
    if directories := [str(directory) for directory in versions if (directory / runs.RECIPE).is_file()]:
        from longnet_kit.report.compare import compare

        terminal.say(f"\n{compare(directories)}")
    return 0 if outcomes.count(FINISHED) == len(cells) else 1


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
        why = "not started"
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
                recipe.save(run.recipe, run.frozen)
                log.write(f"$ {' '.join(run.command[1:])}\n".encode())
                log.flush()
                tail, child = Tail(run.log), Child(run.command, log)
            why = "it cannot be told how it ended"
            code, seconds = self._watch(run, child, tail)
            if code == 0 and (outcome := self._ended_well(run, seconds)):
                return outcome
            why = f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"
            lines = tail.last_lines(ERROR_LINES)
        except (UserError, OSError) as error:
            lines = [str(error)]
        self._say("\n    ".join([f"failed ({why}); its log is {run.log}", *lines]))
        return FAILED

    def _free(self, run: Run) -> BinaryIO:
        """The run's log, as soon as nobody else trains the run."""
        tail, is_told = Tail(run.log), False
        while True:
            log = open_log(run.log)
            words = ""
            if log is not None or not is_told:  # reading where the run is takes its time
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
        """What became of a run that ended without an error; empty where it did not say itself."""
        place = run.place()
        if place.is_finished:
            self._seconds.append(seconds)
            return self._finished(run, f"finished in {seconds:.0f} s")
        if place.directory is None or runs.read_summary(place.directory).get("status") != STOPPED:
            return ""
        self._say(f"stopped before its last step, after {seconds:.0f} s; the same command goes on with it")
        return STOPPED

    def _finished(self, run: Run, words: str) -> str:
        directory = run.place().directory
        loss = runs.read_summary(directory).get("val/loss") if directory is not None else None
        self._say(f"{words}, val/loss {loss:.3f}" if isinstance(loss, (int, float)) else words)
        return FINISHED

    def _say(self, words: str) -> None:
        self._view.say(f"{self._head}: {words}")


def _recipes(paths: Sequence[str]) -> list[str]:
    """Every recipe that is meant, in the order given, those of a folder by their names."""
    found: list[str] = []
    for path in paths:
        if not Path(path).is_dir():
            found.append(path)
            continue
        files = sorted(str(file) for file in Path(path).glob(f"*{shipped.SUFFIX}"))
        if not files:
            raise UserError(f"{path} is a folder without recipes (*{shipped.SUFFIX})")
        found += files
    return found


def _of_all(paths: Sequence[str], grid: Grid) -> list[Run]:
    """The runs of every recipe, one recipe after the other; a UserError tells of all recipes that cannot be swept."""
    if len(paths) == 1:
        return _runs(paths[0], grid)
    if grid.name is not None:
        raise UserError(
            f"name: got {grid.name!r} for {len(paths)} recipes; each has a name of its own, so leave it out"
        )
    found: dict[str, list[Run]] = {}
    problems: list[str] = []
    for path in paths:
        try:
            own = _runs(path, grid)
        except UserError as error:
            problems.append(str(error))
            continue
        if twice := [path for path, others in found.items() if others[0].log == own[0].log]:
            problems.append(f"{twice[0]} and {path} have the same name, so their runs would be the same; rename one")
        found[path] = [replace(run, cell=replace(run.cell, label=_label(path, run.cell))) for run in own]
    if problems:
        raise UserError("\n  ".join(problems if len(problems) == 1 else [f"{len(problems)} problems", *problems]))
    return [run for own in found.values() for run in own]


def _label(path: str, cell: Cell) -> str:
    """What a cell of one recipe of several is called."""
    name = Path(path).stem
    return name if cell.label == sweep_grid.ONLY else f"{name} {cell.label}"


def _runs(path: str, grid: Grid) -> list[Run]:
    """The run of every cell; a UserError tells of all cells that cannot be one."""
    named = [] if grid.name is None else [f"name={json.dumps(grid.name)}"]
    recipes: list[Recipe] = []
    wrong: dict[str, list[str]] = {}
    for cell in grid.cells():
        try:
            recipes.append(recipe.load(path, [*cell.items, *named, "resume=auto"]))
        except UserError as error:
            wrong.setdefault(str(error), []).append(cell.label)
    _complain(wrong, len(recipes))
    base = f"{recipes[0].name}_sweep"
    room = sweep_grid.NAME_LENGTH - len(base) - 1
    if room <= sweep_grid.HASH_LENGTH:
        longest = sweep_grid.NAME_LENGTH - len("_sweep_") - sweep_grid.HASH_LENGTH - 1
        raise UserError(f"name: {base!r} leaves no room for the cells; give the sweep a name of at most {longest}")
    found = []
    for cell, r in zip(grid.cells(room), recipes, strict=True):
        name = f"{base}_{cell.name}"
        found.append(Run(cell, replace(r, name=name), runs.ROOT / base / f"{cell.name}.log"))
        try:
            found[-1].place()
        except UserError as error:
            wrong[f"{error}; or name the sweep otherwise, name=..."] = [cell.label]
    _complain(wrong, len(found) - len(wrong))
    return found


def _complain(wrong: dict[str, list[str]], right: int) -> None:
    """Raise for the cells that cannot be run, by what is wrong with them."""
    if not wrong:
        return
    lines = [f"{'; '.join(labels)}: {message}" for message, labels in wrong.items()]
    if not right and len(wrong) == 1:  # the cells have nothing to do with it
        raise UserError(next(iter(wrong)))
    bad = sum(len(labels) for labels in wrong.values())
    raise UserError("\n  ".join([f"{bad} of {bad + right} runs cannot be, so none was started", *lines]))


def _clear_away(run: Run) -> None:
    """Remove a version that was killed before it had a recipe.

    Raises:
        UserError: one without a recipe holds something.
    """
    for directory in runs.versions(run.recipe.name):
        if (directory / runs.RECIPE).exists() or run_lock.holder(directory):
            continue
        if held := {path.name for path in directory.iterdir()} - {run_lock.LOCK, f".{runs.RECIPE}"}:
            raise UserError(
                f"{directory} has no {runs.RECIPE}, but {', '.join(sorted(held))}; put its recipe back, or move it away"
            )
        shutil.rmtree(directory)
