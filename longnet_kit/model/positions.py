"""Position embeddings that turn queries and keys: RoPE and xPos.

Angles are counted in 2^-64 of a turn, and whole turns are dropped exactly: a position turns by exactly its multiple of
what one step turns by, for every int64 position. No step of that computation overflows, because compiled code may do
anything where an integer overflows. Angles are cast only once they are cosines and sines. Nothing is kept in buffers,
which a cast of the model to bfloat16 would round. The positions here never decide which keys a query sees.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from longnet_kit.errors import UserError

Kind = Literal["rope", "xpos", "none"]

BASE = 10_000.0
XPOS_SCALE_BASE = 512
XPOS_OFFSET = 0.4
XPOS_ROOM = 2.0**30
"""Room in the number range that xPos's factors leave to queries, keys and gradients."""


class Rope:
    """Rotary embedding (arXiv 2104.09864): dimensions i and i + D/2 turn by position * 10000^(-2i/D).

    Args:
        head_dim: D.

    Raises:
        UserError: D is odd, so its dimensions do not pair up.
    """

    def __init__(self, head_dim: int) -> None:
        if head_dim % 2:
            raise UserError(
                f"heads of {head_dim} dimensions cannot be rotated in pairs; choose dim and heads so that dim / heads "
                "is even, or positions: none"
            )
        self.head_dim = head_dim
        self._turns = _turns(head_dim)

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What `rotate` multiplies with.

        Args:
            positions: (N,) or (B, N), integers.
            dtype: of the result.

        Returns:
            Cosines, and sines with the sign of their half: (N, 1, 1, D) or (B, N, 1, 1, D).
        """
        cos, sin = self._halves(positions)
        return _table(cos, cos, dtype), _table(-sin, sin, dtype)

    def check(self, length: int, dtype: torch.dtype) -> None:
        """Raise a UserError where positions 0 to length - 1 cannot be represented in `dtype`; here all can."""

    def check_given(self, positions: Tensor, dtype: torch.dtype) -> None:
        """Raise a UserError where one of some positions cannot be represented in `dtype`; here all can."""

    def _halves(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (..., N, 1, D/2) float64; the dimension of size 1 is query or key."""
        first, second, third = torch.tensor(self._turns, dtype=torch.float64, device=positions.device)  # (D,) each
        whole = positions.long()[..., None, None]
        digits = whole & _DIGIT, whole >> _BITS & _DIGIT, whole >> 2 * _BITS
        low, middle, high = (digit.double() for digit in digits)
        turns = torch.addcmul(torch.addcmul(low * first, middle, second), high, third)  # (..., N, 1, D)
        coarse, fine = turns.chunk(2, dim=-1)
        angles = (coarse - coarse.round() + fine) * (2 * math.pi)
        return angles.cos(), angles.sin()


class XPos(Rope):
    """Extrapolatable rotary embedding (arXiv 2212.10554): RoPE whose scores decay with distance. Causal only.

    Queries are scaled by gamma^((n - c) / 512) and keys by its inverse, with gamma = (2i/D + 0.4) / 1.4 per pair of
    dimensions and c = seq_len / 2, so that a score depends on the distance alone and the factors span the least range.

    Args:
        head_dim: D.
        seq_len: the length to centre for.
        dtype: of the computation; its normal range must hold the factors, with `XPOS_ROOM` to spare.

    Raises:
        UserError: D is odd, or seq_len is above `longest(dtype)`.
    """

    def __init__(self, head_dim: int, seq_len: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(head_dim)
        self.centre = seq_len / 2
        self.check(seq_len, dtype)

    @staticmethod
    def longest(dtype: torch.dtype) -> int:
        """The longest sequence whose factors fit in `dtype`: gamma^(±seq_len / 2 / 512) at i = 0; 0 if none fits."""
        limits = torch.finfo(dtype)
        room = min(math.log(limits.max), -math.log(limits.tiny)) - math.log(XPOS_ROOM)
        return max(0, int(2 * XPOS_SCALE_BASE * room / math.log((1 + XPOS_OFFSET) / XPOS_OFFSET)))

    def check(self, length: int, dtype: torch.dtype) -> None:
        """Raise a UserError where the factor of one of the positions 0 to length - 1 leaves the range of `dtype`."""
        longest, name = self.longest(dtype), str(dtype).removeprefix("torch.")
        if longest == 0:
            raise UserError(
                f"positions: xpos does not run in {name}, whose number range is too narrow for its decay factor; use "
                "positions: rope, or a precision with the range of float32, such as bf16-mixed or 32-true"
            )
        if 2 * max(self.centre, length - self.centre) > longest:
            seq_len = int(2 * self.centre)
            given = f"{length:,} tokens" + (f" in a model built for {seq_len:,}" if seq_len != length else "")
            reached = longest if seq_len == length else int(longest / 2 + self.centre)
            raise UserError(
                f"positions: xpos reaches {reached:,} tokens in {name} before its decay factor leaves the number "
                f"range, and got {given}; use positions: rope, a shorter seq_len, or a precision of wider range "
                "(float32 and bfloat16 reach the same length)"
            )

    def check_given(self, positions: Tensor, dtype: torch.dtype) -> None:
        """Raise a UserError where the factor of one of some positions leaves the range of `dtype`."""
        self.check(0, dtype)
        least, most = (math.ceil(self.centre + side * self.longest(dtype) / 2) for side in (-1, 1))
        if torch.compiler.is_compiling():  # their values are known when the graph runs
            torch.ops.aten._assert_async.msg(
                ((positions >= least) & (positions < most)).all(), "positions out of xpos's range"
            )
            return
        if type(positions) is not Tensor or positions.is_meta or not positions.numel():
            return  # they have no values
        first, last = (int(x) for x in positions.aminmax())
        if first < least:
            raise UserError(
                f"positions: xpos reaches positions from {least:,} on in a model built for {int(2 * self.centre):,} "
                f"tokens, and got {first:,}; count positions from 0"
            )
        self.check(last + 1, dtype)

    def _halves(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = super()._halves(positions)
        gamma = (_pairs(self.head_dim, positions.device) / self.head_dim + XPOS_OFFSET) / (1 + XPOS_OFFSET)
        exponent = (positions.double() - self.centre) / XPOS_SCALE_BASE
        query_and_key = torch.stack((exponent, -exponent), dim=-1)  # (..., N, 2)
        factor = gamma ** query_and_key[..., None]
        return cos * factor, sin * factor


def build(kind: Kind, *, head_dim: int, seq_len: int, causal: bool, dtype: torch.dtype = torch.float32) -> Rope | None:
    """Make the position embedding of a model; None for `none`.

    Args:
        dtype: the dtype in which the model will compute, for xPos's range.

    Raises:
        UserError: an unknown kind, or one that this model cannot have.
    """
    if kind == "none":
        return None
    if kind == "rope":
        return Rope(head_dim)
    if kind != "xpos":
        raise UserError(f"positions is {kind!r}, expected 'rope', 'xpos' or 'none'")
    if not causal:
        raise UserError(
            "positions: xpos needs causal: true, since its decay with distance grows without bound for later keys; "
            "use positions: rope"
        )
    return XPos(head_dim, seq_len, dtype)


def rotate(qk: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn queries and keys by their positions.

    Args:
        qk: (B, N, 2, H, D), of any strides; queries, then keys.
        tables: from `Rope.tables`, of the dtype to compute in.

    Returns:
        (B, N, 2, H, D), of qk's dtype.
    """
    cos, sin = tables
    x = qk.to(cos.dtype)
    swapped = x.roll(x.shape[-1] // 2, dims=-1)  # the two halves, which hold the two members of each pair
    return torch.addcmul(x * cos, swapped, sin).to(qk.dtype)


_PI = Fraction("3.14159265358979323846264338327950288419716939937511")


_BITS = 21
_DIGIT = 2**_BITS - 1
_COARSE = 2**34  # in 2^-64 of a turn, so a coarse part is a multiple of 2^-30


def _turns(head_dim: int) -> list[list[float]]:
    """The turns that one unit of each digit of a position makes, whole turns left out.

    A position is low + 2^21 middle + 2^42 high. A pair of dimensions turns by 10000^(-2i/D) radians per position.

    Returns:
        (3, D): for low, middle and high, the coarse parts of all D/2 pairs, multiples of 2^-30, then the rest, below
        2^-30. A sum of three digits times coarse parts is below 2^23 and a multiple of 2^-30: exact in float64.
    """
    steps = [round(Fraction(BASE ** -(i / head_dim)) / (2 * _PI) * 2**64) for i in range(0, head_dim, 2)]
    found = []
    for digit in range(3):
        units = [(step << digit * _BITS) % 2**64 for step in steps]
        rest = [unit % _COARSE for unit in units]
        found.append([x / 2**64 for x in (*map(int.__sub__, units, rest), *rest)])
    return found


def _pairs(head_dim: int, device: torch.device) -> Tensor:
    """2i for each pair of dimensions: (D/2,) float64."""
    return torch.arange(0, head_dim, 2, dtype=torch.float64, device=device)


def _table(first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.cat((first, second), dim=-1).to(dtype).unsqueeze(-2)  # (..., N, 1 or 2, 1, D)
