"""Dropout whose mask belongs to the tokens: the same however batch and sequence are spread over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longnet_kit.attention.sharding import SequenceShard
from longnet_kit.errors import UserError

_MIX = (0x7FEB352D, -0x7B935975)  # odd multipliers of a 32-bit finalizer (lowbias32), as signed numbers
_STEPS = (-0x61C88647, 0x3C6EF372, -0x2545F491)  # odd, one for each of row, position and feature


class Dropout(nn.Module):
    """Zero elements with probability `p` and scale the others by 1 / (1 - p), in training.

    Whether an element goes is a hash of a number drawn from torch's CPU generator in each call, and of its place: the
    sample in the global batch, the position in the sequence, the feature. All ranks draw the same number, as long as
    they are seeded alike.

    Args:
        p: probability of dropping an element.
    """

    shard: SequenceShard | None = None
    """Which part of longer sequences the inputs are; set by a sequence-parallel strategy."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise UserError(f"the dropout probability is {p}, expected 0 to 1")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) in and out."""
        if self.p == 0 or not self.training:
            return x
        return torch.where(self._kept(x), x, 0) * (1 / (1 - self.p) if self.p < 1 else 0)

    def extra_repr(self) -> str:
        return f"p={self.p}"

    @torch.compiler.disable(reason="the mask of dropout is a hash, which needs integers that wrap around")
    def _kept(self, x: Tensor) -> Tensor:
        """Draw the mask of x, always eagerly: a compiled draw is another one, and compiled integers may not wrap."""
        seed = int(torch.randint(2**31, (), device="cpu"))
        return keep_mask(x.shape, self.p, seed, *self._first(x), x.device)

    def _first(self, x: Tensor) -> tuple[int, int]:
        """Row and position of the first token in the global batch."""
        world = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        if self.shard is None:
            return world * x.shape[0], 0
        return world // self.shard.size * x.shape[0], self.shard.first_position(x.shape[1])


def keep_mask(
    shape: torch.Size, p: float, seed: int, first_row: int, first_position: int, device: torch.device
) -> Tensor:
    """Which elements stay: (B, N, dim) bool, each with probability 1 - p, p above 0."""
    hashed = torch.zeros((), dtype=torch.int32, device=device)
    firsts = (first_row, first_position, 0)
    for size, first, step in zip(shape, firsts, _STEPS, strict=True):
        place = torch.arange(first, first + size, device=device) * step + seed  # int64; the low half is what counts
        hashed = hashed[..., None] ^ _mix(place.to(torch.int32))
    return _mix(hashed) > int((p - 0.5) * 2**32) - 1


def _mix(word: Tensor) -> Tensor:
    """Make each of 32 bits depend on all, in place."""
    for multiplier, shift in zip(_MIX, (16, 15), strict=True):
        word ^= (word >> shift).bitwise_and_((1 << 32 - shift) - 1)  # a logical shift: torch's own copies the sign
        word *= multiplier
    return word
