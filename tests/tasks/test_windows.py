"""Windows of shorter contexts out of whole sequences and of shards: each token counted once, in its own window."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longnet_kit.model.loss import IGNORED
from longnet_kit.parallel import threads
from longnet_kit.parallel.threads import ThreadShard
from longnet_kit.tasks import windows


@given(batch=st.integers(1, 3), n=st.integers(1, 8), size=st.integers(1, 5), context=st.integers(1, 45))
def test_ranks_see_each_window_once(batch: int, n: int, size: int, context: int) -> None:
    seq_len = n * size
    if context == seq_len or windows.supports(context, seq_len, size):
        return
    tokens = torch.arange(batch * seq_len).view(batch, seq_len)
    targets = tokens + 1
    count = seq_len // context
    expected = {tuple(w.tolist()) for w in tokens[:, : count * context].reshape(-1, context)} if count else set()

    def work(shard: ThreadShard) -> list[tuple[tuple[int, ...], int, int]] | None:
        """Windows or, of divided ones, parts, with the rank in the group and its size; only those that count."""
        cut = windows.cut(tokens.chunk(size, 1)[shard.rank], targets.chunk(size, 1)[shard.rank], context, shard)
        if cut is None:
            return None
        assert cut.tokens.shape == cut.targets.shape
        place = (0, 1) if cut.shard is None else (cut.shard.rank, cut.shard.size)
        counted = cut.targets != IGNORED
        assert torch.equal(cut.targets[counted], cut.tokens[counted] + 1)
        rows = [(tuple(w.tolist()), *place) for w, c in zip(cut.tokens, counted, strict=True) if c.all()]
        assert (counted == counted[:, :1]).all(), "a window counts as a whole or not at all"
        return rows

    def tokens_of(shard: ThreadShard) -> int:
        cut = windows.cut(tokens.chunk(size, 1)[shard.rank], targets.chunk(size, 1)[shard.rank], context, shard)
        return 0 if cut is None else cut.tokens.numel()

    assert len(set(threads.run(size, tokens_of))) == 1, "ranks run the model on equally many tokens"
    found = threads.run(size, work)
    if not expected:
        assert all(rows is None for rows in found)
        return
    assert all(rows is not None for rows in found)
    if context <= n or size == 1:
        whole = [row for rows in found for row, *_ in rows]  # type: ignore[union-attr]
        assert sorted(whole) == sorted(expected)
    else:  # each row of each rank is a part; the parts of a group make a window
        run = context // n
        made = {
            sum((found[first + i][row][0] for i in range(run)), ())  # type: ignore[index]
            for first in range(0, count * run, run)
            for row in range(batch)
        }
        assert made == expected
        assert not any(found[count * run :]), "ranks that are left over count nothing"
        assert all([r[1:] for r in found[rank]] == [(rank % run, run)] * batch for rank in range(count * run))  # type: ignore[union-attr]


def test_a_context_without_a_window_is_left_out() -> None:
    assert windows.cut(torch.zeros(1, 4), torch.zeros(1, 4), 5, None) is None


@pytest.mark.parametrize(("context", "near"), [(9, "8 or 12"), (13, "12 or 16")])
def test_windows_that_do_not_fit_shards_are_refused_with_lengths_that_do(context: int, near: str) -> None:
    message = windows.supports(context, 24, 6)
    assert f"windows of {context} tokens neither fit a shard of 4" in message and f"use {near}" in message
    assert not any(windows.supports(int(length), 24, 6) for length in near.split(" or "))
