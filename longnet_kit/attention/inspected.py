"""Looking into an attention backend: who attends to whom and how much, from its pattern."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longnet_kit.attention import maps, patterns
from longnet_kit.attention.inputs import all_heads, check_inputs
from longnet_kit.attention.patterns import Dilated, Pattern
from longnet_kit.attention.sharding import SequenceShard, whole_sequence
from longnet_kit.errors import UserError


class _Branches:
    """The branches of a backend's pattern, unless a plug-in keeps something of its own under that name."""

    def __get__(self, backend: Inspected | None, _: type) -> list[tuple[int, int]]:
        if backend is None:  # asked of the class
            return []
        own: Any = backend._modules.get("branches")
        return own if own is not None else _branches(backend.pattern)


class Inspected(nn.Module):
    """What every backend says about its weights; `longnet_kit.attention.backend` states the rest of it."""

    shard: SequenceShard | None = None
    """Which part of longer sequences the inputs are; None when they are whole. A sequence-parallel strategy sets it."""

    branch_logits: Tensor | None = None
    """Where each branch has a softmax of its own, the logits of their weights, (branches,): their softmax over the
    branches that keep a position for a head. None: there is one softmax, over all that the pattern shows.
    """

    branches = _Branches()
    """(segment length, dilation rate) of each branch, in the recipe's order; [] where the pattern has none."""

    @property
    def pattern(self) -> Pattern | None:
        """Which keys each query sees, as data; None when the backend does not say."""
        return None

    def attention_map(
        self,
        q: Tensor,
        k: Tensor,
        queries: Tensor | Sequence[int] | None = None,
        causal: bool = True,
        key_padding_mask: Tensor | None = None,
        first_head: int = 0,
        total_heads: int | None = None,
    ) -> Tensor:
        """The weight of every key in the outputs of chosen queries, from the pattern, without autograd.

        Times v it is what `forward` gives there. Beyond the rows asked for nothing of size N x N is held. In a sharded
        sequence all ranks call with the same queries, count positions in the whole sequence, and get the whole rows.

        Args:
            q, k: (B, N, H, D).
            queries: (Q,) int, positions in the sequence; None: all of them.
            key_padding_mask: (B, N) bool, True where the token is real.
            first_head, total_heads: where these heads stand among all heads of the layer.

        Returns:
            (B, H, Q, N), at least float32; rows are 0 where a query is padded or sees nothing.

        Raises:
            UserError: malformed inputs, queries that the sequence does not have, or a backend without a pattern.
        """
        if self.pattern is None:
            raise UserError(
                f"the attention backend {type(self).__name__} has no pattern, so its weights are not known; write its "
                "`pattern`, or look at one of the kit's own backends"
            )
        check_inputs(q, k, k, key_padding_mask)
        total_heads = all_heads(q.shape[2], first_head, total_heads)
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            q, k, key_padding_mask, _ = self._whole(q, k, key_padding_mask)
            positions = maps.as_positions(queries, q.shape[1], q.device)
            rest = q, k, positions, causal, key_padding_mask, first_head, total_heads
            if self.branch_logits is None:
                return maps.attention_map(self.pattern, *rest)
            assert isinstance(self.pattern, Dilated)
            return maps.mixed_map(self.pattern, self.branch_logits, *rest)

    def branch_weights(
        self,
        q: Tensor,
        k: Tensor,
        causal: bool = True,
        key_padding_mask: Tensor | None = None,
        first_head: int = 0,
        total_heads: int | None = None,
    ) -> Tensor:
        """The share of each branch in the outputs (LongNet eq. 10), without autograd.

        Where a key that several branches show counts once, it counts for the densest of them: what others have is what
        they add. Where branches have weights of their own, the shares are these.

        In a sharded sequence all ranks call, and each gets the shares of its own tokens.

        Args:
            q, k: (B, N, H, D).
            key_padding_mask: (B, N) bool, True where the token is real.
            first_head, total_heads: where these heads stand among all heads of the layer.

        Returns:
            (branches, B, N, H), in the order of `branches`, at least float32; 0 where a branch does not keep the
            position for the head or adds nothing, or the query is padded. They sum to 1 wherever some branch keeps a
            real token.

        Raises:
            UserError: malformed inputs, or a backend without branches.
        """
        if not _branches(self.pattern):
            raise UserError(
                f"the attention backend {type(self).__name__} has no branches to weigh against each other; the backend "
                "dilated has, and naive with a dilated pattern"
            )
        check_inputs(q, k, k, key_padding_mask)
        total_heads = all_heads(q.shape[2], first_head, total_heads)
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            if self.branch_logits is None:
                weights = maps.shares(self.branch_lse(q, k, causal, key_padding_mask, first_head, total_heads))
            else:
                weights = self._own_weights(self.branch_logits, q, first_head, total_heads)
        return weights if key_padding_mask is None else weights.masked_fill(~key_padding_mask[:, :, None], 0)

    def branch_lse(
        self, q: Tensor, k: Tensor, causal: bool, key_padding_mask: Tensor | None, first_head: int, total_heads: int
    ) -> Tensor:
        """The log of each branch's softmax denominators; by default from the pattern, in chunks of queries.

        Inputs are as of `branch_weights`, checked. In a sharded sequence the default gathers q and k of all of it.

        Returns:
            (branches, B, N, H), at least float32; -inf where a branch does not keep the position for the head, or (in a
            set) shows it nothing that a denser one does not show; anything where the query is padded.
        """
        assert isinstance(self.pattern, Dilated)
        tokens = q.shape[1]
        q, k, key_padding_mask, first = self._whole(q, k, key_padding_mask)
        queries = torch.arange(first, first + tokens, device=q.device)
        return maps.branch_lse(self.pattern, q, k, queries, causal, key_padding_mask, first_head, total_heads)

    def _own_weights(self, logits: Tensor, q: Tensor, first_head: int, total_heads: int) -> Tensor:
        """`branch_weights` from the logits alone: (branches, B, N, H)."""
        assert isinstance(self.pattern, Dilated)
        batch, tokens, heads, _ = q.shape
        first = 0 if self.shard is None else self.shard.first_position(tokens)
        positions = torch.arange(first, first + tokens, device=q.device)
        branches, rule = self.pattern.branches, self.pattern.head_offsets
        kept = patterns.kept(branches, rule, positions, first_head, heads, total_heads)
        exact = torch.promote_types(q.dtype, torch.float32)
        return maps.branch_shares(logits.to(q.device, exact), kept)[:, None].expand(-1, batch, -1, -1)

    def _whole(self, q: Tensor, k: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """q, k and mask of the whole sequence, and the position in it of the first token that was given."""
        shard = self.shard
        if shard is None or shard.size == 1:
            return q, k, mask, 0
        first = shard.first_position(q.shape[1])
        mask = None if mask is None else whole_sequence(mask, shard)
        return whole_sequence(q, shard), whole_sequence(k, shard), mask, first


def _branches(pattern: Pattern | None) -> list[tuple[int, int]]:
    return list(pattern.branches) if isinstance(pattern, Dilated) else []
