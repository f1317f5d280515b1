"""Triton kernels that move the kept rows of dilated branches: gather them, mix what they give, add up gradients.

What rows are and how they lie is said in `longnet_kit.attention.dilated_compact`, which allocates what is written here
and sets the current device, on which triton launches. What changes with the length of a sequence is no constant of the
kernels, so that new lengths compile nothing. The only file that imports triton.
"""

# Triton's language is no Python to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from longnet_kit.attention.dilated_compact import Branch, Heads

_ROWS = 32
"""Rows of a program."""


def gather(
    xs: Sequence[Tensor],
    found: Sequence[Tensor],
    lse: Tensor | None,
    found_lse: Tensor | None,
    branch: Branch,
    heads: Heads,
) -> None:
    """Write the kept rows of tensors, and of the logs of softmax denominators if they are given; zeros beyond the kept.

    Args:
        xs: (B, N, H, D) each, of one dtype, at any strides but a last one of 1.
        found: (B S, K, H, D) each, in one piece.
        lse: (B, N, H), in one piece.
        found_lse: (B S, H, K), in one piece.
    """
    tokens, count, head_dim = xs[0].shape[1:]
    rows = found[0].shape[:3].numel()
    batch_strides, token_strides, head_strides = (tuple(x.stride(i) for x in xs) for i in range(3))
    _gather[(triton.cdiv(rows, _ROWS),)](
        tuple(xs), tuple(found), batch_strides, token_strides, head_strides,
        xs[0] if lse is None else lse, xs[0] if found_lse is None else found_lse, lse is not None,
        rows, tokens // branch.w, heads.first, branch.w, branch.kept, count, head_dim, branch.r,
        _turns([branch], heads)[0], heads.rule, triton.next_power_of_2(head_dim), _ROWS,
    )  # fmt: skip


def mix(
    outs: Sequence[Tensor], lses: Sequence[Tensor], out: Tensor, lse: Tensor, branches: Sequence[Branch], heads: Heads
) -> None:
    """Mix the branches' outputs in proportion to their softmax denominators (LongNet eq. 9-10).

    Args:
        outs: (B S, K, H, D) for each branch, in one piece.
        lses: (B S, H, K), in one piece.
        out: (B, N, H, D), is written, in one piece; 0 where no branch keeps the position.
        lse: (B, N, H), is written; -inf there.
    """
    _mix[(triton.cdiv(lse.numel(), _ROWS),)](
        tuple(outs), tuple(lses), out, lse, lse.numel(), *_settings(out, branches, heads)
    )


def add_up(parts: Sequence[Tensor], total: Tensor, branches: Sequence[Branch], heads: Heads) -> None:
    """Add up, in float32, what each branch gives for its kept rows.

    Args:
        parts: (B S, K, H, D) for each branch, in one piece.
        total: (B, N, H, D), is written, in one piece; 0 where no branch keeps the position.
    """
    rows = total.shape[:3].numel()
    _add_up[(triton.cdiv(rows, _ROWS),)](tuple(parts), total, rows, *_settings(total, branches, heads))


def _settings(x: Tensor, branches: Sequence[Branch], heads: Heads) -> tuple:
    """What a pass over all rows of (B, N, H, D) is told of them and the branches."""
    tokens, count, head_dim = x.shape[1:]
    lengths, rates, kept = zip(*branches, strict=True)
    sizes = triton.next_power_of_2(head_dim), _ROWS
    return tokens, heads.first, lengths, kept, count, head_dim, rates, _turns(branches, heads), heads.rule, *sizes


def _turns(branches: Sequence[Branch], heads: Heads) -> tuple[int, ...]:
    """For `grouped`, how many heads in a row keep the same residue, for each branch."""
    return tuple(-(-heads.total // branch.r) for branch in branches)


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
def _kept(row, tokens, first_head, w, HEADS: tl.constexpr, R: tl.constexpr, TURN: tl.constexpr, RULE: tl.constexpr):
    """Of rows of (B, N, H): whether a branch keeps them, their segment among all of the batch, their row in it."""
    token = row // HEADS % tokens
    ahead = token % w - _offset(first_head + row % HEADS, R, TURN, RULE)
    segment = row // HEADS // tokens * (tokens // w) + token // w
    return ahead % R == 0, segment.to(tl.int64), ahead // R


@triton.jit
def _gather(
    xs, founds, batch_strides, token_strides, head_strides, lse, found_lse, HAS_LSE: tl.constexpr,
    rows, segments, first_head, w, k, HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, TURN: tl.constexpr,
    RULE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = row % HEADS
    kept = row // HEADS % k
    segment = row // HEADS // k
    place = kept * R + _offset(first_head + head, R, TURN, RULE)
    there = row < rows
    real = there & (place < w)
    batch = (segment // segments).to(tl.int64)
    token = (segment % segments * w + place).to(tl.int64)
    column = tl.arange(0, WIDTH)
    within = column[None, :] < D
    for i in tl.static_range(len(xs)):
        begins = batch * batch_strides[i] + token * token_strides[i] + head.to(tl.int64) * head_strides[i]
        values = tl.load(xs[i] + begins[:, None] + column[None, :], mask=real[:, None] & within, other=0.0)
        ends = row.to(tl.int64) * D
        tl.store(founds[i] + ends[:, None] + column[None, :], values, mask=there[:, None] & within)
    if HAS_LSE:
        # Where there is nothing, q and its gradients are zero: with any finite denominator so are all that it gives.
        values = tl.load(lse + (batch * segments * w + token) * HEADS + head, mask=real, other=0.0)
        tl.store(found_lse + (segment.to(tl.int64) * HEADS + head) * k + kept, values, mask=there)


@triton.jit
def _mix(
    outs, lses, mixed, mixed_lse, rows, tokens, first_head, ws, ks, HEADS: tl.constexpr, D: tl.constexpr,
    RS: tl.constexpr, TURNS: tl.constexpr, RULE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = row % HEADS
    there = row < rows
    column = tl.arange(0, WIDTH)
    within = there[:, None] & (column[None, :] < D)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    for i in tl.static_range(len(RS)):
        keeps, segment, kept = _kept(row, tokens, first_head, ws[i], HEADS, RS[i], TURNS[i], RULE)
        keeps &= there
        own = tl.load(lses[i] + (segment * HEADS + head) * ks[i] + kept, mask=keeps, other=float("-inf"))
        largest = tl.maximum(largest, own)
    total = tl.zeros([ROWS], tl.float32)
    values = tl.zeros([ROWS, WIDTH], tl.float32)
    for i in tl.static_range(len(RS)):
        keeps, segment, kept = _kept(row, tokens, first_head, ws[i], HEADS, RS[i], TURNS[i], RULE)
        keeps &= there
        own = tl.load(lses[i] + (segment * HEADS + head) * ks[i] + kept, mask=keeps, other=float("-inf"))
        share = tl.where(keeps, tl.exp(own - largest), 0.0)
        begins = ((segment * ks[i] + kept) * HEADS + head) * D
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
    parts, added, rows, tokens, first_head, ws, ks, HEADS: tl.constexpr, D: tl.constexpr,
    RS: tl.constexpr, TURNS: tl.constexpr, RULE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = row % HEADS
    column = tl.arange(0, WIDTH)
    within = (row < rows)[:, None] & (column[None, :] < D)
    values = tl.zeros([ROWS, WIDTH], tl.float32)
    for i in tl.static_range(len(RS)):
        keeps, segment, kept = _kept(row, tokens, first_head, ws[i], HEADS, RS[i], TURNS[i], RULE)
        begins = ((segment * ks[i] + kept) * HEADS + head) * D
        part = tl.load(parts[i] + begins[:, None] + column[None, :], mask=keeps[:, None] & within, other=0.0)
        values += part.to(tl.float32)
    ends = row.to(tl.int64) * D
    tl.store(added + ends[:, None] + column[None, :], values.to(added.dtype.element_ty), mask=within)
