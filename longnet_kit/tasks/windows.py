"""Windows of a shorter context out of evaluation sequences, whole ones or shards."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longnet_kit.attention.sharding import SequenceShard
from longnet_kit.errors import UserError
from longnet_kit.model.loss import IGNORED


class Windows(NamedTuple):
    """What one rank evaluates of the windows of a batch."""

    tokens: Tensor
    targets: Tensor
    """(windows, their tokens) each, int64."""
    shard: SequenceShard | None
    """Among which ranks each window is divided; None: it is here as a whole."""


def cut(tokens: Tensor, targets: Tensor, context: int, shard: SequenceShard | None) -> Windows | None:
    """Cut sequences into whole windows of `context` tokens; what is left at the end is not used.

    Of shards, windows no longer than one are dealt out to the ranks; longer ones, which must span whole shards, stay
    where they are. Each rank evaluates equally many tokens, ignored ones where there is no window for it.

    Args:
        tokens, targets: (B, n) each, of this rank.
        shard: this rank among those that hold the sequences; None if they are whole.

    Returns:
        None where a sequence holds no window.

    Raises:
        UserError: windows longer than a shard do not span whole shards.
    """
    if shard is None or shard.size == 1:
        count = tokens.shape[1] // context
        return Windows(*(_windows(x, context) for x in (tokens, targets)), shard=None) if count else None
    n = tokens.shape[1]
    if context > n * shard.size:
        return None
    if context <= n:
        return _dealt(tokens, targets, context, shard)
    if problem := supports(context, n * shard.size, shard.size):
        raise UserError(problem)
    run = shard.subgroup(context // n)
    if run.size * n == context:
        return Windows(tokens, targets, run)
    return Windows(tokens, torch.full_like(targets, IGNORED), None)  # the ranks left over at the end


def supports(context: int, seq_len: int, shards: int) -> str:
    """What is wrong with evaluating windows of `context` tokens on shards; empty if nothing."""
    n = seq_len // shards
    if context <= n or context % n == 0 or context >= seq_len:
        return ""
    below = context // n * n
    return (
        f"windows of {context:,} tokens neither fit a shard of {n:,} (a sequence of {seq_len:,} on {shards} ranks) nor "
        f"span whole shards; use {below:,} or {below + n:,}"
    )


def _dealt(tokens: Tensor, targets: Tensor, context: int, shard: SequenceShard) -> Windows:
    """Every P-th window of the whole sequences, which are gathered for that: tokens weigh little."""
    whole = shard.all_gather(torch.stack((tokens, targets)).movedim(-1, 0))().movedim(0, -1)  # (2, B, N)
    cut_tokens, cut_targets = (_windows(x, context) for x in whole)
    count = -(-len(cut_tokens) // shard.size)
    own = [x[shard.rank :: shard.size] for x in (cut_tokens, cut_targets)]
    missing = count - len(own[0])
    if missing:
        own[0] = torch.cat((own[0], cut_tokens[:missing]))
        own[1] = torch.cat((own[1], torch.full_like(cut_targets[:missing], IGNORED)))
    return Windows(*own, shard=None)


def _windows(x: Tensor, context: int) -> Tensor:
    """(B, N) to (B * N // context, context)."""
    count = x.shape[1] // context
    return x[:, : count * context].reshape(-1, context)
