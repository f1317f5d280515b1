"""The data module: what a batch is, and that a resumed run sees what the undisturbed run would have seen."""

from __future__ import annotations

import pickle
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from longnet_kit import data
from longnet_kit.data import DataError, LanguageModelingData, cache
from longnet_kit.data.sampling import evaluation_window, training_window
from tests.data.corpus import Given, counted, module

Batch = Mapping[str, Tensor]


class Task(LightningModule):
    """A bigram table; remembers the windows of every batch, and the weights after every step."""

    def __init__(self, stop_in: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(257, 257)
        self.stop_in = stop_in
        self.windows: list[list[int]] = []
        self.losses: list[float] = []
        self.evaluated: list[list[int]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if len(self.windows) == self.stop_in:
            raise KeyboardInterrupt
        loss = nn.functional.cross_entropy(self.table(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())
        self.windows.append(batch["index"].tolist())
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluated.append(batch["index"].tolist())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TrapTask(Task):
    """Asks for the number of steps where that builds the loaders before the loops are restored."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches > 0
        return super().configure_optimizers()


def trainer(folder: Path, max_steps: int = 12, callbacks: list[Any] | None = None, **options: Any) -> Trainer:
    """A quiet trainer on one CPU."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=max_steps,
        default_root_dir=folder,
        callbacks=callbacks,
        enable_checkpointing=bool(callbacks),
        use_distributed_sampler=False,
        limit_val_batches=options.pop("limit_val_batches", 0),
        **quiet,
        **options,
    )


def expected(batches: int, seed: int = 0, windows: int = 50) -> list[list[int]]:
    """The windows of so many batches of four, from the start."""
    return [[training_window(b * 4 + i, windows, seed) for i in range(4)] for b in range(batches)]


def test_targets_are_tokens_one_further(tmp_path: Path) -> None:
    made = module(tmp_path)
    for loader, split in ((made.train_dataloader(), "train"), (made.val_dataloader(), "val")):
        whole = made._opened().splits[split].read(0, len(made._opened().splits[split]))  # type: ignore[index]
        for batch in loader:
            assert {key: (x.dtype, tuple(x.shape[1:])) for key, x in batch.items()} == {
                "tokens": (torch.int64, (16,)),
                "targets": (torch.int64, (16,)),
                "index": (torch.int64, ()),
            }
            for tokens, targets, index in zip(batch["tokens"], batch["targets"], batch["index"], strict=True):
                window = whole[int(index) * 16 : int(index) * 16 + 17].tolist()
                assert tokens.tolist() == window[:-1] and targets.tolist() == window[1:]


def test_a_split_of_one_window_more_and_less(tmp_path: Path) -> None:
    for tokens, windows in ((16, 1), (31, 1), (32, 2), (33, 2)):  # and one token each for the end of text
        source = counted({"train": tokens, "val": 99, "test": 99})
        made = LanguageModelingData(source, "bytes", seq_len=16, batch_size=1, cache_dir=tmp_path)
        made.prepare_data()
        made.setup("fit")
        assert len(made.train_dataloader()) == windows
    source = counted({"train": 15, "val": 16, "test": 1})
    made = LanguageModelingData(source, "bytes", seq_len=16, batch_size=1, cache_dir=tmp_path)
    made.prepare_data()
    made.setup("validate")
    with pytest.raises(DataError, match=r"needs at least 17 tokens .*\(train: 16 tokens\); use more text or a shorter"):
        made.setup("fit")
    with pytest.raises(DataError, match=r"\(test: 2 tokens\)"):
        made.setup("test")
    with pytest.raises(DataError, match=r"\(train: 16 tokens; test: 2 tokens\)"):
        made.setup()


@pytest.mark.parametrize("workers", [0, 2])
def test_without_a_trainer_one_epoch_is_served(workers: int, tmp_path: Path) -> None:
    loader = module(tmp_path, seed=3, num_workers=workers).train_dataloader()
    assert len(loader) == 12
    for _ in range(2):
        assert [batch["index"].tolist() for batch in loader] == expected(12, seed=3)


def test_validation_is_the_same_for_every_seed_and_sees_each_window_once(tmp_path: Path) -> None:
    orders = []
    for seed in (0, 1):
        made = module(tmp_path, seed=seed)
        orders.append([batch["index"].tolist() for batch in made.val_dataloader()])
        assert orders[-1] == [batch["index"].tolist() for batch in made.test_dataloader()]
    assert orders[0] == orders[1]
    flat = [window for batch in orders[0] for window in batch]
    assert flat == [evaluation_window(i, 11) for i in range(11)] and sorted(flat) == list(range(11)) != flat
    assert len(made.val_dataloader()) == 3


class Ranks:
    """As much of a trainer as tells the data module its place."""

    max_steps = 5
    accumulate_grad_batches = 1

    def __init__(self, replicas: int, rank: int) -> None:
        self.distributed_sampler_kwargs = {"num_replicas": replicas, "rank": rank}
        total, current = types.SimpleNamespace(processed=0), types.SimpleNamespace(processed=0)
        progress = types.SimpleNamespace(total=total, current=current, is_last_batch=False)
        self.fit_loop = types.SimpleNamespace(
            restarting=False, epoch_loop=types.SimpleNamespace(batch_progress=progress)
        )


def test_ranks_see_parts_of_one_global_batch(tmp_path: Path) -> None:
    steps: list[list[int]] = [[] for _ in range(5)]
    validated: list[int] = []
    ignored = 0
    for rank in range(2):
        made = module(tmp_path, batch_size=2)
        made.trainer = Ranks(2, rank)  # type: ignore[assignment]
        for step, batch in enumerate(made.train_dataloader()):
            steps[step] += batch["index"].tolist()
        for batch in made.val_dataloader():
            validated += batch["index"].tolist()
            ignored += int((batch["targets"] == -100).sum())
            assert (batch["targets"] == -100).all(dim=1).tolist() == (batch["index"] == -1).tolist()
    assert steps == expected(5)
    assert sorted(validated) == [-1, *range(11)] and ignored == 16, "the odd window is made up for without a loss"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_resumed_run_equals_the_undisturbed_one(workers: int, accumulate: int, tmp_path: Path) -> None:
    whole = Task()
    options = {"accumulate_grad_batches": accumulate}
    trainer(tmp_path, **options).fit(whole, datamodule=module(tmp_path, num_workers=workers))
    assert whole.windows == expected(12 * accumulate), "more than one epoch of 12 and a half batches"

    first, second = Task(), Task()
    started = trainer(tmp_path, max_steps=5, **options)
    started.fit(first, datamodule=module(tmp_path, num_workers=workers))
    started.save_checkpoint(tmp_path / "at_5.ckpt")
    trainer(tmp_path, **options).fit(
        second, datamodule=module(tmp_path, num_workers=workers), ckpt_path=tmp_path / "at_5.ckpt"
    )
    assert first.windows + second.windows == whole.windows
    assert first.losses + second.losses == whole.losses
    assert torch.equal(second.table.weight, whole.table.weight)


@pytest.mark.parametrize("task", [Task, TrapTask])
@pytest.mark.parametrize("validate_every", [4, 5, 12])
@pytest.mark.parametrize("save_every", [4, 5])
@pytest.mark.filterwarnings("error:You're resuming:UserWarning")
def test_a_run_resumes_from_a_checkpoint_of_its_middle(
    task: type[Task], validate_every: int, save_every: int, tmp_path: Path
) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=save_every, save_top_k=-1)
    options: dict[str, Any] = {"val_check_interval": validate_every, "limit_val_batches": 2}
    whole, resumed = task(), task()
    trainer(tmp_path, callbacks=[saver], **options).fit(whole, datamodule=module(tmp_path))
    assert whole.windows == expected(12)
    trainer(tmp_path, **options).fit(
        resumed, datamodule=module(tmp_path), ckpt_path=tmp_path / f"step={save_every}.ckpt"
    )
    assert resumed.windows == whole.windows[save_every:]
    assert torch.equal(resumed.table.weight, whole.table.weight)
    assert {tuple(batch) for batch in whole.evaluated} == {
        tuple(evaluation_window(b * 4 + i, 11) for i in range(4)) for b in range(2)
    }


@pytest.mark.parametrize("stop_in", [6, 7, 8, 9, 10])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stopped_within_a_step_repeats_that_step(stop_in: int, workers: int, tmp_path: Path) -> None:
    """Gradients that were accumulated are in no checkpoint: their batches come again."""
    whole = Task()
    options = {"accumulate_grad_batches": 4, "max_steps": 5}
    trainer(tmp_path, **options).fit(whole, datamodule=module(tmp_path))
    saver = ModelCheckpoint(dirpath=tmp_path, filename="stopped", save_on_exception=True)
    stopped, resumed = Task(stop_in), Task()
    interrupted = trainer(tmp_path, callbacks=[saver], **options)
    with pytest.raises(BaseException):  # noqa: B017, PT011  (versions differ in what they raise after an interrupt)
        interrupted.fit(stopped, datamodule=module(tmp_path, num_workers=workers))
        raise KeyboardInterrupt
    (checkpoint,) = tmp_path.glob("*.ckpt")
    trainer(tmp_path, **options).fit(resumed, datamodule=module(tmp_path, num_workers=workers), ckpt_path=checkpoint)
    assert resumed.windows == whole.windows[stop_in // 4 * 4 :]
    assert torch.equal(resumed.table.weight, whole.table.weight)


def test_a_run_can_be_resumed_again_and_again(tmp_path: Path) -> None:
    seen: list[list[int]] = []
    checkpoint = None
    for steps in (3, 4, 9, 12):
        task, run = Task(), trainer(tmp_path, max_steps=steps)
        run.fit(task, datamodule=module(tmp_path), ckpt_path=checkpoint)
        seen += task.windows
        checkpoint = tmp_path / f"{steps}.ckpt"
        run.save_checkpoint(checkpoint)
    assert seen == expected(12)


def test_short_epochs_go_on_where_the_last_one_ended(tmp_path: Path) -> None:
    task = Task()
    trainer(tmp_path, limit_train_batches=5).fit(task, datamodule=module(tmp_path, num_workers=2))
    assert task.windows == expected(12)


def test_the_last_batch_of_a_short_epoch_ends_a_step(tmp_path: Path) -> None:
    options: dict[str, Any] = {"limit_train_batches": 5, "accumulate_grad_batches": 4, "max_steps": 6}
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = Task()
    trainer(tmp_path, callbacks=[saver], **options).fit(whole, datamodule=module(tmp_path))
    assert whole.windows == expected(15)
    for steps, batches in ((1, 4), (2, 5), (3, 9), (4, 10)):
        resumed = Task()
        checkpoint = tmp_path / f"step={steps}.ckpt"
        trainer(tmp_path, **options).fit(resumed, datamodule=module(tmp_path), ckpt_path=checkpoint)
        assert resumed.windows == whole.windows[batches:]
        assert torch.equal(resumed.table.weight, whole.table.weight)


def test_a_data_module_that_was_resumed_starts_anew_in_another_run(tmp_path: Path) -> None:
    made, first, second = module(tmp_path), Task(), Task()
    run = trainer(tmp_path, max_steps=3)
    run.fit(Task(), datamodule=made)
    run.save_checkpoint(tmp_path / "c.ckpt")
    trainer(tmp_path, max_steps=5).fit(first, datamodule=made, ckpt_path=tmp_path / "c.ckpt")
    trainer(tmp_path, max_steps=5).fit(second, datamodule=made)
    assert first.windows == expected(5)[3:] and second.windows == expected(5)


def test_with_other_ranks_a_run_goes_on_after_the_last_window(tmp_path: Path) -> None:
    made = module(tmp_path)
    made.load_state_dict({**made.state_dict(), "batches": 3, "windows": 24})
    made.trainer = Ranks(1, 0)  # type: ignore[assignment]
    indices = [batch["index"].tolist() for batch in made.train_dataloader()]
    assert indices == expected(8)[6:], "two steps of four are left, after three steps of eight"
    made.trainer.fit_loop.epoch_loop.batch_progress.total.processed = 4  # type: ignore[union-attr]
    assert (made.state_dict()["batches"], made.state_dict()["windows"]) == (4, 28)


def test_a_loader_made_within_a_step_changes_no_counts(tmp_path: Path) -> None:
    made, ranks = module(tmp_path), Ranks(1, 0)
    ranks.accumulate_grad_batches = 4
    made.trainer = ranks  # type: ignore[assignment]
    progress = ranks.fit_loop.epoch_loop.batch_progress
    progress.total.processed = progress.current.processed = 6
    made.train_dataloader()
    assert progress.total.processed == 6 and made.state_dict()["batches"] == 4
    ranks.fit_loop.restarting = True
    made.train_dataloader()
    assert progress.total.processed == 4


def test_other_data_under_a_checkpoint_is_warned_of(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    state = module(tmp_path).state_dict()
    module(tmp_path).load_state_dict(state)
    assert not [w for w in recwarn if "training data" in str(w.message)]
    with pytest.warns(UserWarning, match="the training data is not the same"):
        module(tmp_path, windows=51).load_state_dict(state)
    with pytest.warns(UserWarning, match="the training data is not the same"):
        module(tmp_path, seq_len=8, windows=100).load_state_dict(state)


def test_bytes_per_token_count_the_ends_of_documents(tmp_path: Path) -> None:
    documents = [data.Document("a", "é" * 50, "train"), data.Document("b", "x" * 19, "val")]
    made = LanguageModelingData(Given(documents), "bytes", seq_len=8, batch_size=1, cache_dir=tmp_path)
    made.prepare_data()
    made.setup("fit")
    assert made.bytes_per_token == {"train": 100 / 101, "val": 19 / 20}


def test_loaders_pickle_for_worker_processes(tmp_path: Path) -> None:
    loader = module(tmp_path).train_dataloader()
    loader.dataset[0]
    assert torch.equal(pickle.loads(pickle.dumps(loader.dataset))[7]["tokens"], loader.dataset[7]["tokens"])


def test_damage_reaches_the_user_through_workers(tmp_path: Path) -> None:
    made = module(tmp_path, num_workers=2)
    (path,) = tmp_path.glob("*/train-00000.bin")
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"train-00000\.bin was changed or damaged"):
        list(made.train_dataloader())


def test_use_before_setup_is_told() -> None:
    made = LanguageModelingData(counted({"train": 9}), "bytes", seq_len=1, batch_size=1)
    with pytest.raises(RuntimeError, match=r"call prepare_data\(\) and setup\(\) first"):
        made.train_dataloader()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"seq_len": 0}, "data.seq_len: got 0, expected at least 1"),
        ({"batch_size": -1}, "data.batch_size: got -1, expected at least 1"),
        ({"num_workers": -1}, "data.num_workers: got -1, expected at least 0"),
        ({"batch_size": 2.5}, "data.batch_size: got 2.5"),
        ({"seq_len": "1k"}, "data.seq_len: got '1k'"),
        ({"tokenizer": "byte"}, "did you mean 'bytes'"),
        ({"tokenizer": 3}, "data.tokenizer: got 3"),
        ({"source": "flies", "paths": ["x"]}, "did you mean 'files'"),
        ({"source": "files"}, "data.paths: missing"),
        ({"source": "files", "paths": "x.txt"}, "data.paths: got 'x.txt'"),
        ({"source": "files", "paths": ["x.txt"], "errors": "ignore"}, "data.errors: got 'ignore'"),
        ({"source": "files", "paths": ["x.txt"], "feild": "a"}, "data.feild: unknown key; did you mean 'field'"),
        ({"source": "files", "paths": ["missing.txt"]}, "data.paths: missing.txt does not exist"),
        ({"source": "huggingface"}, "data.path: missing"),
        ({"source": "huggingface", "path": "x", "max_documents": 0}, "data.max_documents: got 0"),
        ({"source": None}, "data.source: missing"),
        ({"paths": ["x"]}, "data.paths: unknown key"),
    ],
)
def test_wrong_keys_are_told(options: dict[str, Any], told: str) -> None:
    section = {"source": "python_stdlib", "tokenizer": "bytes", "seq_len": 8, "batch_size": 2, **options}
    with pytest.raises(ValueError, match=re.escape(told)):
        data.build(section)


def test_wrong_keys_are_told_together() -> None:
    with pytest.raises(ValueError, match="seq_len") as raised:
        data.build({"source": "files", "tokenizer": "bytes", "seq_len": 0, "batch_szie": 2, "errors": 1})
    told = str(raised.value).splitlines()
    assert [line.split(":")[0] for line in told] == [
        "data.seq_len",
        "data.batch_size",
        "data.batch_szie",
        "data.errors",
        "data.paths",
    ]


def test_a_recipe_section_and_a_flat_mapping_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longnet_kit import recipe

    (tmp_path / "my.txt").write_text("some text to train on\n" * 2000)
    monkeypatch.setenv("LONGNET_CACHE", str(tmp_path / "cache"))
    paths = [str(tmp_path / "my.txt")]
    section = recipe.Data(source="files", tokenizer="bytes", seq_len=64, batch_size=2, options={"paths": paths})
    flat = {"source": "files", "paths": paths, "tokenizer": "bytes", "seq_len": 64, "batch_size": 2}
    batches = []
    for given in (section, flat):
        made = data.build(given, seed=7)
        made.prepare_data()
        made.setup()
        batches.append(next(iter(made.train_dataloader())))
        assert made.seed == 7 and len(made.val_dataloader()) > 10 and len(made.test_dataloader()) > 10
    assert all(torch.equal(batches[0][key], batches[1][key]) for key in batches[0])
    assert cache.directory() == tmp_path / "cache" and len([p for p in cache.directory().iterdir() if p.is_dir()]) == 1
