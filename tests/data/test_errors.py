"""The errors of the data package: what a loader's worker raises is told as if there were no workers."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from torch._utils import ExceptionWrapper

from longnet_kit.data import DataError
from longnet_kit.errors import UserError
from tests.data.corpus import module


class Finer(DataError):
    """As a plug-in may have one."""


def damage(cache: Path) -> None:
    """Flip a bit in the middle of the training tokens."""
    (shard,) = cache.glob("*/train-*.bin")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def refusal(cache: Path, workers: int) -> str:
    """What reading a training split to its end says."""
    loader = module(cache, num_workers=workers).train_dataloader()
    with pytest.raises(DataError) as caught:
        for _ in loader:
            pass
    if workers:
        loader._iterator._shutdown_workers()  # type: ignore[union-attr]  # the error's traceback would keep them
    assert isinstance(caught.value, UserError), "the user sees no traceback"
    return str(caught.value)


def test_a_damaged_shard_is_told_the_same_with_and_without_workers(tmp_path: Path) -> None:
    module(tmp_path)
    damage(tmp_path)
    told = refusal(tmp_path, workers=0)
    assert told.startswith(str(tmp_path)) and "checksum" in told and "\n" not in told
    assert refusal(tmp_path, workers=2) == told


@pytest.mark.parametrize(
    "message",
    [
        "one line",
        "",
        "two\nlines\n",
        "\n",
        "a.b.Other: c",
        "it\nlongnet_kit.Fine: said",
        "Caught me.\nOriginal Traceback ",
    ],
)
@pytest.mark.parametrize("kind", [DataError, Finer])
def test_a_message_survives_a_worker_letter_by_letter(kind: type[DataError], message: str) -> None:
    try:
        try:
            raise DataError("the cause")
        except ValueError as cause:
            raise kind(message) from cause
    except DataError:
        wrapped = pickle.loads(pickle.dumps(ExceptionWrapper(where="in DataLoader worker process 0")))
    with pytest.raises(kind) as caught:
        wrapped.reraise()
    assert str(caught.value) == message
    assert type(caught.value) is kind
    assert str(pickle.loads(pickle.dumps(caught.value))) == message
