"""The data module of sources that supply answers: examples instead of windows of text, in the same resumable order."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from longnet_kit.data import cache, tokenizers
from longnet_kit.data.answers import AnswersSource
from longnet_kit.data.language_modeling import IGNORED, LanguageModelingData, Samples
from longnet_kit.data.sampling import PADDING, Position
from longnet_kit.data.sources import Split
from longnet_kit.errors import UserError

NO_ANSWER = -1
"""The group of a target that belongs to no answer."""


class Examples(Samples):
    """A split of a source that supplies answers.

    Item i holds `tokens`, `targets` and `groups`, (seq_len,) int64 each, and `index`, () int64. Targets are those of
    answers, -100 elsewhere; their groups are the answers', -1 elsewhere. Item `PADDING` has no targets.
    """

    def __init__(self, source: AnswersSource, split: Split, seq_len: int) -> None:
        self._source = source
        self._split: Split = split
        self._seq_len = seq_len

    def __len__(self) -> int:
        return self._source.size(self._split)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        text, answers = self._source.made(self._split, 0 if index == PADDING else index, self._seq_len)
        text_ids = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).astype(np.int64))
        groups = torch.full_like(text_ids, NO_ANSWER)
        for start, end, group in answers if index != PADDING else ():
            groups[start:end] = group
        targets = text_ids.masked_fill(groups == NO_ANSWER, IGNORED)
        return {"tokens": text_ids[:-1], "targets": targets[1:], "groups": groups[1:], "index": torch.tensor(index)}


class AnswersData(LanguageModelingData):
    """Batches of examples for training, validation and test.

    A batch is `{"tokens": (B, N), "targets": (B, N), "groups": (B, N), "index": (B,)}`, all int64, see `Examples`. A
    run of targets that count is one answer. Order, workers, ranks and resuming are those of `LanguageModelingData`.

    Args:
        source: makes the examples.
        tokenizer: `bytes`.
        seq_len, batch_size, num_workers, seed, cache_dir: see `LanguageModelingData`; nothing is cached.

    Raises:
        UserError: another tokenizer, a number that is out of range, or a `seq_len` that holds no example.
    """

    source: AnswersSource

    def __init__(self, source: AnswersSource, tokenizer: tokenizers.Tokenizer | str, **options: Any) -> None:
        super().__init__(source, tokenizer, **options)
        if not isinstance(self.tokenizer, tokenizers.Bytes):
            raise UserError(
                f"data.tokenizer: got {self.tokenizer.name!r}, but {type(source).__name__} makes texts in which places "
                "are counted in bytes; use tokenizer: bytes"
            )
        self.groups = list(source.groups(self.seq_len))
        """The groups by which accuracy is reported."""

    def prepare_data(self) -> None:
        """Nothing: examples are made when they are asked for."""

    def setup(self, stage: str | None = None) -> None:
        """Nothing is opened; training starts anew unless `load_state_dict` follows."""
        self._resumed = Position(0, 0)

    @property
    def bytes_per_token(self) -> dict[str, float]:
        """None of any split: what is measured is of answers, not of text."""
        return {}

    def _windows(self, split: Split) -> Examples:
        return Examples(self.source, split, self.seq_len)

    def identity(self) -> str:
        return cache.folder_of(self.source, self.tokenizer).name
