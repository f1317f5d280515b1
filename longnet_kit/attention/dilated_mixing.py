"""How the outputs of branches are mixed: by their softmax denominators as in the paper, or by weights of their own.

`Combination` is the interface; `DilatedAttention` picks one when it is built.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longnet_kit.attention import dilated_cached, dilated_sharded, maps, patterns
from longnet_kit.attention.backend import Support
from longnet_kit.attention.dilated_cached import DilatedCache
from longnet_kit.attention.dilated_op import dilated
from longnet_kit.attention.mixture import Mixture, exact
from longnet_kit.attention.patterns import HeadOffsets
from longnet_kit.attention.sharding import SequenceShard
from longnet_kit.attention.views import branch_views


class Call(NamedTuple):
    """What is asked of one attention call beside q, k and v."""

    branches: Sequence[tuple[int, int]]
    head_offsets: HeadOffsets
    first_head: int
    total_heads: int
    causal: bool
    scale: float

    @property
    def settings(self) -> tuple[list[int], list[int], str, int, int, bool, float]:
        """The arguments of an operation after q, k and v."""
        lengths, rates = (list(numbers) for numbers in zip(*self.branches, strict=True))
        return lengths, rates, *self[1:]

    def alone(self) -> Iterable[Call]:
        """The same of each branch by itself."""
        return (self._replace(branches=[branch]) for branch in self.branches)


class Combination(ABC):
    """How branches make one output. What it says beside the outputs is by default right where branches keep apart."""

    logits: Tensor | None
    """(branches,), see `Inspected.branch_logits`."""

    @abstractmethod
    def whole(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Attention over whole sequences, (B, N, H, D) in and out."""

    @abstractmethod
    def sharded(self, q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard, call: Call) -> Tensor:
        """Attention from a shard, (B, n, H, D) in and out; `supports_shards` has said yes."""

    @abstractmethod
    def cached(self, q: Tensor, k: Tensor, v: Tensor, cache: DilatedCache, call: Call) -> Tensor:
        """Attention from a stream's next tokens, (B, n, H, D) in and out; the cache moves on."""

    def new_cache(
        self, batch_size: int, heads: int, head_dim: int, branches: Sequence[tuple[int, int]], **factory: Any
    ) -> DilatedCache:
        """What `cached` takes; UserError where there is nothing."""
        return DilatedCache(batch_size, heads, head_dim, branches=branches, **factory)

    def supports_shards(self, branches: Sequence[tuple[int, int]], seq_len: int, shards: int, heads: int) -> Support:
        """Whether `sharded` can run; if not, what can."""
        return dilated_sharded.supports(branches, seq_len, shards)

    def branch_lse(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        """See `Inspected.branch_lse`; q and k with elements of a head side by side."""
        _, tokens, heads, _ = q.shape
        found = []
        for w, r in call.branches:
            mixture = Mixture(q, covered=r == 1)
            views = branch_views(tokens, w, r, call.head_offsets, call.first_head, heads, call.total_heads)
            mixture.attend(views, q, k, k, call.causal, call.scale)
            found.append(mixture.lse)
        return torch.stack(found)

    def branch_lse_sharded(self, q: Tensor, k: Tensor, shard: SequenceShard, call: Call) -> Tensor:
        """The same from a shard, of its tokens."""
        return dilated_sharded.branch_lse(q, k, shard, *call)


class Denominators(Combination):
    """By the softmax denominators, which makes one softmax over the multiset of all branches' keys (eq. 9-10)."""

    logits = None

    def whole(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        out, _ = dilated(q, k, v, *call.settings)
        return out

    def sharded(self, q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard, call: Call) -> Tensor:
        return dilated_sharded.attend(q, k, v, shard, *call)

    def cached(self, q: Tensor, k: Tensor, v: Tensor, cache: DilatedCache, call: Call) -> Tensor:
        return dilated_cached.attend(q, k, v, cache, call.head_offsets, call.scale)


class Weighted(Combination):
    """By weights of the branches' own, a softmax of logits over the branches that keep a position for a head.

    Each branch has its own softmax, and its output is in memory until the backward pass, however many there are.
    """

    logits: Tensor  # type: ignore[assignment]

    def whole(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        return self._mix((dilated(q, k, v, *alone.settings)[0] for alone in call.alone()), q, 0, call)

    def sharded(self, q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard, call: Call) -> Tensor:
        outs = (dilated_sharded.attend(q, k, v, shard, *alone) for alone in call.alone())
        return self._mix(outs, q, shard.first_position(q.shape[1]), call)

    def cached(self, q: Tensor, k: Tensor, v: Tensor, cache: DilatedCache, call: Call) -> Tensor:
        first = cache.position
        return self._mix(dilated_cached.attend_each(q, k, v, cache, call.head_offsets, call.scale), q, first, call)

    def _mix(self, outs: Iterable[Tensor], q: Tensor, first: int, call: Call) -> Tensor:
        """sum_i a_i out_i, (B, n, H, D), of the branches' outputs for positions `first` on; of q's dtype."""
        _, tokens, heads, _ = q.shape
        positions = torch.arange(first, first + tokens, device=q.device)
        kept = patterns.kept(call.branches, call.head_offsets, positions, call.first_head, heads, call.total_heads)
        a = maps.branch_shares(self.logits.to(q.device, exact(q)), kept)  # (branches, n, H)
        mixed = q.new_zeros((), dtype=exact(q))
        for a_i, out in zip(a, outs, strict=True):
            mixed = mixed + a_i.unsqueeze(-1) * out
        return mixed.to(q.dtype)


class Equal(Weighted):
    """By equal weights."""

    def __init__(self, branches: int) -> None:
        self._branches = branches

    @property
    def logits(self) -> Tensor:  # type: ignore[override]
        return torch.zeros(self._branches)


class Learned(nn.Module, Weighted):
    """By learned weights: a parameter per branch, shared by the heads of a layer."""

    logits: nn.Parameter  # type: ignore[assignment]

    def __init__(self, branches: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(branches))
