"""The interface of an attention backend, stated once.

A plug-in writes `forward` and nothing else; every other member has a default. Inputs are checked here, at the door, so
that no backend has to.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longnet_kit.attention.patterns import Pattern
from longnet_kit.attention.sharding import SequenceShard, to_heads, to_sequence

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Support(NamedTuple):
    """Whether a backend can run given inputs, and if not, why and what can."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


class AttentionBackend(nn.Module):
    """Scaled dot-product attention of some kind over (batch, seq, heads, head_dim) tensors.

    The constructor's keyword arguments are the backend's recipe keys.
    """

    head_dependent: bool = False
    """Whether heads differ by their index. Then `forward` also receives `first_head` and `total_heads`."""

    shard: SequenceShard | None = None
    """Which part of longer sequences the inputs are; None when they are whole. A sequence-parallel strategy sets it."""

    def __init__(self) -> None:
        super().__init__()

    @property
    def pattern(self) -> Pattern | None:
        """Which keys each query sees, as data; None when the backend does not say."""
        return None

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
    ) -> Tensor:
        """Check the inputs, then run `forward`, or `forward_sharded` where the inputs are shards of longer sequences.

        Args:
            first_head, total_heads: where these heads stand among all heads of the layer, when only some are given.

        Raises:
            ValueError: inputs that are malformed, or that this backend cannot run.
        """
        check_inputs(q, k, v, key_padding_mask)
        support = self.supports(
            device=q.device, dtype=q.dtype, head_dim=q.shape[-1], causal=causal, padding=key_padding_mask is not None
        )
        if not support:
            raise ValueError(support.reason)
        heads = {}
        if self.head_dependent:
            total_heads = first_head + q.shape[2] if total_heads is None else total_heads
            if not 0 <= first_head <= first_head + q.shape[2] <= total_heads:
                raise ValueError(
                    f"heads {first_head} to {first_head + q.shape[2] - 1} were given, but total_heads is {total_heads}"
                )
            heads = {"first_head": first_head, "total_heads": total_heads}
        if self.shard is None or self.shard.size == 1:
            return super().__call__(q, k, v, causal, key_padding_mask, **heads)
        shards = self.supports_shards(seq_len=q.shape[1] * self.shard.size, shards=self.shard.size, heads=q.shape[2])
        if not shards:
            raise ValueError(shards.reason)
        return self.forward_sharded(q, k, v, self.shard, causal, key_padding_mask, **heads)

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
            mask = shard.all_gather(key_padding_mask.T.contiguous())().T.contiguous()
        return to_sequence(super().__call__(*whole.unbind(0), causal, mask, **heads), shard)

    def supports_shards(self, *, seq_len: int, shards: int, heads: int) -> Support:
        """Whether `forward_sharded` can run a sequence cut into `shards`; if not, the reason names what can."""
        if heads % shards == 0:
            return Support(True)
        return Support(
            False,
            f"{heads} heads do not divide among {shards} ranks, and this backend trains sequence-parallel with a part "
            f"of the heads on each rank; use a sequence_parallel_size of {_nearest_divisor(heads, shards)}, "
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

    def new_cache(self, batch_size: int, heads: int, head_dim: int, **factory: Any) -> Any:
        """A cache of past keys and values for `forward_cached`; a backend without one raises."""
        raise NotImplementedError(self._no_cache())

    def forward_cached(self, q: Tensor, k: Tensor, v: Tensor, cache: Any) -> Tensor:
        """Attend from the next tokens of a stream to themselves and to the cached past; causal."""
        raise NotImplementedError(self._no_cache())

    def _no_cache(self) -> str:
        return (
            f"the attention backend {type(self).__name__} has no cache, so it can neither stream nor generate token by "
            "token; write its new_cache and forward_cached, or run whole sequences"
        )


def _nearest_divisor(number: int, near: int) -> int:
    """The divisor of `number` that is nearest to `near`."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - near))


def check_inputs(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> None:
    """Raise a ValueError that says what came and what is accepted, unless the inputs are well-formed."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} is a {type(x).__name__}, expected a tensor (batch, seq, heads, head_dim)")
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (batch, seq, heads, head_dim)")
        if x.dtype not in FLOATS:
            raise ValueError(f"{name} is {x.dtype}, expected one of {', '.join(map(str, FLOATS))}")
        if x.shape != q.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)} but q has {tuple(q.shape)}; they must be equal")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype} but q is {q.dtype}; cast them to one dtype")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} but q is on {q.device}; move them to one device")
    if 0 in q.shape:
        raise ValueError(f"q has shape {tuple(q.shape)}; every dimension must be at least 1")
    if key_padding_mask is None:
        return
    if not isinstance(key_padding_mask, Tensor) or key_padding_mask.dtype != torch.bool:
        given = key_padding_mask.dtype if isinstance(key_padding_mask, Tensor) else type(key_padding_mask).__name__
        raise ValueError(f"key_padding_mask is {given}, expected a bool tensor, True where the token is real")
    if key_padding_mask.shape != q.shape[:2]:
        raise ValueError(
            f"key_padding_mask has shape {tuple(key_padding_mask.shape)}, expected (batch, seq) = {tuple(q.shape[:2])}"
        )
    if key_padding_mask.device != q.device:
        raise ValueError(f"key_padding_mask is on {key_padding_mask.device} but q is on {q.device}; move it there")
