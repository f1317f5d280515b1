"""Progress: lines for files, a bar for terminals."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
import rich.progress
from rich.console import Console

from longnet_kit.callbacks import Bar, FinalValidation, Lines, Throughput, progress, progress_bar
from tests.tasks.tiny import BATCH, Data, task, trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def test_the_terminal_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal, kind in ((True, Bar), (False, Lines)):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal, raising=False)
        assert type(progress_bar()) is kind


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lines_say_step_loss_speed_and_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], accumulate: int
) -> None:
    run = trainer(
        tmp_path,
        Throughput(),
        Lines(seconds=0),
        FinalValidation(),
        max_steps=5,
        log_every_n_steps=2,
        accumulate_grad_batches=accumulate,
        val_check_interval=4 * accumulate,
        enable_progress_bar=True,
    )
    run.fit(task(5), datamodule=Data())
    run.test(task(5), datamodule=Data(), verbose=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("step", "test"))]
    training = r"step {}/5  loss \d\.\d{{3}}  [\d,]+ tokens/s  0:00:0\d left"
    validation = r"step {}  validation: bits per byte [\d.]+  loss [\d.]+  perplexity [\d.]+"
    expected = [(training, 2), (training, 4), (validation, 4), (training, 5), (validation, 5)]
    assert len(lines) == 6, lines
    for line, (form, step) in zip(lines, expected, strict=False):
        assert re.fullmatch(form.format(step), line), line
    assert lines[-1].startswith("test: bits per byte")


@pytest.mark.parametrize("kind", [Lines, Bar])
def test_a_validation_outside_of_a_fit_names_no_step(kind: type, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(None, kind(), enable_progress_bar=True).validate(task(), datamodule=Data(), verbose=False)
    printed = capsys.readouterr().out
    assert "validation: bits per byte" in printed and "step" not in printed


def test_lines_keep_their_distance(capsys: pytest.CaptureFixture[str]) -> None:
    trainer(None, Lines(seconds=3600), max_steps=6, enable_progress_bar=True).fit(task(6), datamodule=Data())
    lines = [line for line in capsys.readouterr().out.splitlines() if " left" in line]
    assert [line.split()[1] for line in lines] == ["1/6", "6/6"]


def test_contexts_come_last_in_order_of_length() -> None:
    scalars = {f"val/perplexity@{n}": n for n in (1024, 256, 2048)} | {"val/loss": 2.5, "train/loss": 1, "val/x_y": 3}
    words = "loss 2.5  x y 3  perplexity@256 256  perplexity@1024 1024  perplexity@2048 2048"
    assert Lines.evaluation_words(scalars, "val") == words


def test_time_left_is_at_the_pace_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    class At:
        max_steps = 250
        global_step = 100

    bar, now = Lines(), [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar.on_train_start(At, None)  # type: ignore[arg-type]
    assert bar.time_left(At) == "-:--:--"  # type: ignore[arg-type]
    At.global_step, now[0] = 150, 1100.0
    assert bar.time_left(At) == "0:03:20"  # type: ignore[arg-type]


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in (Lines, Bar):
        silent = kind()
        silent.disable()
        silent.print("nothing")
        assert not capsys.readouterr().out


def test_the_bar_shows_steps_and_validations_and_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    screen = io.StringIO()
    real = rich.progress.Progress
    made: list[rich.progress.Progress] = []

    def on_a_terminal(*columns: object, **options: object) -> rich.progress.Progress:
        console = Console(file=screen, force_terminal=True, width=150)
        made.append(real(*columns, console=console, **options))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(progress, "Progress", on_a_terminal)
    run = trainer(
        tmp_path,
        Throughput(),
        Bar(),
        accumulate_grad_batches=2,
        val_check_interval=4,
        num_sanity_val_steps=1,
        enable_progress_bar=True,
    )
    run.fit(task(), datamodule=Data(BATCH))
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert re.search(r"train .* 4/4 loss \d\.\d{3}  [\d,]+ tokens/s  0:00:00 left", text)
    assert re.search(r"step 2  validation: bits per byte", text)
    assert "sanity" not in text and len(re.findall("validation:", text)) == 2
    assert len(made) == 1 and made[0].finished and not made[0].live.is_started
    assert [t.description for t in made[0].tasks] == ["train"], "bars of validations are gone"
    run.test(task(), datamodule=Data(BATCH), verbose=False)
    assert len(made) == 2 and not made[1].live.is_started


def test_an_error_gives_the_terminal_back(monkeypatch: pytest.MonkeyPatch) -> None:
    bar = Bar()
    ours = task()
    stopped = []
    monkeypatch.setattr(rich.progress.Progress, "stop", lambda self: stopped.append(self))
    ours.on_before_optimizer_step = lambda optimizer: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(ZeroDivisionError):
        trainer(None, bar, enable_progress_bar=True).fit(ours, datamodule=Data())
    assert stopped
