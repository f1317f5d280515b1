"""Batches of labelled examples: what is in them, and that a resumed run sees what the other would have seen."""

from __future__ import annotations

import re
import types
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longnet_kit import data
from longnet_kit.data import DataError, Labelled, LabelledSource
from longnet_kit.data.labelled_batches import LabelledData, padded
from longnet_kit.data.sampling import evaluation_window, training_window
from longnet_kit.data.tokenizers import Bytes


class Letters(LabelledSource):
    """Example i is i % 7 + 1 letters; its class is whether i is odd."""

    classes = ("even", "odd")

    def __init__(self, sizes: dict[str, int] | None = None, **changes: Any) -> None:
        self.sizes = sizes or {"train": 50, "val": 11, "test": 11}
        self.__dict__ |= changes

    def size(self, split: str) -> int:
        return self.sizes[split]

    def example(self, split: str, index: int) -> Labelled:
        return Labelled(chr(ord("a") + index % 26) * (index % 7 + 1), index % 2)

    def fingerprint(self) -> Any:
        return self.sizes


def module(source: LabelledSource | None = None, **options: Any) -> LabelledData:
    made = LabelledData(source or Letters(), "bytes", **({"seq_len": 8, "batch_size": 4} | options))
    made.prepare_data()
    made.setup()
    return made


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_is_padded_to_its_longest(workers: int) -> None:
    for number, batch in enumerate(module(num_workers=workers).train_dataloader()):
        indices = [training_window(number * 4 + i, 50, 0) for i in range(4)]
        assert batch["index"].tolist() == indices
        assert batch["labels"].tolist() == [i % 2 for i in indices]
        lengths = [i % 7 + 1 for i in indices]
        assert batch["tokens"].shape == batch["key_padding_mask"].shape == (4, max(lengths))
        assert (batch["tokens"].dtype, batch["key_padding_mask"].dtype) == (torch.int64, torch.bool)
        for row, mask, index, length in zip(batch["tokens"], batch["key_padding_mask"], indices, lengths, strict=True):
            assert mask.tolist() == [True] * length + [False] * (max(lengths) - length)
            assert row[mask].tolist() == [ord("a") + index % 26] * length
            assert set(row[~mask].tolist()) <= {256}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from([None, 9, 12]))
def test_padding_keeps_every_token(lengths: list[int], length: int | None) -> None:
    samples = [{"tokens": torch.arange(n), "labels": torch.tensor(n)} for n in lengths]
    batch = padded(samples, fill=77, length=length)
    assert batch["tokens"].shape == (len(lengths), length or max(lengths))
    assert batch["key_padding_mask"].sum(1).tolist() == lengths == batch["labels"].tolist()
    for row, n in zip(batch["tokens"], lengths, strict=True):
        assert row.tolist() == [*range(n), *[77] * (len(row) - n)]


def test_longer_examples_lose_their_end() -> None:
    batches = list(module(seq_len=3).val_dataloader())
    assert max(batch["tokens"].shape[1] for batch in batches) == 3
    assert {int(i): int(n) for b in batches for i, n in zip(b["index"], b["key_padding_mask"].sum(1), strict=True)} == {
        i: min(3, i % 7 + 1) for i in range(11)
    }


def test_examples_that_must_be_whole_are_refused_where_they_may_not_fit() -> None:
    with pytest.raises(DataError, match=r"data.seq_len: got 6, but examples have up to 7 tokens.*set it to 7 or more"):
        module(Letters(longest=7), seq_len=6)
    assert module(Letters(longest=7), seq_len=7)
    wrong = module(Letters(longest=5), seq_len=5)
    with pytest.raises(DataError, match=r"is \d tokens long, beyond data.seq_len 5; raise that"):
        list(wrong.val_dataloader())


def test_validation_sees_each_example_once_in_the_same_order() -> None:
    for seed in (0, 3):
        found = [i for batch in module(seed=seed).val_dataloader() for i in batch["index"].tolist()]
        assert found == [evaluation_window(place, 11) for place in range(11)]


def ranks(replicas: int, rank: int, **strategy: Any) -> Any:
    progress = types.SimpleNamespace(
        total=types.SimpleNamespace(processed=0), current=types.SimpleNamespace(processed=0), is_last_batch=False
    )
    loop = types.SimpleNamespace(epoch_loop=types.SimpleNamespace(batch_progress=progress), restarting=False)
    return types.SimpleNamespace(
        distributed_sampler_kwargs={"num_replicas": replicas, "rank": rank}, max_steps=6, accumulate_grad_batches=1,
        limit_val_batches=1.0, fit_loop=loop, strategy=types.SimpleNamespace(**strategy),
    )  # fmt: skip


def test_ranks_without_an_example_get_one_that_does_not_count() -> None:
    seen: list[int] = []
    for rank in range(3):
        made = module(batch_size=1)
        made.trainer = ranks(3, rank)
        batches = list(made.val_dataloader())
        assert len(batches) == 4
        seen += [int(b["index"]) for b in batches]
        assert [int(b["labels"]) == -100 for b in batches] == [int(b["index"]) == -1 for b in batches]
    assert sorted(seen) == [-1, *range(11)]


def test_ranks_that_share_sequences_get_them_at_full_length() -> None:
    made = module(batch_size=2)
    made.trainer = ranks(1, 0, sequence_parallel_size=2)
    assert {tuple(batch["tokens"].shape) for batch in made.train_dataloader()} == {(2, 8)}


def test_a_resumed_order_goes_on_where_it_was() -> None:
    whole = module()
    whole.trainer = ranks(1, 0)
    expected = [batch["index"].tolist() for batch in whole.train_dataloader()]
    assert len(expected) == 6
    whole.trainer.fit_loop.epoch_loop.batch_progress.total.processed = 2  # type: ignore[union-attr]
    state = whole.state_dict()
    rest = module()
    rest.trainer = ranks(1, 0)
    rest.load_state_dict(state)
    assert [batch["index"].tolist() for batch in rest.train_dataloader()] == expected[2:]


def test_other_examples_under_a_checkpoint_are_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    state = module().state_dict()
    module().load_state_dict(state)
    assert not [w for w in recwarn if "training data" in str(w.message)]
    for other in (module(Letters({"train": 51, "val": 1, "test": 1})), module(seq_len=9)):
        with pytest.warns(UserWarning, match="the training data is not the same"):
            other.load_state_dict(state)


def test_a_split_without_examples_is_refused() -> None:
    with pytest.raises(DataError, match="no examples for val; add some"):
        module(Letters({"train": 5, "val": 0, "test": 1}))


@pytest.mark.parametrize(
    ("content", "label", "told"),
    [
        ("", 0, "example 0 of val of Given is empty; leave it out"),
        ("x", 2, "example 0 of val of Given has the label 2, but the classes are 0 to 1"),
        ("x", -1, "has the label -1"),
    ],
)
def test_what_a_plug_in_gets_wrong_is_told(content: str, label: int, told: str) -> None:
    class Given(Letters):
        def example(self, split: str, index: int) -> Labelled:
            return Labelled(content, label)

    with pytest.raises(DataError, match=re.escape(told)):
        list(module(Given({"train": 1, "val": 1, "test": 1})).val_dataloader())


def test_bytes_that_are_no_text_become_replacement_characters_for_a_tokenizer_of_text() -> None:
    class Words(Bytes):
        takes_bytes = False

        def encode(self, text: str | bytes) -> Any:
            assert isinstance(text, str)
            return np.array([ord(c) for c in text], dtype=np.uint32)

    class Raw(Letters):
        def example(self, split: str, index: int) -> Labelled:
            return Labelled("né".encode()[:-1], 0)

    made = LabelledData(Raw(), Words(), seq_len=8, batch_size=1)
    made.setup()
    assert next(iter(made.val_dataloader()))["tokens"].tolist() == [[ord("n"), 0xFFFD]]


def test_a_recipes_section_makes_it() -> None:
    made = data.build({"source": "listops", "tokenizer": "bytes", "seq_len": 64, "batch_size": 2, "min_length": 10,
                       "max_length": 60, "num_workers": 0}, seed=5)  # fmt: skip
    assert isinstance(made, LabelledData) and made.seed == 5 and made.bytes_per_token == {}
    with pytest.raises(ValueError, match="data.max_lenght: unknown key; did you mean 'max_length'"):
        data.build({"source": "listops", "tokenizer": "bytes", "seq_len": 64, "batch_size": 2, "max_lenght": 60})
