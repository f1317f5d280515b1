"""Answering from the context: what is learnt, how answers are counted, and that the shipped recipes train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning import LightningDataModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from longnet_kit import data, experiment, recipe, shipped, tasks
from longnet_kit.attention.sharding import SequenceShard, bind
from longnet_kit.model import Transformer
from longnet_kit.parallel import batches, threads
from longnet_kit.tasks import InContext
from longnet_kit.tasks.answer_accuracy import AnswerAccuracy
from tests.model.small import LoraEmbedding
from tests.tasks.tiny import logged, options, trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:Checkpoint directory")

SEQ_LEN = 24
GROUPS = [2, 5, 8]
"""The groups that are reported; there are answers of group 3 too, and none of 8."""
BRANCHES = {"backend": "dilated", "segment_lengths": [6, 24], "dilation_rates": [1, 2]}
VOCAB = 7
RECIPES = [name for name in shipped.names() if recipe.load(name).task == "in_context"]


def network(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    settings = {"dim": 16, "layers": 2, "heads": 2, "ffn_dim": 24, "seq_len": SEQ_LEN, "attention": BRANCHES}
    return Transformer(VOCAB, **(settings | changes))


def task(max_steps: int = 3, eval_contexts: Any = (), **changes: Any) -> InContext:
    return InContext(network(**changes), options(), max_steps=max_steps, eval_contexts=eval_contexts)


class Asked(Dataset):
    """Random tokens with answers of one to four tokens at random places."""

    def __init__(self, count: int, first: int = 0) -> None:
        self.count = count
        self.first = first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(self.first + index)
        tokens = torch.randint(VOCAB, (SEQ_LEN + 1,), generator=g)
        groups = torch.full((SEQ_LEN,), -1)
        place = 0
        while place < SEQ_LEN:
            gap, size, group = (int(torch.randint(1, high, (1,), generator=g)) for high in (4, 5, 4))
            groups[place + gap : place + gap + size] = [2, 3, 5][group - 1]
            place += gap + size
        targets = tokens[1:].masked_fill(groups < 0, -100)
        return {"tokens": tokens[:-1], "targets": targets, "groups": groups, "index": torch.tensor(index)}

    def batch(self) -> dict[str, Tensor]:
        samples = [self[i] for i in range(self.count)]
        return {key: torch.stack([s[key] for s in samples]) for key in samples[0]}


class Data(LightningDataModule):
    groups = GROUPS

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Asked(12), 4)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Asked(10, 1000), 4)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(Asked(10, 2000), 4)


def by_hand(logits: Tensor, batch: dict[str, Tensor]) -> dict[str, float]:
    """Accuracies, answer by answer and token by token."""
    right: dict[Any, list[bool]] = {group: [] for group in ("all", *GROUPS)}
    for row in range(len(logits)):
        place = 0
        while place < SEQ_LEN:
            group = int(batch["groups"][row, place])
            if group < 0:
                place += 1
                continue
            correct = True
            while place < SEQ_LEN and batch["groups"][row, place] >= 0:
                correct &= int(logits[row, place].argmax()) == int(batch["targets"][row, place])
                place += 1
            right["all"].append(correct)
            if group in right:
                right[group].append(correct)
    return {
        f"accuracy{'' if group == 'all' else f'@{group}'}": sum(x) / len(x) if x else float("nan")
        for group, x in right.items()
    }


def biased(model: Transformer) -> Transformer:
    """The network, a little trained, so that some answers are right and some are not."""
    both = [Asked(30, first).batch() for first in (1000, 2000)]
    batch = {key: torch.cat([part[key] for part in both]) for key in both[0]}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_the_task_is_registered_for_answers() -> None:
    assert tasks.registry.get("in_context") is InContext
    assert InContext.takes == ("answers",)


@pytest.mark.parametrize("stage", ["val", "test"])
@pytest.mark.parametrize(("chunk", "lora"), [(None, False), (3, False), (None, True)])
def test_evaluation_counts_answers_that_are_right_in_whole(stage: str, chunk: int | None, lora: bool) -> None:
    ours = task(loss_chunk=chunk)
    if lora:
        ours.model.embedding = LoraEmbedding(ours.model.embedding)  # type: ignore[assignment]
    biased(ours.model)
    run = trainer()
    (found,) = (run.validate if stage == "val" else run.test)(ours, datamodule=Data(), verbose=False)
    batch = Asked(10, 1000 if stage == "val" else 2000).batch()
    with torch.no_grad():
        logits = ours.model(batch["tokens"])
    loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten()).item()
    expected = {f"{stage}/{tag}": value for tag, value in by_hand(logits, batch).items()}
    assert 0 < expected[f"{stage}/accuracy"] < 1
    expected |= {f"{stage}/loss": loss, f"{stage}/perplexity": torch.tensor(loss).exp().item()}
    assert found == pytest.approx(expected, rel=1e-5, nan_ok=True)


@given(st.integers(0, 2**31), st.integers(1, 4))
def test_the_metric_equals_a_count_by_hand_whatever_the_batches(seed: int, size: int) -> None:
    batch = Asked(8, seed % 10_000).batch()
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.rand(8, SEQ_LEN, VOCAB, generator=g) + F.one_hot(batch["targets"].clamp(min=0), VOCAB)
    metric = AnswerAccuracy(GROUPS)
    wrong = logits.argmax(-1) != batch["targets"]
    for rows in torch.arange(8).split(size):
        metric.update(wrong[rows], batch["groups"][rows])
    of_all, of_groups = metric.compute()
    assert [of_all.item(), *of_groups.tolist()] == pytest.approx(list(by_hand(logits, batch).values()), nan_ok=True)


def test_what_no_answer_holds_is_never_counted() -> None:
    metric = AnswerAccuracy([4])
    groups = torch.tensor([[-1, 4, 4, -1, 4], [4, -1, -1, -1, -1]])
    metric.update(groups < 0, groups)
    assert metric.compute().of_all == 1 and metric.count.tolist() == [3, 3], "rows do not run into one another"


@pytest.mark.parametrize("size", [2, 4])
def test_an_answer_on_two_ranks_is_one_answer(size: int) -> None:
    """Shards of six tokens, and answers across their borders."""
    batch = Asked(10, 1000).batch()
    edge = SEQ_LEN // size
    assert (batch["groups"][:, edge - 1 : edge + 1] >= 0).all(1).any(), "else this would test nothing"
    whole = task()
    weights = biased(whole.model).state_dict()
    expected = evaluated(whole, batch, None)

    def work(shard: SequenceShard) -> dict[str, Tensor]:
        ours = task()
        ours.model.load_state_dict(weights)
        bind(ours.model, shard)
        return evaluated(ours, batches.cut(batch, shard), shard)

    found = threads.run(size, work)
    for name in ("right", "count"):
        assert sum(f[name] for f in found).tolist() == expected[name].tolist()  # type: ignore[union-attr]
    assert 0 < expected["right"][-1] < expected["count"][-1]


@torch.no_grad()
def evaluated(ours: InContext, batch: dict[str, Tensor], shard: SequenceShard | None) -> dict[str, Tensor]:
    """The sums of one rank after one batch."""
    ours.trainer = trainer()
    ours.trainer.datamodule = Data()  # type: ignore[attr-defined]
    ours._start_evaluation()
    ours._evaluate(batch)
    return {"right": ours._metrics["accuracy"].right, "count": ours._metrics["accuracy"].count}


def test_only_answers_are_learnt(tmp_path: Path) -> None:
    """The gradient is that of the mean over the answers' tokens, by torch's own cross entropy."""
    ours, expected = task(), network().double()
    trainer(tmp_path, max_steps=3, precision="64-true").fit(ours, datamodule=Data())
    losses = {}
    for step in range(3):
        batch = {key: x[step * 4 : step * 4 + 4] for key, x in Asked(12).batch().items()}
        loss = F.cross_entropy(expected(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())
        losses[step + 1] = loss.item()
        gradients = torch.autograd.grad(loss, list(expected.parameters()))
        with torch.no_grad():
            for p, g in zip(expected.parameters(), gradients, strict=True):
                p.sub_(0.1 * g)
    for name, p in expected.named_parameters():
        torch.testing.assert_close(ours.model.get_parameter(name), p, rtol=0, atol=1e-12)
    assert logged(tmp_path)["train/loss"] == pytest.approx(losses, rel=1e-6)


def test_a_shard_without_answers_has_no_loss_and_a_gradient_of_zero() -> None:
    ours = task()
    tokens = torch.zeros(2, SEQ_LEN, dtype=torch.int64)
    losses, counted = ours._losses(tokens, torch.full_like(tokens, -100))
    losses.sum().backward()
    assert not counted.any() and losses.sum() == 0
    assert all(p.grad is not None and not p.grad.any() for p in ours.parameters()), "ranks wait for all gradients"


def test_logits_are_made_of_answers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, batch = task(), Asked(10, 1000).batch()
    asked = int((batch["targets"] >= 0).sum())
    seen: list[int] = []
    plain = F.linear

    def watched(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        if weight is ours.model.embedding.weight:
            seen.append(x.shape[:-1].numel())
        return plain(x, weight, *rest)

    monkeypatch.setattr(F, "linear", watched)
    ours._losses(batch["tokens"], batch["targets"])
    assert seen == [asked]


@pytest.mark.filterwarnings("error:.*no logger configured")
def test_accuracy_is_logged_at_the_step_of_its_validation(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=2, val_check_interval=1, num_sanity_val_steps=1).fit(task(2), datamodule=Data())
    found = logged(tmp_path)
    for tag in ("val/loss", "val/accuracy", "val/accuracy@2", "val/accuracy@5"):
        assert list(found[tag]) == [1, 2]


def test_a_network_that_sees_ahead_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.causal: got false, .* set it to true"):
        task(causal=False)


def test_shorter_contexts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.eval_contexts: got \[8\], .* leave it out"):
        task(eval_contexts=[8])


def test_data_without_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="give it an AnswersData"):
        trainer().validate(task(), DataLoader(Asked(4), 4), verbose=False)


# --- recipes


def refusal(folder: Path, text: str) -> str:
    path = folder / "r.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (its text is what is looked at)
        experiment.build_data(recipe.load(path))
    return str(caught.value)


def test_a_wrong_recipe_gets_one_clear_error(tmp_path: Path) -> None:
    start = "name: x\ntrainer: {max_steps: 5}\ntask: in_context\n"
    unknown = refusal(tmp_path, f"{start}data: {{source: passkey, distancs: [64]}}\n")
    assert "data.distancs (" in unknown and "unknown key; did you mean data.distances?" in unknown
    far = refusal(tmp_path, f"{start}data: {{source: passkey, distances: [64, 512], seq_len: 256}}\n")
    assert far.startswith("data.distances: 512 does not fit a sequence of 256 tokens")
    tokenizer = refusal(tmp_path, f"{start}data: {{source: passkey, tokenizer: gpt2}}\n")
    assert tokenizer.startswith("data.tokenizer: got 'gpt2', but PassKey")
    text = refusal(tmp_path, f"{start}data: {{source: python_stdlib}}\n")
    assert "got 'in_context', which takes answers, and data.source python_stdlib supplies text" in text


def test_language_modelling_takes_answers_too(tmp_path: Path) -> None:
    keys = {"source": "many_shot", "tokenizer": "bytes", "val_examples": 4}
    made = data.build({**keys, "seq_len": SEQ_LEN, "batch_size": 2})
    plain = tasks.LanguageModeling(
        Transformer(257, dim=16, layers=1, heads=2, ffn_dim=24, seq_len=SEQ_LEN, attention=BRANCHES),
        options(),
        max_steps=1,
    )
    trainer(tmp_path, max_steps=1).fit(plain, datamodule=made)
    assert "val/bits_per_byte" not in logged(tmp_path), "answers are not the text"


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_trains_and_says_how_much_it_gets_right(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    short = ["trainer.max_steps=2", "trainer.val_check_interval=2", "data.batch_size=2", "data.val_examples=3"]
    r = recipe.load(name, [*short, "trainer.accelerator=cpu"])
    folder = experiment.run(r)
    summary = (folder / "summary.json").read_text()
    groups = experiment.build_data(r).groups  # type: ignore[attr-defined]
    assert groups and all(f'"val/accuracy@{group}"' in summary for group in groups)


def test_every_task_has_a_longnet_and_its_dense_control() -> None:
    assert {name.removeprefix("tasks/") for name in RECIPES} >= {
        f"{what}_{which}" for what in ("passkey", "associative_recall", "many_shot") for which in ("longnet", "dense")
    }
    for name in RECIPES:
        if not name.endswith("_longnet"):
            ours, theirs = recipe.load(name), recipe.load(name.rpartition("_")[0] + "_longnet")
            assert (ours.data, ours.optimizer, ours.trainer) == (theirs.data, theirs.optimizer, theirs.trainer)
