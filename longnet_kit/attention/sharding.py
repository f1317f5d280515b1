"""One sequence in contiguous shards, a rank each: what an attention backend may ask of the ranks of the others.

The interface only; `longnet_kit.parallel` implements it over torch.distributed. All ranks of a sequence must make the
same calls in the same order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Pending = Callable[[], Tensor]
"""A transfer under way; calling it waits for the result."""


class SequenceShard(ABC):
    """Rank `rank` of the `size` that hold one sequence: of n tokens each, it has n * rank to n * (rank + 1) - 1."""

    rank: int
    size: int

    @abstractmethod
    def all_gather(self, x: Tensor) -> Pending:
        """Begin to join the `x` of all ranks, equally shaped, along the first dimension."""

    @abstractmethod
    def reduce_scatter(self, x: Tensor) -> Pending:
        """Begin to add up the `x` of all ranks and to cut the sum along the first dimension, a part for each rank."""

    @abstractmethod
    def all_to_all(self, x: Tensor) -> Tensor:
        """Cut `x` along the first dimension, send part j to rank j, and join what comes in the order of the ranks."""

    @abstractmethod
    def subgroup(self, size: int) -> SequenceShard:
        """This rank among its neighbours, the ranks being cut into runs of `size`; the last run may be shorter."""

    def first_position(self, tokens: int) -> int:
        """The position in the sequence of the first of this rank's `tokens` tokens."""
        return self.rank * tokens

    def __deepcopy__(self, memo: Any) -> SequenceShard:
        return self  # a process group cannot be copied, and a copied model belongs to the same ranks


def bind(module: nn.Module, shard: SequenceShard | None) -> None:
    """Tell a module and all inside that the sequences they get are this shard of longer ones; None: whole ones.

    Attention backends, the Transformer and its dropout look at their attribute `shard`. It is an attribute and no
    context variable, since autograd's threads do not see the latter.
    """
    for part in module.modules():
        if hasattr(type(part), "shard"):
            part.shard = shard  # type: ignore[assignment]


@contextmanager
def bound(module: nn.Module, shard: SequenceShard | None) -> Iterator[None]:
    """`bind` for a while."""
    before = [(part, part.shard) for part in module.modules() if hasattr(type(part), "shard")]
    bind(module, shard)
    try:
        yield
    finally:
        for part, earlier in before:
            part.shard = earlier  # type: ignore[assignment]


def to_heads(x: Tensor, shard: SequenceShard) -> Tensor:
    """Trade a shard of the sequence with all heads for the whole sequence with some heads: an all-to-all.

    Args:
        x: (..., n, H, D), with H a multiple of the shard's size P.

    Returns:
        (..., n P, H / P, D): heads rank * H / P onwards. Gradients flow back the same way.
    """
    return _ToHeads.apply(x, shard)  # type: ignore[return-value]


def to_sequence(x: Tensor, shard: SequenceShard) -> Tensor:
    """What undoes `to_heads`: (..., n P, H / P, D) to (..., n, H, D)."""
    return _ToSequence.apply(x, shard)  # type: ignore[return-value]


def whole_sequence(x: Tensor, shard: SequenceShard) -> Tensor:
    """Join the shards of all ranks on every one of them, without gradients: (B, n, ...) to (B, N, ...)."""
    return shard.all_gather(x.transpose(0, 1).contiguous())().transpose(0, 1).contiguous()


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: SequenceShard) -> Tensor:
        ctx.shard = shard
        return _gather_sequence(x, shard)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return to_sequence(grad, ctx.shard), None


class _ToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: SequenceShard) -> Tensor:
        ctx.shard = shard
        return _gather_heads(x, shard)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return to_heads(grad, ctx.shard), None


def _gather_sequence(x: Tensor, shard: SequenceShard) -> Tensor:
    parts = x.unflatten(-2, (shard.size, -1)).movedim(-3, 0)  # (P, ..., n, H / P, D), a part for each rank
    received = shard.all_to_all(parts.contiguous())  # the same, a part from each rank
    return received.movedim(0, -4).flatten(-4, -3)


def _gather_heads(x: Tensor, shard: SequenceShard) -> Tensor:
    parts = x.unflatten(-3, (shard.size, -1)).movedim(-4, 0)  # (P, ..., n, H / P, D)
    received = shard.all_to_all(parts.contiguous())
    return received.movedim(0, -3).flatten(-3, -2)
