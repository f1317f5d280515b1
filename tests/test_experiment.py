"""From a recipe to a run and back."""

from __future__ import annotations

import csv
import gzip
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from longnet_kit import data, experiment, recipe, runs

RECIPE = """
name: tiny
model: {dim: 16, layers: 2, heads: 2, ffn_dim: 32,
        attention: {backend: dilated, segment_lengths: [8, 32], dilation_rates: [1, 2]}}
data: {source: files, paths: [text.txt], tokenizer: bytes, seq_len: 32, batch_size: 4, eval_contexts: [8, 32]}
optimizer: {lr: 1.0e-2, betas: [0.9, 0.98], warmup_steps: 2}
trainer: {max_steps: 6, limit_val_batches: 2, limit_test_batches: 2, val_check_interval: 4, log_every_n_steps: 2,
          num_sanity_val_steps: 0, enable_progress_bar: true}
checkpoint: {every_n_steps: 2, keep: 2}
"""


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a recipe and a text."""
    monkeypatch.chdir(tmp_path)
    words = random.Random(0)
    text = "".join(f"def f{words.randrange(99)}(x):\n    return x + {words.randrange(9)}\n" for _ in range(1500))
    Path("text.txt").write_text(text)
    Path("tiny.yaml").write_text(RECIPE)
    return tmp_path


def load(*overrides: str) -> recipe.Recipe:
    return recipe.load("tiny.yaml", list(overrides))


def rows(run: Path) -> list[dict[str, Any]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [{tag: float(value) for tag, value in row.items() if value} for row in csv.DictReader(file)]


def curve(run: Path, tag: str) -> dict[int, float]:
    return {int(row["step"]): row[tag] for row in rows(run) if tag in row}


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(runs.checkpoint(run), map_location="cpu", weights_only=True)["state_dict"]


def test_a_run_leaves_what_the_readme_says(capsys: pytest.CaptureFixture[str]) -> None:
    run = experiment.run(load())
    assert run == Path("runs/tiny/version_0")
    names = {path.name.split(".")[0] for path in run.iterdir()}
    assert names == {"recipe", "events", "metrics", "checkpoints", "summary"}
    assert recipe.to_dict(recipe.load(run / "recipe.yaml")) == recipe.to_dict(load())
    saved = {"step_00000004.ckpt", "step_00000006.ckpt"}
    links = {"latest.ckpt", "best.ckpt"}
    assert {path.name for path in (run / "checkpoints").iterdir()} == {f"{x}.sha256" for x in saved} | saved | links
    summary = json.loads((run / "summary.json").read_text())
    tags = {"train/loss", "train/grad_norm", "train/lr", "train/tokens_per_second", "train/mfu", "val/loss"}
    tags |= {"val/perplexity", "val/bits_per_byte", "val/perplexity@8", "val/perplexity@32"}
    tags |= {"train/tokens", "train/flops", "train/seconds", "train/peak_memory"}
    assert set(summary) == tags | {"status"}
    assert summary["status"] == "finished"
    assert set(curve(run, "train/loss")) == {2, 4, 6}
    assert set(curve(run, "val/loss")) == {4, 6}  # the last step too, although 4 does not divide 6
    board = EventAccumulator(str(run)).Reload()
    assert tags <= set(board.Tags()["scalars"])
    for tag in tags:
        assert [event.step for event in board.Scalars(tag)] == sorted(curve(run, tag))
        assert summary[tag] == pytest.approx(board.Scalars(tag)[-1].value, rel=1e-6)
    figures = {"attention_pattern", "val/branch_weights", "val/loss_by_position", "val/perplexity_by_context"}
    assert set(board.Tags()["images"]) == figures
    printed = capsys.readouterr().out
    assert "finished  runs/tiny/version_0: 6 steps" in printed
    assert "test runs/tiny/version_0" in printed and "longnet board" in printed


def test_validate_repeats_the_runs_own_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    run = experiment.run(load())
    summary = runs.read_summary(run)
    for path in (run, run.parent, Path("tiny.yaml")):
        results = experiment.evaluate(path)
        assert {tag: results[tag] for tag in results if tag.startswith("val/")} == pytest.approx(
            {tag: value for tag, value in summary.items() if tag.startswith("val/")}, rel=1e-6
        )
    assert "val/bits_per_byte" in capsys.readouterr().out
    assert set(experiment.evaluate(run, which="test")) >= {"test/loss", "test/perplexity@8"}
    with pytest.raises(ValueError, match="no run here"):
        experiment.evaluate("tiny.yaml", ["name=other"])


def test_the_same_recipe_gives_the_same_run() -> None:
    first, second = experiment.run(load()), experiment.run(load())
    assert second.name == "version_1"
    assert curve(first, "train/loss") == curve(second, "train/loss")
    assert all(torch.equal(x, y) for x, y in zip(*(final_weights(r).values() for r in (first, second)), strict=True))
    other = experiment.run(load("seed=2"))
    assert curve(other, "train/loss") != curve(first, "train/loss")


def test_accumulation_gives_the_run_of_the_larger_batch() -> None:
    whole = experiment.run(load("data.batch_size=4"))
    split = experiment.run(load("data.batch_size=2", "trainer.accumulate_grad_batches=2"))
    assert curve(split, "train/loss") == pytest.approx(curve(whole, "train/loss"), rel=1e-5)
    assert curve(split, "train/grad_norm") == pytest.approx(curve(whole, "train/grad_norm"), rel=1e-4)


def test_resume_auto_goes_on_in_the_same_directory() -> None:
    whole = experiment.run(load("optimizer.schedule=constant"))
    part = experiment.run(load("optimizer.schedule=constant", "name=part", "trainer.max_steps=4"))
    again = experiment.run(load("optimizer.schedule=constant", "name=part", "resume=auto"))
    assert again == part
    for tag in ("train/loss", "val/loss", "train/grad_norm"):
        assert curve(again, tag) == pytest.approx(curve(whole, tag), rel=1e-6), tag
    assert all(torch.equal(x, final_weights(whole)[key]) for key, x in final_weights(again).items())
    board = EventAccumulator(str(again)).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [2, 4, 6]


def test_resume_auto_of_a_finished_run_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    run = experiment.run(load())
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    assert experiment.run(load("resume=auto")) == run
    assert "has finished its 6 steps" in capsys.readouterr().out
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before


def test_resume_auto_without_a_run_starts_one() -> None:
    assert experiment.run(load("resume=auto")) == Path("runs/tiny/version_0")


def test_a_warm_up_clipped_to_fewer_steps_does_not_bar_more(capsys: pytest.CaptureFixture[str]) -> None:
    run = experiment.run(load("optimizer.warmup_steps=5", "trainer.max_steps=3"))
    assert "warmup_steps 5 clipped to trainer.max_steps 3" in capsys.readouterr().out
    assert experiment.run(load("optimizer.warmup_steps=5", "resume=auto")) == run
    assert runs.read_summary(run)["status"] == "finished"


def test_resume_from_a_path_forks() -> None:
    first = experiment.run(load("trainer.max_steps=4"))
    fork = experiment.run(load(f"resume={first}", "name=fork"))
    assert fork == Path("runs/fork/version_0")
    assert set(curve(fork, "train/loss")) == {6}


def test_a_fork_needs_steps_to_do() -> None:
    first = experiment.run(load())
    for fewer in (6, 5):
        with pytest.raises(ValueError, match=rf"has done 6 steps, and trainer.max_steps is {fewer}; set it above 6"):
            experiment.run(load(f"resume={first}", "name=fork", f"trainer.max_steps={fewer}"))
    assert not Path("runs/fork").exists()


def test_a_resumed_run_remembers_what_it_measured_before(monkeypatch: pytest.MonkeyPatch) -> None:
    from longnet_kit.tasks import LanguageModeling

    def failing(*_: Any) -> torch.Tensor:
        raise RuntimeError("the power went")

    part = experiment.run(load("trainer.max_steps=4"))
    before = runs.read_summary(part)
    monkeypatch.setattr(LanguageModeling, "training_step", failing)
    with pytest.raises(RuntimeError, match="the power went"):
        experiment.run(load("resume=auto"))
    after = runs.read_summary(part)
    assert after.pop("status") == "failed" and before.pop("status") == "finished"
    assert after == pytest.approx(before, rel=1e-6)


def test_another_recipe_cannot_resume() -> None:
    experiment.run(load())
    with pytest.raises(ValueError, match=r"model\.dim: 16 there, 32 here.*only trainer\.max_steps"):
        experiment.run(load("resume=auto", "model.dim=32", "trainer.max_steps=8"))


def test_init_from_takes_the_weights_alone() -> None:
    first = experiment.run(load())
    task = experiment.build_task(load(f"init_from={first}"))
    for key, value in task.model.state_dict().items():
        assert torch.equal(value, final_weights(first)[f"model.{key}"])
    again = experiment.run(load(f"init_from={first}", "name=tuned"))
    assert set(curve(again, "train/loss")) == {2, 4, 6}
    with pytest.raises(ValueError, match=r"do not fit this model: embedding.weight is \(257, 16\) there"):
        experiment.build_task(load(f"init_from={first}", "model.dim=32"))
    with pytest.raises(ValueError, match="blocks.2.attention.norm.weight is only here"):
        experiment.build_task(load(f"init_from={first}", "model.layers=3"))


def test_a_run_outlives_the_one_that_it_came_from() -> None:
    first = experiment.run(load())
    tuned = experiment.run(load(f"init_from={first}", "name=tuned"))
    fork = experiment.run(load(f"resume={first}", "name=fork", "trainer.max_steps=8"))
    results = experiment.evaluate(tuned)
    shutil.move("runs/tiny", "elsewhere")
    assert experiment.evaluate(tuned) == results
    assert experiment.evaluate(fork)
    assert experiment.run(load("name=tuned", "resume=auto")) == tuned  # it is finished
    assert experiment.run(load("name=tuned", "resume=auto", "trainer.max_steps=8")) == tuned
    assert runs.checkpoint(tuned).name == "step_00000008.ckpt"


def test_a_run_that_goes_on_reads_no_weights_to_start_from() -> None:
    first = experiment.run(load())
    tuned = experiment.run(load(f"init_from={first}", "name=tuned"))
    for ckpt in runs.checkpoints(first):
        ckpt.unlink()
    assert experiment.run(load(f"init_from={first}", "name=tuned", "resume=auto", "trainer.max_steps=8")) == tuned


def test_float64_weights_are_loaded_without_rounding() -> None:
    double = ("trainer.precision=64-true", "optimizer.schedule=constant")
    whole = experiment.run(load(*double))
    part = experiment.run(load(*double, "name=part", "trainer.max_steps=4"))
    assert experiment.run(load(*double, "name=part", "resume=auto")) == part
    for key, weight in final_weights(whole).items():
        assert weight.dtype == torch.float64 and torch.equal(final_weights(part)[key], weight)
    summary = runs.read_summary(whole)
    for tag, value in experiment.evaluate(whole).items():
        assert value == pytest.approx(summary[tag], rel=1e-7), tag
    tuned = experiment.build_task(load(f"init_from={whole}", *double))
    assert torch.equal(tuned.model.state_dict()["embedding.weight"], final_weights(whole)["model.embedding.weight"])
    narrow = experiment.build_task(load(f"init_from={whole}"))
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.float32}


def test_a_file_that_is_no_checkpoint_is_refused_without_running_it() -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (exec, ("open('executed', 'w')",))

    torch.save({"state_dict": Payload()}, "bad.ckpt")
    with pytest.raises(ValueError, match=r"bad\.ckpt is not a checkpoint"):
        experiment.build_task(load("init_from=bad.ckpt"))
    assert not Path("executed").exists()


def test_a_run_that_fails_says_so_in_its_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    from longnet_kit.tasks import LanguageModeling

    step = LanguageModeling.training_step

    def failing(self: LanguageModeling, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == 3:
            raise RuntimeError("the power went")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LanguageModeling, "training_step", failing)
    with pytest.raises(RuntimeError, match="the power went"):
        experiment.run(load())
    assert runs.read_summary(Path("runs/tiny/version_0"))["status"] == "failed"


def test_a_run_that_stopped_early_does_not_hide_the_good_one(monkeypatch: pytest.MonkeyPatch) -> None:
    good = experiment.run(load())
    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(experiment, "build_data", _broken_after_the_first_batch)
        experiment.run(load())
    assert runs.read_summary(Path("runs/tiny/version_1"))["status"] == "failed"
    assert experiment.evaluate("runs/tiny") == experiment.evaluate(good)
    experiment.run(load("init_from=runs/tiny", "name=tuned"))


def _broken_after_the_first_batch(r: recipe.Recipe) -> Any:
    datamodule = data.build(r.data, seed=r.seed)
    loader = datamodule.train_dataloader

    def batches() -> Any:
        yield next(iter(loader()))
        raise RuntimeError("the power went")

    datamodule.train_dataloader = batches  # type: ignore[method-assign]
    return datamodule


def test_a_killed_run_that_starts_again_shows_no_point_of_the_first_time() -> None:
    """Without a checkpoint it starts from scratch in its directory."""
    first = experiment.run(load("trainer.max_steps=6", "checkpoint.every_n_steps=100"))
    shutil.rmtree(first / "checkpoints")  # as if it had been killed before the end
    (first / "summary.json").unlink()
    again = experiment.run(load("trainer.max_steps=2", "checkpoint.every_n_steps=100", "resume=auto"))
    assert again == first
    board = EventAccumulator(str(again)).Reload()
    for tag in ("train/loss", "val/loss", "vs_tokens/train/loss"):
        assert len(board.Scalars(tag)) == 1, tag
    assert set(curve(again, "train/loss")) == {2}


@pytest.mark.parametrize(("max_steps", "traced"), [(6, 3), (4, 2), (2, 0)])
def test_a_profile_of_some_steps_lands_in_the_run_directory(
    max_steps: int, traced: int, recwarn: pytest.WarningsRecorder
) -> None:
    run = experiment.run(load("trainer.profiler=pytorch", f"trainer.max_steps={max_steps}"))
    traces = list(run.glob("*trace*"))
    assert [trace.name for trace in traces] == ["trace.json.gz"] * bool(traced)
    if not traced:
        assert any("no trace: the run did 2 steps" in str(warning.message) for warning in recwarn)
    else:
        events = json.loads(gzip.decompress(traces[0].read_bytes()))["traceEvents"]
        names = [event.get("name", "") for event in events if event.get("cat") in ("cpu_op", "user_annotation")]
        assert names.count("longnet_kit::dilated_backward") == 2 * traced  # two layers
        assert sum(name.startswith("Optimizer.step") for name in names) == traced
    assert set(curve(run, "train/loss")) == set(range(2, max_steps + 1, 2))


@pytest.mark.parametrize("profiler", ["simple", "advanced"])
def test_lightnings_profilers_report_into_the_run_directory(profiler: str) -> None:
    run = experiment.run(load(f"trainer.profiler={profiler}"))
    (report,) = run.glob("*profile*.txt")
    assert "training_step" in report.read_text()


def test_a_users_error_before_the_first_step_leaves_no_run() -> None:
    good = experiment.run(load())
    with pytest.raises(ValueError, match="limit_val_batches"):
        experiment.run(load("trainer.limit_val_batches=0.0001"))
    assert runs.versions("tiny") == [good]
    with pytest.raises(ValueError, match="limit_val_batches"):
        experiment.run(load("trainer.limit_val_batches=0.0001", "name=other"))
    assert not Path("runs/other").exists()


def test_a_run_without_a_progress_bar_tells_its_end_alone(capsys: pytest.CaptureFixture[str]) -> None:
    run = experiment.run(load("trainer.enable_progress_bar=false"))
    printed = capsys.readouterr().out
    assert "step 6/6" not in printed and "finished  runs/tiny/version_0" in printed
    assert "val/loss" in experiment.evaluate(run)


@pytest.mark.parametrize("overrides", [["trainer.accelerator=cuda"], ["trainer.accelerator=cpu", "trainer.devices=-1"]])
def test_a_trainer_that_cannot_be_had_is_the_users_error(overrides: list[str]) -> None:
    if "cuda" in overrides[0] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match="trainer"):
        experiment.run(load(*overrides))


def test_show_counts_without_weights() -> None:
    text = experiment.show(recipe.load("paper/longnet_32k"))
    assert "dilation_rates" in text and "parameters       " in text and "FLOPs per token" in text
    assert "parameters       " in experiment.show(load())


def test_two_processes_train_as_one() -> None:
    """DDP through the command line: the same global batch, so the same curve."""
    run = experiment.run(load("data.batch_size=4"))
    command = [sys.executable, "-m", "longnet_kit.cli", "fit", "tiny.yaml", "name=two", "data.batch_size=2"]
    command += ["trainer.devices=2", "trainer.accelerator=cpu", "strategy.name=ddp"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    two = Path("runs/two/version_0")
    assert [path.name for path in two.parent.iterdir()] == ["version_0"]
    for tag in ("train/loss", "train/grad_norm", "val/loss", "val/perplexity@8"):
        assert curve(two, tag) == pytest.approx(curve(run, tag), rel=1e-4), tag
