"""The data module of language modelling: windows of tokens from the cache, in an order that can be resumed anywhere."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from longnet_kit import signals, typed
from longnet_kit.data import cache, tokenizers
from longnet_kit.data.errors import DataError
from longnet_kit.data.sampling import PADDING, EvaluationSampler, Position, TrainingSampler
from longnet_kit.data.shards import Reader
from longnet_kit.data.sources import SPLITS, Source, Split
from longnet_kit.errors import UserError

IGNORED = -100
"""A target that has no loss."""
_STAGES: dict[str | None, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}

Count = Annotated[int, typed.Range(at_least=1)]
CountOrZero = Annotated[int, typed.Range(at_least=0)]


class Samples(Dataset[dict[str, Tensor]]):
    """A split as numbered samples; of item `PADDING` nothing counts."""

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} must write __len__()")


class Windows(Samples):
    """A split cut into windows of `seq_len` tokens, one after the other; what is left at the end is not used.

    Item i holds `tokens` and `targets`, (seq_len,) int64 each, the targets one token further, and `index`, () int64.
    Item `PADDING` has no targets.
    """

    def __init__(self, tokens: Reader, seq_len: int) -> None:
        self._tokens = tokens
        self._seq_len = seq_len

    def __len__(self) -> int:
        return max(0, len(self._tokens) - 1) // self._seq_len

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        place = 0 if index == PADDING else index
        window = torch.from_numpy(self._tokens.read(place * self._seq_len, self._seq_len + 1))
        targets = torch.full_like(window[1:], IGNORED) if index == PADDING else window[1:]
        return {"tokens": window[:-1], "targets": targets, "index": torch.tensor(index)}


class ResumableLoader(DataLoader[dict[str, Tensor]]):
    """A loader whose place in the data is restored by its data module; Lightning asks for these two methods."""

    def _get_iterator(self) -> Any:
        iterator = super()._get_iterator()
        if self.num_workers > 0:  # they ignore the signal by which multiprocessing ends processes, see signals.ignore
            weakref.finalize(iterator, _kill, list(iterator._workers))  # type: ignore[attr-defined]
        return iterator

    def state_dict(self) -> dict[str, Any]:
        """Nothing: see `LanguageModelingData.state_dict`."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing: see `LanguageModelingData.load_state_dict`."""


class LanguageModelingData(LightningDataModule):
    """Batches of token windows for training, validation and test.

    A batch is `{"tokens": (B, N), "targets": (B, N), "index": (B,)}`, all int64; a target of -100 has no loss.
    Which windows a step trains on depends on `seed`, the step and the global batch size alone. Validation and test see
    every window once, in an order that is shuffled but always the same: the first few batches are a fair sample.

    Args:
        source: where the text comes from.
        tokenizer: a tokenizer, or its name (see `tokenizers.build`).
        seq_len: N, in tokens.
        batch_size: B, sequences per data rank.
        num_workers: processes that read ahead; 0 reads in the training process.
        seed: of the training order.
        cache_dir: where the token cache lives; by default see `cache.directory`.

    Raises:
        UserError: a number is out of range.
        DataError: the tokenizer cannot be had.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: tokenizers.Tokenizer | str,
        *,
        seq_len: Count,
        batch_size: Count,
        num_workers: CountOrZero = 0,
        seed: int = 0,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        numbers = {"seq_len": seq_len, "batch_size": batch_size, "num_workers": num_workers, "seed": seed}
        hints = {"seq_len": Count, "batch_size": Count, "num_workers": CountOrZero, "seed": int}
        found = [p for key, value in numbers.items() for p in typed.value_problems(value, hints[key], f"data.{key}")]
        if found:
            raise UserError("\n".join(map(str, found)))
        self.source = source
        self.tokenizer = tokenizers.build(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._cache_dir = Path(cache_dir).expanduser() if cache_dir is not None else None
        self._cache: cache.TokenCache | None = None
        self._resumed = Position(0, 0)

    def prepare_data(self) -> None:
        """Tokenize the source into the cache unless it is there.

        Raises:
            DataError: a document, the tokenizer or the cache folder cannot be used.
        """
        cache.build(self.source, self.tokenizer, self._cache_dir)

    def setup(self, stage: str | None = None) -> None:
        """Open the cache for `fit`, `validate` or `test` (None: all), and check that there is enough in it.

        Raises:
            DataError: the cache is damaged, or a split that the stage needs holds less than one window.
        """
        self._resumed = Position(0, 0)
        self._cache = cache.TokenCache(cache.folder_of(self.source, self.tokenizer, self._cache_dir))
        short = [
            f"{split}: {len(self._cache.splits[split]):,} tokens"
            for split in self._needed(stage)
            if len(self._windows(split)) == 0
        ]
        if short:
            raise DataError(
                f"data.seq_len {self.seq_len:,} needs at least {self.seq_len + 1:,} tokens in each split, but there "
                f"are too few ({'; '.join(short)}); use more text or a shorter seq_len, or name files for the split "
                "(val_paths, test_paths)"
            )

    def _needed(self, stage: str | None) -> tuple[Split, ...]:
        """The splits that a stage reads."""
        if stage == "fit" and self.trainer is not None and self.trainer.limit_val_batches == 0:
            return ("train",)
        return _STAGES.get(stage, SPLITS)

    @property
    def bytes_per_token(self) -> dict[str, float]:
        """Bytes of text for each token of a split, end-of-text tokens counted; known after `setup`."""
        return {split: r.text_bytes / len(r) for split, r in self._opened().splits.items() if len(r)}

    def train_dataloader(self) -> ResumableLoader:
        """As many batches as the trainer takes in all (one epoch where it has no `max_steps`), from where it stands."""
        replicas, rank = self._place()
        windows = self._windows("train")
        if self.trainer is not None and self.trainer.max_steps > 0:
            total = self.trainer.max_steps * self.trainer.accumulate_grad_batches
        else:
            total = max(1, len(windows) // (self.batch_size * replicas))
        self._drop_half_a_step()
        sampler = TrainingSampler(
            windows,
            batch_size=self.batch_size,
            replicas=replicas,
            rank=rank,
            seed=self.seed,
            total=total,
            position=self._position,
        )
        return self._loader(windows, sampler)

    def val_dataloader(self) -> ResumableLoader:
        """Every window of `val` once."""
        return self._evaluation("val")

    def test_dataloader(self) -> ResumableLoader:
        """Every window of `test` once."""
        return self._evaluation("test")

    def state_dict(self) -> dict[str, Any]:
        """Where training stands, after the last whole optimizer step: what has been read ahead does not count."""
        position = self._position(whole_steps=True)
        return {**position._asdict(), "identity": self.identity(), "seq_len": self.seq_len}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`, also with another number of ranks; warns when the tokens are others now."""
        self._resumed = Position(state_dict["batches"], state_dict["windows"])
        same = {"identity": self.identity(), "seq_len": self.seq_len}
        if any(state_dict[key] != value for key, value in same.items()):
            rank_zero_warn(
                "the training data is not the same as when the checkpoint was written; training goes on at the same "
                "place of an order of other windows, so some may be seen twice and some not"
            )

    def _position(self, whole_steps: bool = False) -> Position:
        """Where training stands: what the trainer has finished, on top of what was finished before it was resumed."""
        replicas, _ = self._place()
        batches = self._resumed.batches
        if self.trainer is not None:
            half = self._half_a_step() if whole_steps else 0
            batches = max(batches, self._progress.total.processed - half)
        return Position(batches, self._resumed.windows + (batches - self._resumed.batches) * self.batch_size * replicas)

    @property
    def _progress(self) -> Any:
        """The trainer's counts of training batches: `total`, and `current` of this epoch."""
        assert self.trainer is not None
        return self.trainer.fit_loop.epoch_loop.batch_progress

    def _half_a_step(self) -> int:
        """Batches whose gradients wait for their optimizer step."""
        assert self.trainer is not None
        current = self._progress.current
        if self._progress.is_last_batch and current.processed == current.ready:  # the last one is done, and stepped
            return 0
        return current.processed % self.trainer.accumulate_grad_batches

    def _drop_half_a_step(self) -> None:
        """Take back a resumed trainer's batches whose gradients were lost: checkpoints hold no accumulated ones."""
        if self.trainer is None or not self.trainer.fit_loop.restarting:
            return
        if half := self._half_a_step():
            for counts in (self._progress.total, self._progress.current):
                counts.ready = counts.started = counts.processed = counts.completed = counts.processed - half

    def _place(self) -> tuple[int, int]:
        """Among how many data ranks, and which of them. A sequence-parallel group counts as one."""
        given = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (given["num_replicas"], given["rank"]) if given else (1, 0)

    def _evaluation(self, split: Split) -> ResumableLoader:
        replicas, rank = self._place()
        windows = self._windows(split)
        return self._loader(windows, EvaluationSampler(windows, replicas=replicas, rank=rank))

    def identity(self) -> str:
        """Equal where the training data is."""
        return self._opened().identity

    def content(self) -> str:
        """Return a digest that is equal where the training data is, wherever it is read from; may read all files.

        Raises:
            DataError: a file cannot be read.
        """
        return self.identity()

    def _windows(self, split: Split) -> Samples:
        return Windows(self._opened().splits[split], self.seq_len)

    def _collate(self) -> Callable[[list[dict[str, Tensor]]], dict[str, Tensor]] | None:
        """What makes a batch of samples; None: they are stacked."""
        return None

    def _loader(self, windows: Samples, sampler: TrainingSampler | EvaluationSampler) -> ResumableLoader:
        return ResumableLoader(
            windows,
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=self._collate(),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=signals.ignore,
            pin_memory=torch.cuda.is_available(),
        )

    def _opened(self) -> cache.TokenCache:
        if self._cache is None:
            raise RuntimeError("the data is not open yet: call prepare_data() and setup() first")
        return self._cache


def _kill(workers: Iterable[Any]) -> None:
    for worker in workers:
        worker.kill()
