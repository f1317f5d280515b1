"""The data module of classification: labelled examples of any length, padded on the right, in an order that resumes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longnet_kit.data import cache
from longnet_kit.data.errors import DataError
from longnet_kit.data.labels import LabelledSource
from longnet_kit.data.language_modeling import IGNORED, LanguageModelingData, Samples
from longnet_kit.data.sampling import PADDING, Position
from longnet_kit.data.sources import Split
from longnet_kit.data.tokenizers import Tokenizer


class Examples(Samples):
    """A split's examples as tokens.

    Item i holds `tokens` (n,), at most the first `seq_len` of the example, `labels` () and `index` (), all int64. Item
    `PADDING` has the label -100.
    """

    def __init__(self, source: LabelledSource, split: Split, tokenizer: Tokenizer, seq_len: int) -> None:
        self._source, self._tokenizer, self._seq_len = source, tokenizer, seq_len
        self._split: Split = split

    def __len__(self) -> int:
        return self._source.size(self._split)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        content, label = self._source.example(self._split, 0 if index == PADDING else index)
        if not 0 <= label < len(self._source.classes):
            raise self._wrong(index, f"has the label {label}, but the classes are 0 to {len(self._source.classes) - 1}")
        if isinstance(content, bytes) and not self._tokenizer.takes_bytes:
            content = content.decode(errors="replace")
        ids = self._tokenizer.encode(content)
        if not len(ids):
            raise self._wrong(index, "is empty; leave it out")
        if self._source.longest is not None and len(ids) > self._seq_len:
            raise self._wrong(index, f"is {len(ids):,} tokens long, beyond data.seq_len {self._seq_len:,}; raise that")
        tokens = torch.from_numpy(ids[: self._seq_len].astype("int64"))
        labels = torch.tensor(IGNORED if index == PADDING else label)
        return {"tokens": tokens, "labels": labels, "index": torch.tensor(index)}

    def _wrong(self, index: int, what: str) -> DataError:
        return DataError(f"example {index} of {self._split} of {type(self._source).__name__} {what}")


class LabelledData(LanguageModelingData):
    """Batches of labelled examples for training, validation and test.

    A batch is `{"tokens": (B, N), "key_padding_mask": (B, N), "labels": (B,), "index": (B,)}`: int64, and bool that is
    True where a token is real. N is the longest of the batch; where ranks share sequences it is `seq_len`, so that it
    divides among them. Throughput and consumption count padding as tokens, since it is computed with.

    Which examples a step trains on depends on `seed`, the step and the global batch size alone. Validation and test see
    every example once, in an order that is shuffled but always the same.

    Args:
        source: where the examples come from.
        tokenizer: a tokenizer, or its name (see `tokenizers.build`).
        seq_len: the most tokens of an example that are taken, its first ones.
        options: `batch_size`, `num_workers` and `seed`, see `LanguageModelingData`.

    Raises:
        UserError: a number is out of range.
        DataError: the tokenizer cannot be had, or no example may be cut and `seq_len` is too short for the longest.
    """

    source: LabelledSource

    def __init__(self, source: LabelledSource, tokenizer: Tokenizer | str, **options: Any) -> None:
        super().__init__(source, tokenizer, **options)
        if source.longest is not None and self.seq_len < source.longest:
            raise DataError(
                f"data.seq_len: got {self.seq_len:,}, but examples have up to {source.longest:,} tokens, and the label "
                f"is only right of a whole one; set it to {source.longest:,} or more, or make examples shorter"
            )

    def prepare_data(self) -> None:
        """Nothing: examples are made when they are asked for."""

    def setup(self, stage: str | None = None) -> None:
        """Check that every split that the stage needs has examples.

        Raises:
            DataError: one has none.
        """
        self._resumed = Position(0, 0)
        empty = [split for split in self._needed(stage) if self.source.size(split) < 1]
        if empty:
            raise DataError(f"data.source: there are no examples for {', '.join(empty)}; add some")

    @property
    def bytes_per_token(self) -> dict[str, float]:
        """Nothing: it is for losses of tokens."""
        return {}

    def identity(self) -> str:
        return cache.folder_of(self.source, self.tokenizer).name

    def content(self) -> str:
        return self.source.content()

    def _windows(self, split: Split) -> Examples:
        return Examples(self.source, split, self.tokenizer, self.seq_len)

    def _collate(self) -> Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]:
        shards = getattr(self.trainer.strategy, "sequence_parallel_size", 1) if self.trainer is not None else 1
        return partial(padded, fill=self.tokenizer.eos, length=self.seq_len if shards > 1 else None)


def padded(samples: Sequence[dict[str, Tensor]], fill: int, length: int | None = None) -> dict[str, Tensor]:
    """Make a batch of samples: `tokens` padded on the right, with a mask, everything else stacked.

    Args:
        samples: of each, `tokens` (n,) and whatever else, of one shape in all.
        fill: the token to pad with; its value has no effect.
        length: to pad to; by default the longest sample.
    """
    lengths = torch.tensor([len(sample["tokens"]) for sample in samples])
    longest = int(lengths.max()) if length is None else length
    tokens = torch.full((len(samples), longest), fill)
    for row, sample in zip(tokens, samples, strict=True):
        row[: len(sample["tokens"])] = sample["tokens"]
    stacked = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0] if key != "tokens"}
    return {"tokens": tokens, "key_padding_mask": torch.arange(longest) < lengths[:, None], **stacked}
