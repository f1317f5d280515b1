"""The task: the mean over the sequences of an optimizer step, what is measured, the command line, shipped recipes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from longnet_kit import cli, data, experiment, plan, recipe, runs, shipped, tasks
from longnet_kit.data import labelled_batches
from longnet_kit.model import Transformer
from longnet_kit.model.classifier import Classifier
from longnet_kit.recipe import RecipeError
from longnet_kit.tasks import Classification
from tests.parallel import desk
from tests.plan import measured
from tests.tasks.tiny import logged, options, trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:Checkpoint directory")

VOCAB, SEQ_LEN, BATCH, CLASSES = 11, 16, 2, 4
BRANCHES = {"backend": "dilated", "segment_lengths": [4, 16], "dilation_rates": [1, 2]}
RECIPES = [name for name in shipped.names() if recipe.load(name).task == "classification"]
TINY = """
name: tiny
task: classification
model: {dim: 16, layers: 1, heads: 2, ffn_dim: 24, causal: false,
        attention: {backend: dilated, segment_lengths: [8, 32], dilation_rates: [1, 2]}}
data: {source: listops, min_length: 5, max_length: 30, max_depth: 4, max_args: 4, train_examples: 40, val_examples: 9,
       test_examples: 7, tokenizer: bytes, seq_len: 32, batch_size: 4}
optimizer: {lr: 1.0e-2, schedule: constant}
trainer: {max_steps: 6, val_check_interval: 3, log_every_n_steps: 1, num_sanity_val_steps: 0, accelerator: cpu,
          enable_progress_bar: false}
checkpoint: {every_n_steps: 3}
"""


def network(**changes: Any) -> Classifier:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"dim": 16, "layers": 1, "heads": 2, "ffn_dim": 24, "seq_len": SEQ_LEN, "causal": False}
    return Classifier(VOCAB, classes=CLASSES, **(settings | {"attention": BRANCHES} | changes))


def task(max_steps: int = 3, optimizer: Any = None, **changes: Any) -> Classification:
    return Classification(network(**changes), optimizer or options(), max_steps=max_steps)


class Sequences(Dataset):
    """Random sequences of 1 to 16 tokens, of which class 3 has none; those of `unlabelled` have no label."""

    def __init__(self, count: int, first: int = 0, unlabelled: tuple[int, ...] = ()) -> None:
        self.count, self.first, self.unlabelled = count, first, unlabelled

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(self.first + index)
        length = int(torch.randint(1, SEQ_LEN + 1, (), generator=g))
        label = torch.randint(3, (), generator=g) if index not in self.unlabelled else torch.tensor(-100)
        return {"tokens": torch.randint(VOCAB, (length,), generator=g), "labels": label, "index": torch.tensor(index)}

    def loader(self) -> DataLoader:
        return DataLoader(self, BATCH, collate_fn=lambda samples: labelled_batches.padded(samples, fill=0))


class Data(LightningDataModule):
    """So many training sequences; seven to validate or test on, one of them without a label."""

    def __init__(self, train: int = 40) -> None:
        super().__init__()
        self.train = train

    def train_dataloader(self) -> DataLoader:
        return Sequences(self.train).loader()

    def val_dataloader(self) -> DataLoader:
        return Sequences(7, 1000, unlabelled=(4,)).loader()

    def test_dataloader(self) -> DataLoader:
        return Sequences(7, 2000, unlabelled=(0,)).loader()


def each(model: Classifier, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Logits and labels, a sequence at a time and without any padding."""
    samples = [sequences[i] for i in range(len(sequences)) if i not in sequences.unlabelled]
    logits = torch.cat([model(sample["tokens"][None]) for sample in samples])
    return logits, torch.stack([sample["labels"] for sample in samples])


def part(sequences: Sequences, start: int, stop: int) -> Sequences:
    return Sequences(min(stop, sequences.count) - start, sequences.first + start)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_is_gradient_descent_on_the_mean_over_all_sequences(tmp_path: Path, accumulate: int) -> None:
    """However long each is, and however few the last batches of an epoch hold: 13 sequences, of 6 and 7, or 2 and 1."""
    sequences = Sequences(13)
    ours = task(-1 if accumulate == 1 else 3)
    steps = 7 if accumulate == 1 else 3
    run = trainer(tmp_path, max_epochs=1, max_steps=-1, accumulate_grad_batches=accumulate, precision="64-true")
    run.fit(ours, sequences.loader())
    model = network().double()
    losses, accuracies = [], []
    for step in range(steps):
        logits, labels = each(model, part(sequences, step * BATCH * accumulate, (step + 1) * BATCH * accumulate))
        loss = F.cross_entropy(logits, labels)
        losses.append(loss.item())
        accuracies.append((logits.argmax(1) == labels).double().mean().item())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.sub_(0.1 * g)
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours.model.get_parameter(name), p, rtol=0, atol=1e-12)
    found = logged(tmp_path)
    assert list(found["train/loss"].values()) == pytest.approx(losses, rel=1e-6)
    assert list(found["train/accuracy"].values()) == pytest.approx(accuracies, rel=1e-6)
    assert {"train/loss", "train/accuracy", "train/grad_norm", "train/lr"} == set(found)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_evaluation_measures_what_it_says(stage: str) -> None:
    ours = task()
    run = trainer(precision="64-true")
    (found,) = (run.validate if stage == "val" else run.test)(ours, datamodule=Data(), verbose=False)
    sequences = Sequences(7, 1000, (4,)) if stage == "val" else Sequences(7, 2000, (0,))
    with torch.no_grad():
        logits, labels = each(ours.model, sequences)
    answers, counts = logits.argmax(1).tolist(), torch.bincount(labels, minlength=CLASSES).tolist()
    right = [answer == label for answer, label in zip(answers, labels.tolist(), strict=True)]
    of_class = [
        sum(ok for ok, label in zip(right, labels.tolist(), strict=True) if label == c) / counts[c]
        for c in range(CLASSES)
        if counts[c]
    ]
    assert len(labels) == 6 and counts[3] == 0
    assert found == pytest.approx(
        {
            f"{stage}/loss": F.cross_entropy(logits, labels).item(),
            f"{stage}/accuracy": sum(right) / 6,
            f"{stage}/macro_accuracy": sum(of_class) / len(of_class),
            f"{stage}/majority": max(counts) / 6,
        },
        rel=1e-6,
    )
    expected = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    for answer, label in zip(answers, labels.tolist(), strict=True):
        expected[label, answer] += 1
    assert ours.confusion is not None and torch.equal(ours.confusion, expected)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_every_precision_trains(tmp_path: Path, precision: str) -> None:
    ours = task(2, optimizer=options(name="adamw", lr=1e-3))
    trainer(tmp_path, max_steps=2, precision=precision, gradient_clip_val=1.0, val_check_interval=2).fit(
        ours, datamodule=Data()
    )
    with torch.no_grad():
        logits, labels = each(ours.model.double(), Sequences(7, 1000, (4,)))
    tolerance = 1e-5 if precision in ("32-true", "64-true") else 2e-2
    assert logged(tmp_path)["val/loss"][2] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=tolerance)


def test_a_checkpoint_holds_plain_data_only(tmp_path: Path) -> None:
    ours = task(2)
    run = trainer(tmp_path, max_steps=2)
    run.fit(ours, datamodule=Data())
    run.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["model"] == ours.model.config and ours.model.config["classes"] == CLASSES
    assert all(key.startswith("model.") for key in saved["state_dict"])


def test_evaluation_contexts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data.eval_contexts is \[4\], but the task classification reads whole"):
        Classification(network(), options(), max_steps=1, eval_contexts=[4])


def test_the_task_is_registered() -> None:
    assert tasks.registry.get("classification") is Classification
    assert Classification.takes == ("labels",)


# --- recipes and the command line


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a small recipe."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)
    return tmp_path


def curve(run: Path, tag: str) -> dict[int, float]:
    return logged(run)[tag]


@pytest.mark.usefixtures("folder")
def test_a_run_and_what_follows_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "tiny.yaml"]) == 0
    run = Path("runs/tiny/version_0")
    summary = runs.read_summary(run)
    measured = {f"val/{tag}" for tag in ("loss", "accuracy", "macro_accuracy", "majority")}
    assert measured | {"train/loss", "train/accuracy", "train/grad_norm", "train/lr", "train/tokens"} <= set(summary)
    assert not {"val/perplexity", "val/bits_per_byte"} & set(summary)
    assert set(curve(run, "val/accuracy")) == {3, 6} and (run / "checkpoints" / "best.ckpt").exists()
    assert experiment.evaluate(run) == pytest.approx({tag: summary[tag] for tag in measured}, rel=1e-6)
    assert set(experiment.evaluate(run, which="test")) == {tag.replace("val", "test") for tag in measured}
    images = EventAccumulator(str(run)).Reload().Tags()["images"]
    assert "val/confusion" in images
    assert "val/accuracy" in capsys.readouterr().out.split("finished")[-1]
    assert cli.main(["compare", "runs", "--metric", "val/accuracy"]) == 0
    assert cli.main(["export", str(run), "x.safetensors"]) == 0
    exported = load_file("x.safetensors")
    assert exported["head.weight"].shape == (10, 16) and exported["head.bias"].shape == (10,)
    again = experiment.build_task(recipe.load("tiny.yaml", ["init_from=x.safetensors"]))
    assert torch.equal(again.model.state_dict()["head.weight"], exported["head.weight"])  # type: ignore[union-attr]
    capsys.readouterr()
    for verb in (["generate", str(run), "--prompt", "m12]"], ["stream", "x.safetensors", "tiny.yaml"]):
        assert cli.main(verb) == 2
        told = capsys.readouterr().err
        assert "trained for the task classification, whose network predicts no next token" in told, told


@pytest.mark.usefixtures("folder")
def test_a_classifier_starts_from_a_language_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Its head stays as it was drawn, which is said; a classifier's weights are taken whole, or not at all."""
    r = recipe.load("tiny.yaml")
    torch.manual_seed(5)
    language = Transformer(257, seq_len=r.data.seq_len, **{**vars(r.model), "causal": True})
    torch.save({"state_dict": {f"model.{k}": x for k, x in language.state_dict().items()}}, "language.ckpt")
    torch.manual_seed(6)
    drawn = experiment.build_task(r).model.head.weight
    torch.manual_seed(6)
    started = experiment.build_task(recipe.load("tiny.yaml", ["init_from=language.ckpt"])).model
    assert "language.ckpt has no head.weight, head.bias: drawn anew, the rest is loaded" in capsys.readouterr().out
    assert torch.equal(started.head.weight, drawn)
    assert all(torch.equal(x, started.state_dict()[key]) for key, x in language.state_dict().items())
    half = {f"model.{k}": x for k, x in started.state_dict().items() if k != "head.bias"}
    torch.save({"state_dict": half}, "half.ckpt")
    with pytest.raises(ValueError, match="do not fit this model: head.bias is only here"):
        experiment.build_task(recipe.load("tiny.yaml", ["init_from=half.ckpt"]))


@pytest.mark.usefixtures("folder")
def test_the_number_of_classes_is_the_sources(capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = experiment.build_task(recipe.load("tiny.yaml")).model
    assert model.head.out_features == 10 and not model.causal
    assert cli.main(["show", "tiny.yaml"]) == 0
    parameters = sum(p.numel() for p in model.parameters())
    assert f"parameters       {parameters:,}" in capsys.readouterr().out
    assert cli.main(["plan", "tiny.yaml"]) == 0
    assert "does not run without data" not in (told := capsys.readouterr().out), told


@pytest.mark.usefixtures("folder")
@pytest.mark.filterwarnings("ignore:.*val_dataloader", "ignore:.*logging interval")
def test_the_planned_memory_is_the_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    class Whole(measured.Windows):
        """Sequences of full length, half of each padding."""

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            tokens = super().__getitem__(index)["tokens"]
            mask, label = torch.arange(len(tokens)) < len(tokens) // 2, torch.tensor(index % 10)
            return {"tokens": tokens, "key_padding_mask": mask, "labels": label, "index": torch.tensor(index)}

    monkeypatch.setattr(measured, "Windows", Whole)
    overrides = ["trainer.limit_val_batches=0", "model.dim=64", "model.layers=2"]
    r = recipe.load("tiny.yaml", overrides)
    del r.trainer["enable_progress_bar"]  # which the measurement sets itself
    found = measured.peak(r)
    assert plan.plan("tiny.yaml", overrides).peak == pytest.approx(found, rel=0.02)


@pytest.mark.usefixtures("folder")
def test_a_run_goes_on_with_the_same_examples() -> None:
    whole = experiment.run(recipe.load("tiny.yaml"))
    experiment.run(recipe.load("tiny.yaml", ["name=part", "trainer.max_steps=3"]))
    again = experiment.run(recipe.load("tiny.yaml", ["name=part", "resume=auto"]))
    for tag in ("train/loss", "train/grad_norm", "val/loss", "val/accuracy"):
        assert curve(again, tag) == pytest.approx(curve(whole, tag), rel=1e-6), tag


@pytest.mark.usefixtures("folder")
def test_accumulation_gives_the_run_of_the_larger_batch() -> None:
    whole = experiment.run(recipe.load("tiny.yaml"))
    divided = experiment.run(
        recipe.load(
            "tiny.yaml",
            ["data.batch_size=2", "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=6"],
        )
    )
    for tag in ("train/loss", "train/grad_norm", "train/accuracy"):
        assert curve(divided, tag) == pytest.approx(curve(whole, tag), rel=1e-4), tag


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["task=language_modeling"], "got 'language_modeling', which takes text"),
        (["data.source=python_stdlib"], "got 'classification', which takes labels, and data.source python_stdlib"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_source_of_something_else_is_one_problem(overrides: list[str], told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.load("tiny.yaml", [*overrides, "model.causal=true"])
    (problem,) = caught.value.problems
    assert problem.key == "task" and told in str(problem)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data.eval_contexts=[8]"], "data.eval_contexts is [8], but the task classification"),
        (["model.loss_chunk=8"], "loss_chunk is 8, but a classifier has one row of logits"),
        (["data.seq_len=16"], "data.seq_len: got 16, but examples have up to 30 tokens"),
        (["data.max_length=3"], "data.max_length"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_what_does_not_go_together_is_told(overrides: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "tiny.yaml", *overrides]) == 2
    assert told in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", ["ddp", "sequence_parallel"])
def test_two_processes_train_as_one(strategy: str, folder: Path) -> None:
    """With batches divided among them, or sequences; nine examples to validate on do not divide evenly."""
    desk.longnet(folder, "fit", "tiny.yaml", "name=alone", "trainer.precision=64-true")
    size = ["data.batch_size=2"] if strategy == "ddp" else ["strategy.sequence_parallel_size=2"]
    desk.longnet(
        folder, "fit", "tiny.yaml", "trainer.precision=64-true", "trainer.devices=2", f"strategy.name={strategy}", *size
    )
    alone, found = (json.loads((folder / f"runs/{n}/version_0/summary.json").read_text()) for n in ("alone", "tiny"))
    for tag in ("train/loss", "train/grad_norm", "train/accuracy", "val/loss", "val/accuracy", "val/majority"):
        assert found[tag] == pytest.approx(alone[tag], rel=1e-9), tag
        assert math.isfinite(found[tag])


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.usefixtures("folder")
def test_every_shipped_recipe_trains(name: str) -> None:
    """Shorter and narrower, on the data that it names."""
    shorter = ["trainer.max_steps=2", "data.batch_size=2", "trainer.limit_val_batches=1", "trainer.accelerator=cpu"]
    narrower = ["model.dim=32", "model.heads=2", "model.ffn_dim=32", "model.layers=1", "optimizer.warmup_steps=1"]
    more = ["trainer.precision=32-true", "data.num_workers=0", "trainer.val_check_interval=2", "trainer.devices=1"]
    r = recipe.load(name, [*shorter, *narrower, *more])
    assert not r.model.causal and not r.notes
    summary = runs.read_summary(experiment.run(r))
    assert summary["status"] == "finished"
    assert 0 < float(summary["val/loss"]) < 5


def test_the_shipped_controls_differ_in_the_attention_alone() -> None:
    assert {"tasks/listops_longnet", "tasks/listops_lra", "tasks/file_classes_longnet"} <= set(RECIPES)
    for kind in ("listops", "file_classes"):
        longnet, dense = recipe.load(f"tasks/{kind}_longnet"), recipe.load(f"tasks/{kind}_dense")
        assert (longnet.model.attention["backend"], dense.model.attention["backend"]) == ("dilated", "sdpa")
        dense.name, dense.description = longnet.name, longnet.description
        dense.model.attention = longnet.model.attention
        assert dense == longnet


def test_the_arenas_recipe_is_the_arenas() -> None:
    r = recipe.load("tasks/listops_lra")
    assert (r.model.dim, r.model.layers, r.model.heads, r.model.ffn_dim) == (512, 6, 8, 2048)
    assert (r.data.batch_size, r.trainer["max_steps"]) == (32, 5000)
    assert data.build_source(r.data).fingerprint() == data.build_source({"source": "listops"}).fingerprint()
