"""A task, data and a Trainer small enough to train in a test."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning import Callback, LightningDataModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, Dataset

from longnet_kit.model import Transformer
from longnet_kit.tasks import LanguageModeling

VOCAB, SEQ_LEN, BATCH = 23, 16, 2
BYTES_PER_TOKEN = {"train": 1.0, "val": 1.7, "test": 2.5}


def options(**changes: Any) -> Any:
    """An optimizer section."""
    settings = {"name": "sgd", "lr": 0.1, "betas": [0.9, 0.98], "eps": 1e-8, "weight_decay": 0.0, "warmup_steps": 0}
    return SimpleNamespace(**(settings | {"schedule": "constant"} | changes))


def network(seed: int = 0, **changes: Any) -> Transformer:
    torch.manual_seed(seed)
    settings = {"dim": 16, "layers": 1, "heads": 2, "ffn_dim": 24, "seq_len": SEQ_LEN}
    return Transformer(VOCAB, **(settings | {"attention": {"backend": "sdpa"}} | changes))


def task(max_steps: int = 4, eval_contexts: Any = (), optimizer: Any = None, **changes: Any) -> LanguageModeling:
    return LanguageModeling(
        network(**changes), optimizer or options(), max_steps=max_steps, eval_contexts=eval_contexts
    )


class Windows(Dataset):
    """Random windows, of whose targets an uneven part is ignored; window i is the same whenever it is asked for."""

    def __init__(self, count: int, first: int = 0) -> None:
        self.count = count
        self.first = first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(self.first + index)
        tokens = torch.randint(VOCAB, (SEQ_LEN + 1,), generator=g)
        targets = tokens[1:].clone()
        targets[torch.rand(SEQ_LEN, generator=g) < torch.rand(1, generator=g) * 0.9] = -100
        return {"tokens": tokens[:-1], "targets": targets, "index": torch.tensor(index)}

    def batch(self, *indices: int) -> dict[str, torch.Tensor]:
        samples = [self[i] for i in indices]
        return {key: torch.stack([s[key] for s in samples]) for key in samples[0]}


class Data(LightningDataModule):
    """As many training batches as the Trainer takes; `val` samples to validate or test on."""

    bytes_per_token = BYTES_PER_TOKEN

    def __init__(self, val: int = 5) -> None:
        super().__init__()
        self.val = val

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        return DataLoader(Windows(BATCH * self.trainer.max_steps * self.trainer.accumulate_grad_batches), BATCH)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Windows(self.val, first=10_000), BATCH)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(Windows(self.val, first=20_000), BATCH)


def trainer(directory: Path | None = None, *callbacks: Callback, loggers: Any = (), **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": 4,
        "accelerator": "cpu",
        "devices": 1,
        "log_every_n_steps": 1,
        "logger": [*([CSVLogger(directory, name="", version="")] if directory else []), *loggers],
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**(settings | changes), callbacks=list(callbacks))


def logged(directory: Path) -> dict[str, dict[int, float]]:
    """metrics.csv as tag, step, value; no (tag, step) may have been written twice."""
    found: dict[str, dict[int, float]] = {}
    with (directory / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for tag, value in row.items():
                if tag != "step" and value:
                    assert int(row["step"]) not in found.setdefault(tag, {})
                    found[tag][int(row["step"])] = float(value)
    return found
