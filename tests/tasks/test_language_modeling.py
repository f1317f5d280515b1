"""The task: the loss and gradient of an optimizer step, what is logged of it and where, evaluation, checkpoints."""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F
from torchmetrics.text import Perplexity

from longnet_kit import tasks
from longnet_kit.tasks import LanguageModeling, language_modeling
from tests.model.small import LoraEmbedding
from tests.tasks.tiny import BATCH, BYTES_PER_TOKEN, SEQ_LEN, Data, Windows, logged, network, options, task, trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:Checkpoint directory")


def plain_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean over all tokens that count, by torch's own cross entropy."""
    return F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())


def bare_loop(steps: int, batches_per_step: int, lr: float = 0.1) -> tuple[list[float], list[float], torch.nn.Module]:
    """SGD on the mean over all tokens of each optimizer step: losses, gradient norms, the network; in float64."""
    model = network().double()
    data = Windows(10_000)
    losses, norms = [], []
    size = BATCH * batches_per_step
    for step in range(steps):
        loss = plain_loss(model, data.batch(*range(step * size, (step + 1) * size)))
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        losses.append(loss.item())
        norms.append(math.sqrt(sum(g.square().sum().item() for g in gradients)))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.sub_(lr * g)
    return losses, norms, model


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("every", [1, 10])
def test_training_is_gradient_descent_on_the_mean_over_all_tokens(tmp_path: Path, accumulate: int, every: int) -> None:
    """However unevenly targets are ignored; and what is logged is what the bare loop saw, at the steps it saw it."""
    steps = 4 if every == 1 else 12
    losses, norms, expected = bare_loop(steps, accumulate)
    ours = task(steps)
    trainer(
        tmp_path, max_steps=steps, accumulate_grad_batches=accumulate, log_every_n_steps=every, precision="64-true"
    ).fit(ours, datamodule=Data())
    for name, p in expected.named_parameters():
        torch.testing.assert_close(ours.model.get_parameter(name), p, rtol=0, atol=1e-12)
    due = range(1, 5) if every == 1 else (10, 12)
    found = logged(tmp_path)
    assert found["train/loss"] == pytest.approx({step: losses[step - 1] for step in due}, rel=1e-6)
    assert found["train/grad_norm"] == pytest.approx({step: norms[step - 1] for step in due}, rel=1e-6)
    assert found["train/lr"] == pytest.approx(dict.fromkeys(due, 0.1))


def test_a_last_short_accumulation_is_weighed_by_its_tokens_too(tmp_path: Path) -> None:
    """Lightning steps on the last batch, and still divides it by the whole accumulation."""
    data = Windows(6 * BATCH)
    ours = task(2)
    loader = torch.utils.data.DataLoader(data, BATCH)
    trainer(tmp_path, max_epochs=1, max_steps=-1, accumulate_grad_batches=4, precision="64-true").fit(ours, loader)
    model = network().double()
    for indices in (range(4 * BATCH), range(4 * BATCH, 6 * BATCH)):
        gradients = torch.autograd.grad(plain_loss(model, data.batch(*indices)), list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.sub_(0.1 * g)
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours.model.get_parameter(name), p, rtol=0, atol=1e-12)


def test_the_gradient_norm_is_that_before_clipping(tmp_path: Path) -> None:
    _, norms, _ = bare_loop(1, 1)
    trainer(tmp_path, max_steps=1, gradient_clip_val=1e-3, precision="64-true").fit(task(1), datamodule=Data())
    assert logged(tmp_path)["train/grad_norm"][1] == pytest.approx(norms[0], rel=1e-6)


def test_the_learning_rate_logged_is_the_one_used(tmp_path: Path) -> None:
    ours = task(4, optimizer=options(warmup_steps=2, schedule="linear"))
    trainer(tmp_path, accumulate_grad_batches=2).fit(ours, datamodule=Data())
    assert logged(tmp_path)["train/lr"] == pytest.approx({1: 0.05, 2: 0.1, 3: 0.1, 4: 0.05})


class Steps(Callback):
    """Notes what ModelCheckpoint and EarlyStopping would monitor after each batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.seen.append((trainer.global_step, {k: float(v) for k, v in trainer.callback_metrics.items()}))


def test_callbacks_can_monitor_what_is_logged(tmp_path: Path) -> None:
    steps = Steps()
    trainer(tmp_path, steps, val_check_interval=2).fit(task(), datamodule=Data())
    found = logged(tmp_path)
    for step, metrics in steps.seen:
        assert metrics["train/loss"] == pytest.approx(found["train/loss"][step])
        assert "step" not in metrics, "ModelCheckpoint would name files after it"
    assert steps.seen[2][1]["val/loss"] == pytest.approx(found["val/loss"][2])


def test_what_was_logged_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    """So that a run that is killed keeps its curves."""
    on_disk: list[list[int]] = []

    class Read(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            on_disk.append(list(logged(tmp_path)["train/loss"]))

    trainer(tmp_path, Read(), max_steps=3).fit(task(3), datamodule=Data())
    assert on_disk == [[1], [1, 2], [1, 2, 3]]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_step_axis_counts_optimizer_steps(tmp_path: Path, accumulate: int) -> None:
    saving = ModelCheckpoint(tmp_path / "c", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    fit = trainer(
        tmp_path,
        saving,
        accumulate_grad_batches=accumulate,
        val_check_interval=2 * accumulate,
        enable_checkpointing=True,
    )
    fit.fit(task(), datamodule=Data())
    found = logged(tmp_path)
    assert list(found["train/loss"]) == [1, 2, 3, 4]
    assert list(found["val/loss"]) == [2, 4]
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"step=2.ckpt", "step=4.ckpt"}


def test_evaluation_measures_what_it_says(tmp_path: Path) -> None:
    """Against torch's cross entropy and torchmetrics' perplexity, over every token, the short last batch included."""
    ours = task(eval_contexts=[4, 7, SEQ_LEN])
    run = trainer(tmp_path, precision="64-true")
    for stage, first in (("val", 10_000), ("test", 20_000)):
        (found,) = (run.validate if stage == "val" else run.test)(ours, datamodule=Data(), verbose=False)
        samples = Windows(5, first).batch(*range(5))
        tokens, targets = samples["tokens"], samples["targets"]
        with torch.no_grad():
            logits = ours.model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
        expected = {
            f"{stage}/loss": loss,
            f"{stage}/perplexity": math.exp(loss),
            f"{stage}/bits_per_byte": loss / math.log(2) / BYTES_PER_TOKEN[stage],
        }
        for context in (4, 7, SEQ_LEN):
            perplexity = Perplexity(ignore_index=-100).set_dtype(torch.float64)
            for start in range(0, SEQ_LEN - context + 1, context):
                window = slice(start, start + context)
                with torch.no_grad():
                    perplexity.update(ours.model(tokens[:, window]), targets[:, window])
            expected[f"{stage}/perplexity@{context}"] = perplexity.compute().item()
        assert expected[f"{stage}/perplexity@{SEQ_LEN}"] == pytest.approx(expected[f"{stage}/perplexity"], rel=1e-5)
        assert found == pytest.approx(expected, rel=1e-5)
        sums = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(0)
        by_position = sums / (targets != -100).sum(0)
        torch.testing.assert_close(ours.loss_by_position, by_position, rtol=0, atol=1e-12, equal_nan=True)


def test_lora_on_the_embedding_reaches_the_loss() -> None:
    ours = task(dropout=0.0).double()
    ours.model.embedding = LoraEmbedding(ours.model.embedding).double()  # type: ignore[assignment]
    batch = {name: torch.randint(20, (2, SEQ_LEN)) for name in ("tokens", "targets")}
    losses, _ = ours._batch_losses(batch)
    torch.testing.assert_close(losses.mean(), plain_loss(ours.model, batch))


def test_the_whole_context_is_not_computed_twice() -> None:
    ours = task(eval_contexts=[4, SEQ_LEN])
    shapes: list[torch.Size] = []
    ours.model.embedding.register_forward_hook(lambda module, inputs, output: shapes.append(inputs[0].shape))
    trainer().validate(ours, datamodule=Data(BATCH), verbose=False)
    assert shapes == [(BATCH, SEQ_LEN), (BATCH * 4, 4)]


def test_a_context_that_no_sequence_holds_is_refused() -> None:
    with pytest.raises(ValueError, match="expected lengths of 1 to seq_len, 16"):
        task(eval_contexts=[4, 17])


@pytest.mark.filterwarnings("error:.*no logger configured")
def test_without_a_byte_count_there_are_no_bits_per_byte() -> None:
    loader = torch.utils.data.DataLoader(Windows(4), BATCH)
    (found,) = trainer().validate(task(), loader, verbose=False)
    assert set(found) == {"val/loss", "val/perplexity"}


def test_sanity_checks_are_not_logged(tmp_path: Path) -> None:
    trainer(tmp_path, num_sanity_val_steps=2, max_steps=1, limit_val_batches=2).fit(task(1), datamodule=Data())
    assert list(logged(tmp_path)["val/loss"]) == [1]


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
def test_every_precision_trains_and_measures_without_rounding_its_sums(tmp_path: Path, precision: str) -> None:
    """Were metrics cast with the module, bfloat16 sums would stop growing at 256."""
    ours = task(2, optimizer=options(name="adamw", lr=1e-3))
    run = trainer(tmp_path, max_steps=2, precision=precision, gradient_clip_val=1.0, val_check_interval=2)
    run.fit(ours, datamodule=Data(val=300))
    found = logged(tmp_path)
    samples = Windows(300, 10_000).batch(*range(300))
    with torch.no_grad():
        exact = plain_loss(ours.model.double(), samples).item()
    tolerance = 1e-5 if precision in ("32-true", "64-true") else 1e-3
    assert found["val/loss"][2] == pytest.approx(exact, rel=tolerance)
    assert found["train/loss"][1] == pytest.approx(bare_loop(1, 1)[0][0], rel=max(tolerance, 5e-3 * (tolerance > 1e-5)))


def test_a_checkpoint_holds_plain_data_only(tmp_path: Path) -> None:
    ours = task(2, eval_contexts=(4,), optimizer=options(name="adamw", betas=(0.8, 0.9)))
    run = trainer(tmp_path, max_steps=2)
    run.fit(ours, datamodule=Data())
    run.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["model"] == ours.model.config
    assert saved["hyper_parameters"]["optimizer"]["betas"] == [0.8, 0.9]
    assert all(key.startswith("model.") for key in saved["state_dict"])
    again = LanguageModeling.load_from_checkpoint(
        tmp_path / "x.ckpt", model=network(seed=5), optimizer=options(), weights_only=True
    )
    assert again.eval_contexts == [4]
    for ours_p, theirs in zip(ours.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours_p, theirs)


def test_a_resumed_run_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    optimizer = options(name="adamw", lr=0.01, warmup_steps=2, schedule="cosine")
    whole, half = tmp_path / "whole", tmp_path / "half"
    through = task(6, optimizer=optimizer)
    saving = ModelCheckpoint(tmp_path, filename="at_{step}", every_n_train_steps=3, save_top_k=-1)
    trainer(whole, saving, max_steps=6, precision="64-true", enable_checkpointing=True).fit(through, datamodule=Data())
    resumed = task(6, optimizer=optimizer, seed=9)

    class Rest(Data):
        """What a data module that restores its position gives."""

        def train_dataloader(self) -> torch.utils.data.DataLoader:
            return torch.utils.data.DataLoader(Windows(3 * BATCH, first=3 * BATCH), BATCH)

    trainer(half, max_steps=6, precision="64-true").fit(
        resumed, datamodule=Rest(), ckpt_path=tmp_path / "at_step=3.ckpt", weights_only=True
    )
    for ours, theirs in zip(resumed.parameters(), through.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    first, second = logged(whole)["train/lr"], logged(half)["train/lr"]
    assert second == pytest.approx({step: first[step] for step in (4, 5, 6)})


def test_ranks_that_ignore_different_targets_make_one_mean(tmp_path: Path) -> None:
    """Two processes, an accumulation of two; against one bare loop over the same tokens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, args=(port, tmp_path), nprocs=2)
    data = Windows(100)
    model = network().double()
    losses = []
    for step in range(2):
        loss = plain_loss(model, data.batch(*range(step * 8, (step + 1) * 8)))
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.sub_(0.1 * g)
    weights = torch.load(tmp_path / "weights.pt")
    for name, p in model.named_parameters():
        torch.testing.assert_close(weights[name], p.detach(), rtol=0, atol=1e-12)
    found = logged(tmp_path)
    assert found["train/loss"] == pytest.approx({1: losses[0], 2: losses[1]}, rel=1e-6)
    samples = Windows(8, 10_000).batch(*range(8))
    assert found["val/loss"][2] == pytest.approx(plain_loss(model, samples).item(), rel=1e-6)


class Sharded(Data):
    """Batches dealt to two ranks in turn, so that four in a row make one optimizer step."""

    def _loader(self, data: Windows) -> torch.utils.data.DataLoader:
        rank = torch.distributed.get_rank()
        indices = [i for i in range(len(data)) if i // BATCH % 2 == rank]
        return torch.utils.data.DataLoader(torch.utils.data.Subset(data, indices), BATCH)

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return self._loader(Windows(16))

    def val_dataloader(self) -> torch.utils.data.DataLoader:
        return self._loader(Windows(8, 10_000))


def _rank(rank: int, port: int, directory: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    ours = task(2)
    run = trainer(
        directory,
        max_steps=2,
        accumulate_grad_batches=2,
        devices=2,
        strategy="ddp",
        precision="64-true",
        use_distributed_sampler=False,
        val_check_interval=4,
    )
    run.fit(ours, datamodule=Sharded())
    if rank == 0:
        torch.save({k: v.detach() for k, v in ours.model.named_parameters()}, directory / "weights.pt")


def test_the_task_is_registered() -> None:
    assert tasks.registry.get("language_modeling") is LanguageModeling
    assert "language_modeling" in tasks.names()
    assert issubclass(LanguageModeling, LightningModule)


def test_the_loss_is_chunked_as_the_model_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int | None] = []
    real = language_modeling.token_losses

    def noted(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int | None) -> torch.Tensor:
        given.append(chunk)
        return real(hidden, weight, targets, chunk)

    monkeypatch.setattr(language_modeling, "token_losses", noted)
    ours = task(1)
    ours.model.loss_chunk = 5
    trainer(tmp_path, max_steps=1).fit(ours, datamodule=Data())
    assert given and set(given) == {5}
