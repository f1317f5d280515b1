"""Attention weights written out: a softmax over chosen queries' rows of a pattern, and what it says of each branch.

The rows come in chunks, so that no more is held than was asked for. `longnet_kit.attention.backend` states what callers
may rely on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from longnet_kit.attention import patterns
from longnet_kit.attention.inputs import exactly
from longnet_kit.attention.patterns import Dilated, Pattern
from longnet_kit.errors import UserError

MAX_SCORES = 2**24
"""How many scores of chosen queries are held at a time."""


@exactly
def weigh(q: Tensor, k: Tensor, m: Tensor, real: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + log m): the weight of each key for each query, computed in at least float32.

    Args:
        q: (B, Q, H, D).
        k: (B, N, H, D).
        m: (H, Q, N) int, how often each key is seen.
        real: (B, Q, N) bool, False where the query or the key is padded; None: nowhere.

    Returns:
        (B, H, Q, N); 0 where nothing is seen.
    """
    seen = m > 0  # (H, Q, N), and (B, H, Q, N) with padding
    if real is not None:
        seen = seen & real[:, None]
    scores = _scores(q, k)
    scores = scores + m.to(scores.dtype).clamp(min=1).log()
    blind = ~seen.any(-1, keepdim=True)
    return scores.masked_fill(~seen & ~blind, float("-inf")).softmax(-1).masked_fill(blind, 0)


def attention_map(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    queries: Tensor,
    causal: bool,
    key_padding_mask: Tensor | None,
    first_head: int,
    total_heads: int,
) -> Tensor:
    """The weights of chosen queries: q, k (B, N, H, D) and queries (Q,) to (B, H, Q, N)."""
    q, k = _widened(q, k, key_padding_mask)
    batch, seq_len, heads, _ = q.shape
    weights = q.new_empty(batch, heads, len(queries), seq_len)
    for chunk in chunks(k, total_heads, len(queries)):
        chosen = queries[chunk]
        m = pattern.rows(chosen.cpu(), seq_len, total_heads, causal)[first_head : first_head + heads].to(q.device)
        weights[:, :, chunk] = weigh(q[:, chosen], k, m, _both_real(key_padding_mask, chosen))
    return weights


def mixed_map(
    pattern: Dilated,
    logits: Tensor,
    q: Tensor,
    k: Tensor,
    queries: Tensor,
    causal: bool,
    key_padding_mask: Tensor | None,
    first_head: int,
    total_heads: int,
) -> Tensor:
    """`attention_map` where each branch has a softmax of its own, and these are mixed by logits, (branches,)."""
    q, k = _widened(q, k, key_padding_mask)
    batch, seq_len, heads, _ = q.shape
    weights = q.new_zeros(batch, heads, len(queries), seq_len)
    for chunk in chunks(k, total_heads, len(queries)):
        chosen = queries[chunk]
        kept = patterns.kept(pattern.branches, pattern.head_offsets, chosen, first_head, heads, total_heads)
        a = branch_shares(logits.to(q.device, q.dtype), kept)  # (branches, Q, H)
        for branch, a_i in zip(pattern.branches, a, strict=True):
            m = pattern.branch_rows(branch, chosen.cpu(), seq_len, total_heads, causal)
            m = m[first_head : first_head + heads].to(q.device)
            own = weigh(q[:, chosen], k, m, _both_real(key_padding_mask, chosen))
            weights[:, :, chunk] += a_i.T[:, :, None] * own
    return weights


def branch_lse(
    pattern: Dilated,
    q: Tensor,
    k: Tensor,
    queries: Tensor,
    causal: bool,
    key_padding_mask: Tensor | None,
    first_head: int,
    total_heads: int,
) -> Tensor:
    """The log of each branch's softmax denominators, -inf where nothing is due to it: (branches, B, Q, H)."""
    q, k = _widened(q, k, key_padding_mask)
    batch, seq_len, heads, _ = q.shape
    lse = q.new_empty(len(pattern.branches), batch, len(queries), heads)
    for chunk in chunks(k, total_heads, len(queries)):
        chosen = queries[chunk]
        scores, real = _scores(q[:, chosen], k), _both_real(key_padding_mask, chosen)
        for i, rows in pattern.rows_due(chosen.cpu(), seq_len, total_heads, causal):
            seen = rows[first_head : first_head + heads].bool().to(q.device)
            seen = seen if real is None else seen & real[:, None]
            lse[i, :, chunk] = scores.masked_fill(~seen, float("-inf")).logsumexp(-1).transpose(1, 2)
    return lse


def chunks(k: Tensor, total_heads: int, queries: int) -> Iterator[slice]:
    """Slices of so many queries with about `MAX_SCORES` scores each, for keys (B, N, H, D)."""
    batch, seq_len, heads, _ = k.shape
    step = max(1, MAX_SCORES // (max(batch * heads, total_heads) * seq_len))
    return (slice(start, start + step) for start in range(0, queries, step))


def shares(lse: Tensor) -> Tensor:
    """The weight of each branch in the mixture, e^lse_i / sum_j e^lse_j (LongNet eq. 10).

    Args:
        lse: (branches, ...), -inf where a branch keeps nothing.

    Returns:
        The shape of lse; 0 where a branch keeps nothing.
    """
    return torch.where(lse == -torch.inf, 0, (lse - lse.logsumexp(0)).exp())


def branch_shares(logits: Tensor, kept: Tensor) -> Tensor:
    """The weight of each branch where they have weights of their own: a softmax over those that keep the position.

    Args:
        logits: (branches,).
        kept: (branches, n, H) bool.

    Returns:
        (branches, n, H), of the dtype of the logits; 0 where a branch does not keep the position for the head.
    """
    blind = ~kept.any(0)
    open_to_all = logits[:, None, None].masked_fill(~kept & ~blind, float("-inf"))  # rows of -inf have no gradient
    return open_to_all.softmax(0).masked_fill(blind, 0)


def as_positions(queries: Tensor | Sequence[int] | None, seq_len: int, device: torch.device) -> Tensor:
    """Chosen positions of a sequence, (Q,) int64, all of them for None; UserError unless they are some."""
    if queries is None:
        return torch.arange(seq_len, device=device)
    try:
        given = torch.as_tensor(queries)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"queries is {queries!r}; expected whole numbers, positions in the sequence") from error
    if given.dim() != 1:
        raise UserError(f"queries has shape {tuple(given.shape)}; expected one dimension, positions in the sequence")
    if len(given) and (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool):
        raise UserError(f"queries is {given.dtype}; expected whole numbers, positions in the sequence")
    given = given.to(device, torch.int64)
    outside = given[(given < 0) | (given >= seq_len)]
    if len(outside):
        raise UserError(f"queries holds {outside[0].item()}; the positions of this sequence are 0 to {seq_len - 1}")
    return given


def _widened(q: Tensor, k: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """q and k, at least float32, 0 where padded: NaN there must not reach a product."""
    exact = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(exact), k.to(exact)
    if key_padding_mask is None:
        return q, k
    padded = ~key_padding_mask[:, :, None, None]
    return q.masked_fill(padded, 0), k.masked_fill(padded, 0)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q k^T / sqrt(D): (B, Q, H, D) and (B, N, H, D) to (B, H, Q, N), at least float32."""
    exact = torch.promote_types(q.dtype, torch.float32)
    return torch.einsum("bphd,bkhd->bhpk", q.to(exact), k.to(exact)) / q.shape[-1] ** 0.5


def _both_real(key_padding_mask: Tensor | None, queries: Tensor) -> Tensor | None:
    """Where neither the query nor the key is padded: (B, Q, N)."""
    if key_padding_mask is None:
        return None
    return key_padding_mask[:, queries, None] & key_padding_mask[:, None, :]
