"""A run that is killed and resumed, several times, ends as the run that nothing disturbed."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from longnet_kit import callbacks, experiment, recipe, runs

RECIPE = """
name: whole
model: {dim: 16, layers: 1, heads: 2, ffn_dim: 32, dropout: 0.1, attention: {backend: sdpa}}
data: {source: files, paths: [text.txt], tokenizer: bytes, seq_len: 32, batch_size: 2}
optimizer: {lr: 3.0e-1, warmup_steps: 1}
trainer: {max_steps: 8, limit_val_batches: 2, num_sanity_val_steps: 0, log_every_n_steps: 1, accelerator: cpu,
          enable_progress_bar: false}
checkpoint: {every_n_steps: 2, keep: 100}
"""
SAVE, MEASURE, END = "on_train_batch_end", "on_validation_batch_end", "on_validation_end"
TIMED = {"train/seconds", "train/tokens_per_second", "train/mfu", "train/peak_memory"}


class Moment(NamedTuple):
    """A moment in a run: before or after a hook of `Saving` at an optimizer step."""

    step: int
    hook: str
    is_after: bool


PLACES = [(SAVE, False), (SAVE, True), (MEASURE, True), (END, False), (END, True)]


class Killed(BaseException):
    """Ends a run in this process; what it does to the run directory is undone."""


MOMENTS = [
    *(Moment(step, SAVE, is_after) for step in (1, 2, 4) for is_after in (False, True)),  # 2, 4: saved
    *(Moment(step, *place) for step in (3, 6, 8) for place in PLACES),  # validated; 6, 8: saved before
    Moment(7, SAVE, True),
]
MOMENTS.sort(key=lambda moment: moment.step)  # now in the order of a run


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGNET_CACHE", str(tmp_path / "cache"))
    words = random.Random(0)
    Path("text.txt").write_text("".join(f"f{words.randrange(99)} = {words.randrange(9)}\n" for _ in range(900)))
    Path("tiny.yaml").write_text(RECIPE)


def load(accumulated: int, *overrides: str) -> recipe.Recipe:
    every = f"trainer.val_check_interval={3 * accumulated}"
    return recipe.load("tiny.yaml", [f"trainer.accumulate_grad_batches={accumulated}", every, *overrides])


def train(name: str, accumulated: int, killed_at: Moment | None = None) -> Path:
    """Train or resume a run until it is killed, or ends where the moment does not come (again)."""
    r = load(accumulated, f"name={name}", "resume=auto")
    run = runs.ROOT / name / "version_0"
    if killed_at is None:
        return experiment.run(r)
    act: Callable[..., None] = getattr(callbacks.Saving, killed_at.hook)

    def fatal(self: Any, trainer: Any, *rest: Any) -> None:
        is_now = trainer.global_step == killed_at.step and not self._generators.is_mid_step
        if is_now and not killed_at.is_after:
            raise_killed()
        act(self, trainer, *rest)
        if is_now:
            raise_killed()

    def raise_killed() -> None:
        shutil.copytree(run, "as_killed", symlinks=True)
        raise Killed

    with pytest.MonkeyPatch.context() as patched, suppress(Killed):
        patched.setattr(callbacks.Saving, killed_at.hook, fatal)
        return experiment.run(r)
    shutil.rmtree(run)
    Path("as_killed").rename(run)
    return run


def outcome(run: Path) -> dict[str, Any]:
    """Everything that a run leaves, apart from what depends on the clock."""
    rows = [{tag: x for tag, x in row.items() if tag not in TIMED} for row in runs.metrics_until(run, 99)]
    found: dict[str, Any] = {
        "rows": [row for row in rows if len(row) > 1],
        "best": (run / runs.CHECKPOINTS / runs.BEST).resolve(strict=True).name,
        "latest": (run / runs.CHECKPOINTS / runs.LATEST).resolve(strict=True).name,
    }
    for path in runs.checkpoints(run):
        checkpoint = torch.load(path, weights_only=True)
        for timed in ("seconds", "peak"):
            del checkpoint["callbacks"]["Consumption"][timed]
        found[path.name] = checkpoint
    return found


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Where two nested values differ, in a bit or in a type."""
    if type(one) is not type(other):
        return [f"{place}: {type(one).__name__} and {type(other).__name__}"]
    if isinstance(one, dict):
        if list(one) != list(other):
            return [f"{place}: {list(one)} and {list(other)}"]
        return [x for key in one for x in differences(one[key], other[key], f"{place}/{key}")]
    if isinstance(one, (list, tuple)) and len(one) == len(other):
        return [x for i, pair in enumerate(zip(one, other, strict=True)) for x in differences(*pair, f"{place}/{i}")]
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [f"{place}: {one} and {other}"]
    return [] if repr(one) == repr(other) else [f"{place}: {one!r} and {other!r}"]


def check(chains: list[list[Moment]], accumulated: int) -> None:
    """Kill and resume a run at each moment of a chain, let it end, and compare."""
    expected = outcome(train("whole", accumulated))
    assert [row["step"] for row in expected["rows"] if "val/loss" in row] == ["3", "6", "8"]
    wrong = []
    for number, chain in enumerate(chains):
        for moment in chain:
            train(f"killed_{number}", accumulated, moment)
        found = outcome(train(f"killed_{number}", accumulated))
        wrong += [f"{chain}: {words}" for words in differences(expected, found)]
        shutil.rmtree(runs.ROOT / f"killed_{number}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_chain_of_kills_leaves_the_same_rows_best_and_checkpoints(accumulated: int) -> None:
    check(
        [
            [Moment(2, SAVE, True), Moment(3, END, True), Moment(4, SAVE, False), Moment(6, SAVE, True)],
            [Moment(3, END, False), Moment(6, MEASURE, True), Moment(6, END, False), Moment(8, MEASURE, True)],
        ],
        accumulated,
    )


def test_a_fork_may_begin_with_a_validation_that_saves() -> None:
    """Its checkpoint holds the generators as they were loaded."""
    whole = outcome(train("whole", 1))
    killed = train("killed", 1, Moment(6, SAVE, True))
    fork = outcome(experiment.run(load(1, "name=fork", f"resume={runs.checkpoint(killed)}")))
    assert fork["step_00000006.ckpt"]["callbacks"]["Saving"]["validated"].keys() == {3, 6}
    for step in ("step_00000006.ckpt", "step_00000008.ckpt"):
        whole[step]["callbacks"]["Saving"] = fork[step]["callbacks"]["Saving"]
        assert not differences(whole[step], fork[step])
    assert [row for row in fork["rows"] if "val/loss" in row] == [
        row for row in whole["rows"] if "val/loss" in row and int(row["step"]) >= 6
    ]


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("accumulated", [1, 3])
def test_chains_of_kills_at_drawn_moments_leave_the_same_rows_best_and_checkpoints(accumulated: int) -> None:
    drawn = random.Random(accumulated)
    check([sorted(drawn.choices(MOMENTS, k=3), key=MOMENTS.index) for _ in range(40)], accumulated)
