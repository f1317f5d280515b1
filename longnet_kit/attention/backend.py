"""The interface of an attention backend, stated once.

A plug-in writes `forward` and nothing else; every other member has a default, `pattern` too, which is with what follows
from it in `longnet_kit.attention.inspected`. Inputs are checked here, at the door, so that no backend has to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longnet_kit.attention import derivatives
from longnet_kit.attention.cache import Cache
from longnet_kit.attention.inputs import all_heads, check_inputs, check_output, nearest_divisor
from longnet_kit.attention.inspected import Inspected
from longnet_kit.attention.sharding import SequenceShard, to_heads, to_sequence, whole_sequence
from longnet_kit.errors import UserError


class Support(NamedTuple):
    """Whether a backend can run given inputs, and if not, why and what can."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


class AttentionBackend(Inspected):
    """Scaled dot-product attention of some kind over (batch, seq, heads, head_dim) tensors.

    The constructor's keyword arguments are the backend's recipe keys.
    """

    head_dependent: bool = False
    """Whether heads differ by their index. Then `forward` also receives `first_head` and `total_heads`."""

    watch: Callable[[Tensor, Tensor, bool, Tensor | None], Any] | None = None
    """Called with (q, k, causal, key_padding_mask), just as they were given, before each attention; None: nobody looks.

    Not part of the module's state. In a sharded sequence it gets this rank's shard. Any callable but an nn.Module.
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool = True, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            q, k, v: (B, N, H, D), of one floating dtype, on one device.
            causal: a query sees no key after its own position.
            key_padding_mask: (B, N) bool, True where the token is real. Padded keys are never seen and the outputs of
                padded queries are zero.

        Returns:
            (B, N, H, D), of the dtype of q (under autocast, of the autocast dtype).
        """
        raise NotImplementedError(f"{type(self).__name__} must write forward(q, k, v, causal, key_padding_mask)")

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool = True,
        key_padding_mask: Tensor | None = None,
        *,
        first_head: int = 0,
        total_heads: int | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Check the inputs, then run `forward`; `forward_sharded` where they are shards, `forward_cached` with a cache.

        Args:
            first_head, total_heads: where these heads stand among all heads of the layer, when only some are given.
            cache: the past of the streams whose next tokens these are, from `new_cache`; it moves on. No gradient.

        Raises:
            UserError: inputs that are malformed, or that this backend cannot run, or an output that is malformed.
        """
        check_inputs(q, k, v, key_padding_mask)
        support = self.supports(
            device=q.device, dtype=q.dtype, head_dim=q.shape[-1], causal=causal, padding=key_padding_mask is not None
        )
        if not support:
            raise UserError(support.reason)
        heads = {}
        if self.head_dependent:
            heads = {"first_head": first_head, "total_heads": all_heads(q.shape[2], first_head, total_heads)}
        if cache is not None:
            self._check_cached(q, causal, key_padding_mask, heads, cache)
            derivatives.refuse_forward_mode(f"{self.title} with a cache", q, k, v)
            with torch.no_grad():
                return self._checked(self.forward_cached(q, k, v, cache), q)
        shard = None if self.shard is None or self.shard.size == 1 else self.shard
        if shard is not None:
            support = self.supports_shards(seq_len=q.shape[1] * shard.size, shards=shard.size, heads=q.shape[2])
            if not support:
                raise UserError(support.reason)
            derivatives.refuse_forward_mode(f"{self.title} on several ranks", q, k, v)
            derivatives.refuse_transforms(f"{self.title} on several ranks")
        if self.watch is not None:
            self.watch(q, k, causal, key_padding_mask)
        if shard is None:
            return self._checked(super().__call__(q, k, v, causal, key_padding_mask, **heads), q)
        return self._checked(self.forward_sharded(q, k, v, shard, causal, key_padding_mask, **heads), q)

    def forward_sharded(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        shard: SequenceShard,
        causal: bool = True,
        key_padding_mask: Tensor | None = None,
        first_head: int = 0,
        total_heads: int | None = None,
    ) -> Tensor:
        """Attend from a shard of the sequence to all of it.

        By default every rank runs `forward` on the whole sequence for its part of the heads, between two all-to-alls.

        Args:
            q, k, v: (B, n, H, D), this rank's n tokens.
            shard: this rank among those that hold the sequence.
            key_padding_mask: (B, n) bool.

        Returns:
            (B, n, H, D). Gradients are those of the whole sequence's attention.
        """
        heads: dict[str, int] = {}
        own = q.shape[2] // shard.size
        if self.head_dependent:
            total_heads = first_head + q.shape[2] if total_heads is None else total_heads
            heads = {"first_head": first_head + shard.rank * own, "total_heads": total_heads}
        whole = to_heads(torch.stack((q, k, v)), shard)  # (3, B, N, H / P, D)
        mask = None
        if key_padding_mask is not None:
            mask = whole_sequence(key_padding_mask, shard)
        out = super().__call__(*whole.unbind(0), causal, mask, **heads)
        return to_sequence(self._checked(out, whole[0]), shard)

    def supports_shards(self, *, seq_len: int, shards: int, heads: int) -> Support:
        """Whether `forward_sharded` can run a sequence cut into `shards`; if not, the reason names what can."""
        if heads % shards == 0:
            return Support(True)
        return Support(
            False,
            f"{heads} heads do not divide among {shards} ranks, and this backend trains sequence-parallel with a part "
            f"of the heads on each rank; use a sequence_parallel_size of {nearest_divisor(heads, shards)}, "
            f"{-(-heads // shards) * shards} heads, or the backend dilated, which keeps all heads on every rank",
        )

    def supports(
        self, *, device: torch.device, dtype: torch.dtype, head_dim: int, causal: bool = True, padding: bool = False
    ) -> Support:
        """Whether `forward` can run such inputs; if not, the reason says what can."""
        return Support(True)

    def flops(self, seq_len: int, heads: int, head_dim: int, causal: bool = True) -> int | None:
        """Matrix-multiplication FLOPs of one forward over one sequence: 4 D per query-key pair; None when unknown."""
        if self.pattern is None:
            return None
        return 4 * head_dim * self.pattern.pairs(seq_len, heads, causal)

    def new_cache(self, batch_size: int, heads: int, head_dim: int, **factory: Any) -> Cache:
        """A cache for `forward_cached`, empty; a backend without one raises a UserError.

        Args:
            batch_size: streams that advance together.
            factory: `dtype` and `device` of the keys; `max_tokens`, the limit of a cache that grows.
        """
        raise UserError(self._no_cache())

    def forward_cached(self, q: Tensor, k: Tensor, v: Tensor, cache: Any) -> Tensor:
        """Attend from the next tokens of streams to themselves and to the past, causally, and note them in the cache.

        What it gives for chunks of any size is what `forward` gives for the whole. It runs without autograd.

        Args:
            q, k, v: (B, n, H, D), checked against the cache.
            cache: from `new_cache`.

        Returns:
            (B, n, H, D).
        """
        raise UserError(self._no_cache())

    @property
    def title(self) -> str:
        """What messages call this backend: its registered name, or its class."""
        from longnet_kit.attention import registry

        name = registry.name_of(type(self))
        return f"the attention backend {name or type(self).__qualname__}"

    def _checked(self, out: Tensor, q: Tensor) -> Tensor:
        """The output, (B, N, H, D) as q; a UserError that names the backend if it is anything else."""
        check_output(out, q, self)
        return out

    def _check_cached(
        self, q: Tensor, causal: bool, key_padding_mask: Tensor | None, heads: dict[str, int], cache: Cache
    ) -> None:
        if not causal:
            raise UserError("a cache holds the past alone, so attention with one is causal; give whole sequences")
        if key_padding_mask is not None:
            raise UserError("with a cache there is no padding: all rows advance together; leave key_padding_mask out")
        if heads and (heads["first_head"], heads["total_heads"]) != (0, q.shape[2]):
            raise UserError(f"a cache is for all heads of a layer, and {q.shape[2]} of {heads['total_heads']} came")
        if self.shard is not None and self.shard.size > 1:
            raise UserError("streams are not divided among ranks; run them on a model of one rank")
        cache.check(q)

    def _no_cache(self) -> str:
        return (
            f"the attention backend {type(self).__name__} has no cache, so it can neither stream nor generate; write "
            "its new_cache and forward_cached (attention.KeyValueCache keeps every key), or run whole sequences"
        )
