"""Random generators in checkpoints, so that a resumed run draws what it would have drawn."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from longnet_kit.parallel.agreement import gathered

KEY = "generators"
"""Where a checkpoint holds the states of all ranks, as a list."""

State = dict[str, Any]


class Generators(Callback):
    """Keeps the states of Python's, NumPy's and torch's generators in checkpoints, and what is no training out of them.

    They are those at the end of the last optimizer step. What is drawn between one training batch and the next does not
    count: validations and new iterators of loaders draw, so a run would depend on when it validates and is resumed, and
    on how many workers it has. Where a run goes on with another number of ranks, all get the state of the first, which
    is right for what ranks draw alike.

    Attributes:
        is_mid_step: whether an optimizer step has begun and has not ended.
    """

    def __init__(self) -> None:
        self._next: State | None = None  # to be set before the next batch
        self._step_began: State | None = None

    @property
    def is_mid_step(self) -> bool:
        return self._step_began is not None

    def rewind(self) -> None:
        """Set the generators to what they were when the optimizer step that is under way began."""
        assert self._step_began is not None
        set_states(self._step_began)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._next is not None:
            set_states(self._next)
        if self._step_began is None:
            self._step_began = self._next or states()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._next = states()
        if not trainer.fit_loop._should_accumulate():
            self._step_began = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = gathered(trainer, packed(self._step_began or self._next or states()))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get(KEY) or [None]
        if saved == [None]:
            rank_zero_warn("the checkpoint holds no random generators: dropout and the like draw other numbers")
        state = saved[trainer.global_rank if len(saved) == trainer.world_size else 0]
        self._next = state and unpacked(state)


def states() -> State:
    """The states of all generators of this process, as the libraries give them."""
    found: State = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def packed(found: State) -> State:
    """States as plain values and tensors, which a checkpoint can hold and be loaded with weights_only."""
    version, words, gauss = found["python"]
    kind, numpy_words, *rest = found["numpy"]
    numpy_state = [kind, torch.from_numpy(numpy_words.astype(np.int64)), *rest]
    return found | {"python": [version, torch.tensor(words), gauss], "numpy": numpy_state}


def unpacked(saved: State) -> State:
    """States as `states` gives them, from what `packed` has made of them."""
    version, words, gauss = saved["python"]
    kind, numpy_words, *rest = saved["numpy"]
    numpy_state = (kind, numpy_words.numpy().astype(np.uint32), *rest)
    return saved | {"python": (version, tuple(words.tolist()), gauss), "numpy": numpy_state}


def set_states(found: State) -> None:
    """Set all generators of this process to what `states` has found."""
    random.setstate(found["python"])
    np.random.set_state(found["numpy"])
    torch.set_rng_state(found["torch"])
    if "cuda" in found and torch.cuda.is_available():
        torch.cuda.set_rng_state(found["cuda"])
