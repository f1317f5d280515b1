"""The peak of memory of a real training, by torch's profiler; as a script, one rank of several.

`python -m tests.plan.measured FILE RECIPE OVERRIDE...` writes the peak of each rank into FILE.<rank>.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset

from longnet_kit import experiment, placement, recipe
from longnet_kit.data import tokenizers
from longnet_kit.recipe import Recipe

STEPS = 2


class Windows(Dataset):
    """Windows of random tokens, the same on every rank."""

    def __init__(self, r: Recipe) -> None:
        self.seq_len = r.data.seq_len
        self.vocab_size = tokenizers.build(r.data.tokenizer).vocab_size

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(index)
        window = torch.randint(self.vocab_size, (self.seq_len + 1,), generator=g)
        return {"tokens": window[:-1].clone(), "targets": window[1:].clone(), "index": torch.tensor(index)}


def peak(r: Recipe) -> int:
    """Bytes that two steps of a recipe had allocated at most."""
    gc.collect()  # what was left over before would be counted off when it goes
    arguments = dict(r.trainer) | {"max_steps": STEPS, "accelerator": "cpu", "limit_val_batches": 0}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        task = experiment.build_task(r)
        trainer = Trainer(
            **arguments, strategy=placement.strategy(r), logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(task, DataLoader(Windows(r), batch_size=r.data.batch_size))
    kineto: Any = profiler.profiler
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    alive = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        highest = max(highest, alive)
    return highest


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = peak(recipe.load(sys.argv[2], sys.argv[3:]))
    Path(f"{sys.argv[1]}.{os.environ['LOCAL_RANK']}").write_text(str(found))
