"""Triton kernels that move the kept rows of dilated branches: gather them, mix what they give, add up gradients.

A row is the D elements of a position and head. Compact tensors hold the kept rows of a branch side by side,
(B S, K, H, D) in one piece for S segments of which a head keeps K positions; `longnet_kit.attention.dilated_compact`
says which. The only file that imports triton, which comes with torch's CUDA builds on Linux.
"""

# Triton's language is no Python to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from longnet_kit.attention.patterns import HeadOffsets

_ROWS = 32
"""Rows of a program."""
MAX_ROWS = 2**31 - _ROWS
"""Rows of a tensor: they are counted in 32 bits."""


class Branch(NamedTuple):
    """A branch whose segments cut the sequence evenly."""

    w: int
    r: int
    kept: int
    """K: rows a compact tensor has per segment and head, at least ceil(w / r); those too many are zeros."""


class Heads(NamedTuple):
    """Which residues the heads of a call keep."""

    rule: HeadOffsets
    first: int
    total: int

    def turns(self, branches: Sequence[Branch]) -> tuple[int, ...]:
        """For `grouped`, how many heads in a row keep the same residue, for each branch."""
        return tuple(-(-self.total // branch.r) for branch in branches)


def gather(
    xs: Sequence[Tensor], lse: Tensor | None, branch: Branch, heads: Heads
) -> tuple[list[Tensor], Tensor | None]:
    """The kept rows of tensors, and of the softmax denominators' logs where they are given; zeros beyond the kept.

    Args:
        xs: (B, N, H, D) each, of one dtype, at any strides but a last one of 1.
        lse: (B, N, H), in one piece.

    Returns:
        (B S, H, K, D) each, with a layout of (B S, K, H, D); and (B S, H, K).
    """
    batch, tokens, count, head_dim = xs[0].shape
    segments = batch * (tokens // branch.w)
    found = [x.new_empty(segments, branch.kept, count, head_dim) for x in xs]
    found_lse = None if lse is None else lse.new_empty(segments, count, branch.kept)
    rows = segments * branch.kept * count
    batch_strides, token_strides, head_strides = (tuple(x.stride(i) for x in xs) for i in range(3))
    _gather[(triton.cdiv(rows, _ROWS),)](
        tuple(xs), tuple(found), batch_strides, token_strides, head_strides,
        xs[0] if lse is None else lse, xs[0] if found_lse is None else found_lse, lse is not None,
        rows, tokens // branch.w, heads.first, count, head_dim, branch.w, branch.r, branch.kept,
        heads.turns([branch])[0], heads.rule, triton.next_power_of_2(head_dim), _ROWS,
    )  # fmt: skip
    return [x.transpose(1, 2) for x in found], found_lse


def mix(
    outs: Sequence[Tensor], lses: Sequence[Tensor], branches: Sequence[Branch], heads: Heads, batch: int, tokens: int
) -> tuple[Tensor, Tensor]:
    """The branches' outputs mixed in proportion to their softmax denominators (LongNet eq. 9-10).

    Args:
        outs: (B S, H, K, D) for each branch.
        lses: (B S, H, K).

    Returns:
        out: (B, N, H, D), of the outputs' dtype, 0 where no branch keeps the position. lse: (B, N, H), -inf there.
    """
    outs = [_rows(x) for x in outs]
    count, head_dim = outs[0].shape[2:]
    out = outs[0].new_empty(batch, tokens, count, head_dim)
    lse = lses[0].new_empty(batch, tokens, count)
    rows = batch * tokens * count
    _mix[(triton.cdiv(rows, _ROWS),)](
        tuple(outs), tuple(x.contiguous() for x in lses), out, lse, rows, tokens, heads.first, count, head_dim,
        *zip(*branches, strict=True), heads.turns(branches), heads.rule, triton.next_power_of_2(head_dim), _ROWS,
    )  # fmt: skip
    return out, lse


def add_up(parts: Sequence[Tensor], branches: Sequence[Branch], heads: Heads, batch: int, tokens: int) -> Tensor:
    """What each branch gives for its kept rows, added up in float32.

    Args:
        parts: (B S, H, K, D) for each branch.

    Returns:
        (B, N, H, D), of the parts' dtype; 0 where no branch keeps the position.
    """
    parts = [_rows(x) for x in parts]
    count, head_dim = parts[0].shape[2:]
    total = parts[0].new_empty(batch, tokens, count, head_dim)
    rows = batch * tokens * count
    _add_up[(triton.cdiv(rows, _ROWS),)](
        tuple(parts), total, rows, tokens, heads.first, count, head_dim,
        *zip(*branches, strict=True), heads.turns(branches), heads.rule, triton.next_power_of_2(head_dim), _ROWS,
    )  # fmt: skip
    return total


def _rows(x: Tensor) -> Tensor:
    """(B S, H, K, D) as (B S, K, H, D) in one piece; most kernels lay it so."""
    return x.transpose(1, 2).contiguous()


@triton.jit
def _offset(head, R: tl.constexpr, TURN: tl.constexpr, RULE: tl.constexpr):
    """o(h, r), see `patterns.head_offset`; it is below r, so what it exceeds is no multiple of r away."""
    if RULE == "interleaved":
        offset = head % R
    elif RULE == "grouped":
        offset = head // TURN
    else:
        offset = head * 0
    return offset


@triton.jit
def _gather(
    xs, founds, batch_strides, token_strides, head_strides, lse, found_lse, HAS_LSE: tl.constexpr,
    rows, segments, first_head, HEADS: tl.constexpr, D: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
    KEPT: tl.constexpr, TURN: tl.constexpr, RULE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = row % HEADS
    kept = row // HEADS % KEPT
    segment = row // (HEADS * KEPT)
    place = kept * R + _offset(first_head + head, R, TURN, RULE)
    there = row < rows
    real = there & (place < W)
    batch = (segment // segments).to(tl.int64)
    token = (segment % segments * W + place).to(tl.int64)
    column = tl.arange(0, WIDTH)
    within = column[None, :] < D
    for i in tl.static_range(len(xs)):
        begins = batch * batch_strides[i] + token * token_strides[i] + head * head_strides[i]
        values = tl.load(xs[i] + begins[:, None] + column[None, :], mask=real[:, None] & within, other=0.0)
        ends = row.to(tl.int64) * D
        tl.store(founds[i] + ends[:, None] + column[None, :], values, mask=there[:, None] & within)
    if HAS_LSE:
        # Where there is nothing, q and its gradients are zero: with any finite denominator so are all that it gives.
        values = tl.load(lse + (batch * segments * W + token) * HEADS + head, mask=real, other=0.0)
        tl.store(found_lse + (segment.to(tl.int64) * HEADS + head) * KEPT + kept, values, mask=there)


@triton.jit
def _mix(
    outs, lses, mixed, mixed_lse, rows, tokens, first_head, HEADS: tl.constexpr, D: tl.constexpr,
    WS: tl.constexpr, RS: tl.constexpr, KEPTS: tl.constexpr, TURNS: tl.constexpr, RULE: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = row % HEADS
    token = row // HEADS % tokens
    batch = row // HEADS // tokens
    there = row < rows
    column = tl.arange(0, WIDTH)
    within = there[:, None] & (column[None, :] < D)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    for i in tl.static_range(len(WS)):
        ahead = token % WS[i] - _offset(first_head + head, RS[i], TURNS[i], RULE)
        keeps = there & (ahead % RS[i] == 0)
        segment = (batch * (tokens // WS[i]) + token // WS[i]).to(tl.int64)
        own = tl.load(lses[i] + (segment * HEADS + head) * KEPTS[i] + ahead // RS[i], mask=keeps, other=float("-inf"))
        largest = tl.maximum(largest, own)
    total = tl.zeros([ROWS], tl.float32)
    values = tl.zeros([ROWS, WIDTH], tl.float32)
    for i in tl.static_range(len(WS)):
        ahead = token % WS[i] - _offset(first_head + head, RS[i], TURNS[i], RULE)
        keeps = there & (ahead % RS[i] == 0)
        segment = (batch * (tokens // WS[i]) + token // WS[i]).to(tl.int64)
        own = tl.load(lses[i] + (segment * HEADS + head) * KEPTS[i] + ahead // RS[i], mask=keeps, other=float("-inf"))
        share = tl.where(keeps, tl.exp(own - largest), 0.0)
        begins = ((segment * KEPTS[i] + ahead // RS[i]) * HEADS + head) * D
        out = tl.load(outs[i] + begins[:, None] + column[None, :], mask=keeps[:, None] & within, other=0.0)
        values += share[:, None] * out.to(tl.float32)
        total += share
    seen = total > 0
    values = values / tl.where(seen, total, 1.0)[:, None]
    ends = row.to(tl.int64) * D
    tl.store(mixed + ends[:, None] + column[None, :], values.to(mixed.dtype.element_ty), mask=within)
    tl.store(mixed_lse + row, tl.where(seen, largest + tl.log(total), float("-inf")), mask=there)


@triton.jit
def _add_up(
    parts, added, rows, tokens, first_head, HEADS: tl.constexpr, D: tl.constexpr,
    WS: tl.constexpr, RS: tl.constexpr, KEPTS: tl.constexpr, TURNS: tl.constexpr, RULE: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = row % HEADS
    token = row // HEADS % tokens
    batch = row // HEADS // tokens
    column = tl.arange(0, WIDTH)
    within = (row < rows)[:, None] & (column[None, :] < D)
    values = tl.zeros([ROWS, WIDTH], tl.float32)
    for i in tl.static_range(len(WS)):
        ahead = token % WS[i] - _offset(first_head + head, RS[i], TURNS[i], RULE)
        keeps = ahead % RS[i] == 0
        segment = (batch * (tokens // WS[i]) + token // WS[i]).to(tl.int64)
        begins = ((segment * KEPTS[i] + ahead // RS[i]) * HEADS + head) * D
        part = tl.load(parts[i] + begins[:, None] + column[None, :], mask=keeps[:, None] & within, other=0.0)
        values += part.to(tl.float32)
    ends = row.to(tl.int64) * D
    tl.store(added + ends[:, None] + column[None, :], values.to(added.dtype.element_ty), mask=within)
