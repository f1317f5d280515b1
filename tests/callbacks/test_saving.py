"""Which steps are saved, which checkpoints stay, and what happens where a save fails."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longnet_kit import callbacks, checkpoint_io, cli, durable, experiment, recipe, runs
from longnet_kit.tasks import LanguageModeling

RECIPE = """
name: tiny
model: {dim: 16, layers: 1, heads: 2, ffn_dim: 32, attention: {backend: sdpa}}
data: {source: files, paths: [text.txt], tokenizer: bytes, seq_len: 32, batch_size: 2}
optimizer: {lr: 1.0e-2}
trainer: {max_steps: 12, limit_val_batches: 1, val_check_interval: 4, num_sanity_val_steps: 0, log_every_n_steps: 1,
          enable_progress_bar: false, accelerator: cpu}
checkpoint: {every_n_steps: 3, keep: 2}
"""


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = random.Random(0)
    Path("text.txt").write_text("".join(f"f{words.randrange(99)} = {words.randrange(9)}\n" for _ in range(900)))
    Path("tiny.yaml").write_text(RECIPE)


def load(*overrides: str) -> recipe.Recipe:
    return recipe.load("tiny.yaml", list(overrides))


def steps(run: Path) -> list[int]:
    """The steps of the checkpoints; each must be sound and hold the step that its name says."""
    for path in runs.checkpoints(run):
        assert checkpoint_io.damage(path) == ""
        assert torch.load(path, weights_only=True)["global_step"] == runs.step_of(path)
    return [runs.step_of(path) for path in runs.checkpoints(run)]


def link(run: Path, name: str) -> int:
    target = (run / runs.CHECKPOINTS / name).resolve(strict=True)
    return runs.step_of(target)


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """Makes validations measure these losses, one after the other."""

    def measure(values: list[float]) -> None:
        finish, given = LanguageModeling._finish_evaluation, iter(values)

        def finished(self: LanguageModeling, stage: str) -> None:
            whole = self._metrics["whole"]
            whole.total.zero_()
            whole.total[0] = next(given)
            whole.count.zero_()
            whole.count[0] = 1
            finish(self, stage)

        monkeypatch.setattr(LanguageModeling, "_finish_evaluation", finished)

    return measure


@pytest.mark.parametrize(
    ("measured", "best", "kept"),
    [
        ([3.0, 2.0, 1.0], 12, [9, 12]),
        ([1.0, 2.0, 3.0], 4, [4, 9, 12]),
        ([2.0, 1.0, 1.0], 8, [8, 9, 12]),  # the first of equals
        ([float("nan"), 2.0, float("nan")], 8, [8, 9, 12]),
    ],
)
def test_the_newest_and_the_best_stay(
    measured: list[float], best: int, kept: list[int], losses: Callable[[list[float]], None]
) -> None:
    losses(measured)
    run = experiment.run(load())
    assert steps(run) == kept
    assert (link(run, runs.LATEST), link(run, runs.BEST)) == (12, best)
    names = {path.name for path in (run / runs.CHECKPOINTS).iterdir()}
    checksums = {f"{path.name}.sha256" for path in runs.checkpoints(run)}
    assert names == {path.name for path in runs.checkpoints(run)} | checksums | {runs.LATEST, runs.BEST}


def test_the_best_need_not_stay(losses: Callable[[list[float]], None]) -> None:
    losses([1.0, 2.0, 3.0])
    run = experiment.run(load("checkpoint.keep_best=false"))
    assert steps(run) == [9, 12]
    assert not (run / runs.CHECKPOINTS / runs.BEST).exists()


def test_a_resumed_run_remembers_the_best(losses: Callable[[list[float]], None]) -> None:
    losses([1.0, 2.0, 3.0, 4.0])
    experiment.run(load("trainer.max_steps=8"))
    run = experiment.run(load("resume=auto"))
    assert link(run, runs.BEST) == 4
    assert steps(run) == [4, 9, 12]


def test_the_links_can_be_given_for_checkpoints() -> None:
    run = experiment.run(load())
    latest = run / runs.CHECKPOINTS / runs.LATEST
    fork = experiment.run(load(f"resume={latest}", "name=fork", "trainer.max_steps=14"))
    assert steps(fork)[-1] == 14
    assert experiment.run(load(f"init_from={run / runs.CHECKPOINTS / runs.BEST}", "name=tuned"))


def fail(monkeypatch: pytest.MonkeyPatch, saves: set[int]) -> list[int]:
    """Let the n-th saves fail, counted from 1; returns the list of all that were tried."""
    write, tried = checkpoint_io._write, []

    def failing(checkpoint: dict[str, Any], target: Path) -> None:
        tried.append(runs.step_of(target))
        if len(tried) in saves:
            durable.staged(target).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(checkpoint, target)

    monkeypatch.setattr(checkpoint_io, "_write", failing)
    return tried


def test_a_failed_save_is_told_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = fail(monkeypatch, {3, 4, 6})  # the last step is tried again at the end
    with pytest.warns(
        UserWarning, match=r"step 9 could not be saved.*No space left.*newest checkpoint is step_00000006"
    ):
        run = experiment.run(load("checkpoint.keep_best=false", "trainer.max_steps=18", "checkpoint.keep=10"))
    assert tried == [3, 6, 9, 12, 15, 18, 18]
    assert steps(run) == [3, 6, 15, 18]
    assert runs.read_summary(run)["status"] == "finished"
    assert not list((run / runs.CHECKPOINTS).glob(".*"))


def test_three_failed_saves_in_a_row_stop_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        tried = fail(patched, set(range(2, 100)))
        with pytest.warns(UserWarning, match="could not be saved"):
            code = cli.main(["fit", "tiny.yaml", "checkpoint.keep_best=false", "trainer.max_steps=100"])
    assert code == cli.USER_ERROR
    told = capsys.readouterr().err
    assert tried == [3, 6, 9, 12]
    assert "step 12 could not be saved" in told and "No space left on device" in told and "resume=auto" in told
    run = Path("runs/tiny/version_0")
    assert steps(run) == [3] and link(run, runs.LATEST) == 3
    assert runs.read_summary(run)["status"] == "failed"
    again = experiment.run(load("checkpoint.keep_best=false", "resume=auto", "trainer.max_steps=12"))
    assert again == run and steps(run) == [9, 12]


def test_a_last_step_that_cannot_be_saved_is_no_finished_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        tried = fail(patched, set(range(4, 100)))
        with pytest.warns(UserWarning, match="step 9 could not be saved"):
            assert cli.main(["fit", "tiny.yaml", "trainer.max_steps=9"]) == cli.USER_ERROR
    told = capsys.readouterr().err
    assert tried[:3] == [3, 4, 6] and {*tried[3:]} == {8, 9}, tried
    assert "step 9, the last, could not be saved" in told and "two saves before" not in told
    run = Path("runs/tiny/version_0")
    assert runs.read_summary(run)["status"] == "failed" and steps(run) == [4, 6]
    assert experiment.run(load("trainer.max_steps=9", "resume=auto")) == run
    assert steps(run)[-1] == 9


def test_weights_that_an_update_has_spoilt_are_not_saved(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    update = torch.optim.AdamW.step
    for spoilt, told in ((6, "step 6: its update has made model."), (5, "is not finite since the update before")):

        def spoil(self: Any, closure: Any = None, spoilt: int = spoilt) -> Any:
            result = update(self, closure)
            if self.state and next(iter(self.state.values()))["step"] == spoilt:
                self.param_groups[0]["params"][0].data.view(-1)[0] = float("nan")
            return result

        with monkeypatch.context() as patched:
            patched.setattr(torch.optim.AdamW, "step", spoil)
            argv = ["fit", "tiny.yaml", f"name=s{spoilt}", "checkpoint.keep=1", "checkpoint.keep_best=false"]
            assert cli.main(argv) == cli.FAULT
        run = Path(f"runs/s{spoilt}/version_0")
        printed = capsys.readouterr().err
        assert told in printed and str(runs.checkpoint(run)) in printed
        assert steps(run) == [3]


def test_the_best_is_known_without_metrics_csv(losses: Callable[[list[float]], None]) -> None:
    losses([1.0, 2.0, 3.0, 4.0])
    run = experiment.run(load("trainer.max_steps=8"))
    (run / runs.METRICS).unlink()
    experiment.run(load("resume=auto"))
    assert link(run, runs.BEST) == 4 and 4 in steps(run)


def test_what_a_link_that_cannot_be_changed_points_to_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    point = checkpoint_io.point
    monkeypatch.setattr(checkpoint_io, "point", lambda link, to: runs.step_of(to) < 6 and point(link, to))
    run = experiment.run(load("checkpoint.keep=1", "checkpoint.keep_best=false"))
    assert steps(run) == [3, 12] and link(run, runs.LATEST) == 3


def test_time_that_is_up_ends_a_start_and_not_the_run() -> None:
    done = [0]
    for _ in range(2):
        run = experiment.run(load("resume=auto", "trainer.max_steps=100000", "trainer.max_time='00:00:00:02'"))
        done.append(steps(run)[-1])
        assert runs.read_summary(run)["status"] == "stopped"
    assert 0 < done[1] < done[2]


@pytest.mark.parametrize(
    ("given", "every"), [("val_check_interval=7", 4), ("max_steps=12", 2), ("val_check_interval=0.3", 4)]
)
def test_validations_come_at_whole_steps(given: str, every: int) -> None:
    """Where they fell into an accumulated one, a resumed run would have them twice."""
    run = experiment.run(load("trainer.accumulate_grad_batches=2", f"trainer.{given}"))
    rows = [int(row["step"]) for row in runs.metrics_until(run, 99) if "val/loss" in row]
    assert rows == sorted({*range(every, 13, every), 12})


@pytest.mark.parametrize("step", [1, 5])
def test_a_run_that_fails_saves_the_step_before(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    train = LanguageModeling.training_step

    def failing(self: LanguageModeling, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.trainer.global_step == step - 1:
            raise RuntimeError("the power went")
        return train(self, batch, batch_idx)

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="the power went"):
        patched.setattr(LanguageModeling, "training_step", failing)
        experiment.run(load())
    run = Path("runs/tiny/version_0")
    assert steps(run)[-1:] == ([step - 1] if step > 1 else [])


def test_a_run_that_fails_within_an_update_does_not_save_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some weights are new then and others are not."""
    update = torch.optim.AdamW.step

    def failing(self: Any, closure: Any = None) -> Any:
        result = update(self, closure)
        if self.state and next(iter(self.state.values()))["step"] == 5:
            raise RuntimeError("the power went")
        return result

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="the power went"):
        patched.setattr(torch.optim.AdamW, "step", failing)
        experiment.run(load())
    run = Path("runs/tiny/version_0")
    assert steps(run) == [3, 4]  # 4 was the best validation
    whole, again = experiment.run(load("name=whole")), experiment.run(load("resume=auto"))
    ours, theirs = (torch.load(runs.checkpoint(x), weights_only=True)["state_dict"] for x in (again, whole))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


@pytest.mark.parametrize("step", [5, 12])
def test_half_an_accumulated_step_is_not_saved(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in weights, which have no part of it, nor in any counter."""
    overrides = ("trainer.accumulate_grad_batches=3", "trainer.val_check_interval=12", "model.dropout=0.1")
    whole = experiment.run(load("name=whole", *overrides))
    train = LanguageModeling.training_step

    def failing(self: LanguageModeling, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == 3 * step - 1:
            raise RuntimeError("the power went")
        return train(self, batch, batch_idx)

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="the power went"):
        patched.setattr(LanguageModeling, "training_step", failing)
        experiment.run(load(*overrides))
    run = Path("runs/tiny/version_0")
    assert steps(run)[-1] == step - 1
    experiment.run(load("resume=auto", *overrides))
    ours, theirs = (torch.load(runs.checkpoint(x), weights_only=True) for x in (run, whole))
    assert all(torch.equal(ours["state_dict"][name], weight) for name, weight in theirs["state_dict"].items())
    assert ours["LanguageModelingData"] == theirs["LanguageModelingData"]
    rows = [[{k: v for k, v in row.items() if k in ("step", "train/loss", "val/loss", "train/tokens")}
             for row in runs.metrics_until(x, 99)] for x in (run, whole)]  # fmt: skip
    assert [x for x in rows[0] if len(x) > 1] == [x for x in rows[1] if len(x) > 1]


def test_every_generator_is_in_a_checkpoint_and_comes_back() -> None:
    import numpy as np

    first = callbacks.Generators()
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    trainer: Any = type("T", (), {"world_size": 1, "global_rank": 0, "strategy": None})()
    checkpoint: dict[str, Any] = {}
    first.on_save_checkpoint(trainer, None, checkpoint)  # type: ignore[arg-type]
    torch.save(checkpoint, "generators.ckpt")
    drawn = (random.random(), np.random.rand(), torch.rand(3).tolist())
    second = callbacks.Generators()
    second.on_load_checkpoint(trainer, None, torch.load("generators.ckpt", weights_only=True))  # type: ignore[arg-type]
    second.on_train_batch_start(trainer, None, None, 0)  # type: ignore[arg-type]
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == drawn
