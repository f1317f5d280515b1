"""A loss or gradient that is not finite is caught before the update, named, and leaves a checkpoint from before."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longnet_kit import callbacks, cli, experiment, recipe, runs
from longnet_kit.tasks import LanguageModeling

RECIPE = """
name: tiny
model: {dim: 16, layers: 2, heads: 2, ffn_dim: 32, dropout: 0.1,
        attention: {backend: dilated, segment_lengths: [8, 32], dilation_rates: [1, 2]}}
data: {source: files, paths: [text.txt], tokenizer: bytes, seq_len: 32, batch_size: 4}
optimizer: {lr: 1.0e-2, betas: [0.9, 0.98]}
trainer: {max_steps: 6, limit_val_batches: 1, num_sanity_val_steps: 0, enable_progress_bar: false, accelerator: cpu}
checkpoint: {every_n_steps: 100, keep: 10}
"""
WRONG = 4
"""The step in which a value is planted."""

Plant = Callable[[LanguageModeling], None]


def lay() -> None:
    words = random.Random(0)
    Path("text.txt").write_text("".join(f"f{words.randrange(99)} = {words.randrange(9)}\n" for _ in range(1500)))
    Path("tiny.yaml").write_text(RECIPE)


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lay()


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights before the step in which values are planted, of a run in which none are."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("undisturbed"))
        lay()
        run = experiment.run(recipe.load("tiny.yaml", ["checkpoint.every_n_steps=1"]))
        saved = runs.checkpoint_of(run / "checkpoints", WRONG - 1)
        return torch.load(saved.absolute(), weights_only=True)["state_dict"]


def is_now(task: LanguageModeling) -> bool:
    return task.training and task.trainer.global_step == WRONG - 1


def in_loss(value: float) -> Plant:
    """A constant added to the loss: its gradient stays finite."""

    def plant(task: LanguageModeling) -> None:
        step = task.training_step
        task.training_step = lambda *a: step(*a) + (value if is_now(task) else 0)  # type: ignore[method-assign]

    return plant


def in_gradient(value: float) -> Plant:
    def plant(task: LanguageModeling) -> None:
        weight = task.model.blocks[1].feed_forward.fc1.weight  # type: ignore[union-attr]
        weight.register_hook(lambda grad: grad + value if is_now(task) else grad)

    return plant


def in_input(value: float) -> Plant:
    """What the network makes of the tokens."""

    def plant(task: LanguageModeling) -> None:
        task.model.embedding.register_forward_hook(lambda _, __, out: out + value if is_now(task) else out)

    return plant


def in_layer(value: float) -> Plant:
    def plant(task: LanguageModeling) -> None:
        layer = task.model.blocks[1].attention  # type: ignore[union-attr]
        layer.register_forward_hook(lambda _, __, out: out * value if is_now(task) else out)

    return plant


PLANTS = {
    "nan in the loss": (in_loss(float("nan")), "the loss is nan, but every layer's output is finite ("),
    "inf in the loss": (in_loss(float("inf")), "the loss is infinite, but every layer's output is finite ("),
    "nan in a gradient": (in_gradient(float("nan")), "the gradient of model.blocks.1.feed_forward.fc1.weight is not"),
    "inf in a gradient": (in_gradient(float("inf")), "the gradient of model.blocks.1.feed_forward.fc1.weight is not"),
    "nan in the input": (in_input(float("nan")), "the output of model.embedding is nan"),
    "inf in a layer": (in_layer(float("inf")), "the output of model.blocks.1.attention is "),
}


def train(monkeypatch: pytest.MonkeyPatch, plant: Plant, *overrides: str) -> Path:
    build = experiment.build_task

    def planted(r: recipe.Recipe) -> Any:
        task = build(r)
        plant(task)
        return task

    with monkeypatch.context() as patched:
        patched.setattr(experiment, "build_task", planted)
        return experiment.run(recipe.load("tiny.yaml", list(overrides)))


@pytest.mark.parametrize("every", [1, WRONG, 100], ids=["logged", "logged now and then", "not logged"])
@pytest.mark.parametrize("case", PLANTS)
def test_it_is_caught_before_the_update_and_named(
    case: str, every: int, before: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, told = PLANTS[case]
    with pytest.raises(callbacks.NonFiniteError) as caught:
        train(monkeypatch, plant, f"trainer.log_every_n_steps={every}")
    message = str(caught.value)
    assert message.startswith(f"step {WRONG}: ") and told in message, message
    run = Path("runs/tiny/version_0")
    saved = torch.load(runs.checkpoint(run), weights_only=True)
    assert saved["global_step"] == WRONG - 1
    for name, weight in before.items():
        assert torch.equal(saved["state_dict"][name], weight), name
    samples = order(range((WRONG - 1) * 4, WRONG * 4))
    assert f"(samples {', '.join(map(str, sorted(samples)))})" in message
    assert str(runs.checkpoint(run)) in message
    assert runs.read_summary(run)["status"] == "failed"


def order(places: range) -> list[int]:
    """The windows at some places of the training order."""
    from longnet_kit.data.sampling import training_window

    r = recipe.load("tiny.yaml")
    datamodule = experiment.build_data(r)
    datamodule.prepare_data()
    datamodule.setup("fit")
    return [training_window(p, len(datamodule._windows("train")), r.seed) for p in places]  # type: ignore[attr-defined]


def test_the_run_goes_on_as_if_nothing_had_been(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the cause is gone: dropout's masks and the order of the samples are where they were."""
    overrides = ["trainer.accumulate_grad_batches=2", "data.batch_size=2"]
    with pytest.raises(callbacks.NonFiniteError):
        train(monkeypatch, in_loss(float("nan")), *overrides)
    run = experiment.run(recipe.load("tiny.yaml", ["resume=auto", *overrides]))
    whole = experiment.run(recipe.load("tiny.yaml", ["name=whole", *overrides]))
    ours, theirs = (torch.load(runs.checkpoint(x), weights_only=True) for x in (run, whole))
    assert all(torch.equal(ours["state_dict"][name], x) for name, x in theirs["state_dict"].items())
    rows = [[row.get("train/tokens") for row in runs.metrics_until(x, 10)] for x in (run, whole)]
    assert rows[0] == rows[1]


def test_a_stated_number_of_updates_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match=r"step 4: the loss is nan.*left out, 1 of at most 1"):
        run = train(monkeypatch, in_loss(float("nan")), "optimizer.max_skipped_steps=1", "checkpoint.every_n_steps=1")
    weights = [torch.load(path, weights_only=True)["state_dict"] for path in runs.checkpoints(run)]
    changed = [any(not torch.equal(new[k], old[k]) for k in new) for old, new in pairwise(weights)]
    assert changed == [True, True, False, True, True]
    assert all(bool(x.isfinite().all()) for x in weights[-1].values())


def test_the_layer_is_found_under_mixed_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(task: LanguageModeling) -> None:
        layer = task.model.blocks[1].feed_forward.fc1  # type: ignore[union-attr]
        layer.register_forward_hook(
            lambda _, __, out: out * float("inf") if is_now(task) and out.dtype == torch.bfloat16 else out
        )

    with pytest.raises(callbacks.NonFiniteError, match=r"the output of model\.blocks\.1\.feed_forward\.fc1 is"):
        train(monkeypatch, planted, "trainer.precision=bf16-mixed")


def test_a_resumed_run_remembers_how_many_were_left_out() -> None:
    guard = callbacks.NonFinite(callbacks.Generators(), allowed=3)
    guard.skipped = 2
    other = callbacks.NonFinite(callbacks.Generators(), allowed=3)
    other.load_state_dict(guard.state_dict())
    assert other.skipped == 2


def test_one_more_than_that_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def always(task: LanguageModeling) -> None:
        step = task.training_step
        task.training_step = lambda *a: step(*a) * float("nan")  # type: ignore[method-assign]

    with pytest.warns(UserWarning, match="left out, 2 of at most 2"), pytest.raises(callbacks.NonFiniteError) as caught:
        train(monkeypatch, always, "optimizer.max_skipped_steps=2")
    assert str(caught.value).startswith("step 3: ") and "and 2 were left out before" in str(caught.value)


def test_gradients_whose_norm_overflows_are_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    def large(task: LanguageModeling) -> None:
        for parameter in task.parameters():
            parameter.register_hook(lambda grad: torch.full_like(grad, 1e30))

    run = train(monkeypatch, large, "trainer.gradient_clip_val=1.0")
    assert runs.read_summary(run)["status"] == "finished"


def test_an_input_that_is_not_finite_is_told_of() -> None:
    class Task(torch.nn.Module):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return batch["x"].sum()

    trainer: Any = SimpleNamespace(precision_plugin=SimpleNamespace(train_step_context=nullcontext))
    generators = callbacks.Generators()
    guard = callbacks.NonFinite(generators)
    batch = {"x": torch.tensor([1.0, float("nan")]), "index": torch.tensor([7])}
    for callback in (generators, guard):
        callback.on_train_batch_start(None, None, batch, 0)  # type: ignore[arg-type]
    guard.on_before_backward(None, None, torch.tensor(float("nan")))  # type: ignore[arg-type]
    finding = guard._look(trainer, Task())  # type: ignore[arg-type]
    assert (finding.place, finding.samples) == ("the input is not finite", [7])


def test_the_command_tells_it_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = LanguageModeling.training_step
    monkeypatch.setattr(LanguageModeling, "training_step", lambda *a: step(*a) * float("nan"))
    assert cli.main(["fit", "tiny.yaml"]) == cli.FAULT
    told = capsys.readouterr().err
    assert told.strip().splitlines()[-1].startswith("longnet: step 1: ") and "Traceback" not in told
