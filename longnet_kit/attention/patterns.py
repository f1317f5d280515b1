"""Which keys each query sees, as data. Nothing here computes attention.

A pattern answers with the multiplicity m[h, p, p']: in how many branches head h lets query p see key p'. Attention is
then the softmax over the multiset of keys, that is, dense attention with bias log m.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from longnet_kit.attention import unions
from longnet_kit.errors import UserError
from longnet_kit.registry import Registry
from longnet_kit.typed import Range

Count = Annotated[int, Range(at_least=1)]
HeadOffsets = Literal["interleaved", "grouped", "none"]
Overlap = Literal["multiset", "set"]


class Pattern:
    """A rule for which keys each query of each head sees. A plug-in must write `multiplicity` alone."""

    head_dependent: bool = True
    """Whether heads may see different keys."""

    def multiplicity(self, seq_len: int, heads: int, causal: bool) -> Tensor:
        """How often each head's query sees each key: (H, N, N) int32, queries in the second dimension."""
        raise NotImplementedError

    def rows(self, queries: Tensor, seq_len: int, heads: int, causal: bool) -> Tensor:
        """The rows of `multiplicity` of chosen queries; by default selected from all of it.

        Args:
            queries: (Q,) int, positions in the sequence.

        Returns:
            (H, Q, N) int32.
        """
        return self.multiplicity(seq_len, heads, causal)[:, queries]

    def pairs(self, seq_len: int, heads: int, causal: bool) -> int:
        """The sum of `multiplicity`, without making it: how many scores are computed for one sequence."""
        raise NotImplementedError


registry: Registry[Pattern] = Registry("attention pattern", "kind")


def build(config: Mapping[str, Any]) -> Pattern:
    """Make the pattern that `config["kind"]` names; UserError lists everything wrong with the mapping."""
    return registry.build(config)


class RowPattern(Pattern):
    """A pattern that writes `rows`, so that a few of them never take the memory of all."""

    def multiplicity(self, seq_len: int, heads: int, causal: bool) -> Tensor:
        return self.rows(torch.arange(seq_len), seq_len, heads, causal)

    def rows(self, queries: Tensor, seq_len: int, heads: int, causal: bool) -> Tensor:
        raise NotImplementedError


@registry.register("dense")
class Dense(RowPattern):
    """Every query sees every key."""

    head_dependent = False

    def rows(self, queries: Tensor, seq_len: int, heads: int, causal: bool) -> Tensor:
        seen = torch.ones(len(queries), seq_len, dtype=torch.int32)
        return _up_to(queries, seen, causal).expand(heads, -1, -1)

    def pairs(self, seq_len: int, heads: int, causal: bool) -> int:
        return heads * square(seq_len, causal)


@registry.register("dilated")
class Dilated(RowPattern):
    """LongNet (arXiv 2307.02486, section 2.2): branches of segments, each of which keeps every r-th position.

    In branch (w, r), head h keeps position p iff (p mod w) mod r == offset(h, r). A kept query sees the kept keys of
    its own segment.

    Args:
        segment_lengths: w of each branch, in tokens.
        dilation_rates: r of each branch; as many as there are segment lengths.
        head_offsets: `interleaved`: h mod r (the paper). `grouped`: h // ceil(H / r) (torchscale, GigaPath). `none`: 0,
            so that all heads keep the same positions.
        overlap: how often a key counts that several branches show: `multiset`: once for each of them (the paper).
            `set`: once, an ablation.

    Raises:
        UserError: the two lists differ in length, are empty, or hold a number below 1.
    """

    def __init__(
        self,
        segment_lengths: Sequence[Count],
        dilation_rates: Sequence[Count],
        head_offsets: HeadOffsets = "interleaved",
        overlap: Overlap = "multiset",
    ) -> None:
        lengths, rates = list(segment_lengths), list(dilation_rates)
        if len(lengths) != len(rates) or not lengths:
            raise UserError(
                f"segment_lengths has {len(lengths)} entries and dilation_rates has {len(rates)}; "
                "give one of each per branch, at least one branch"
            )
        for name, values in (("segment_lengths", lengths), ("dilation_rates", rates)):
            if any(not isinstance(x, int) or isinstance(x, bool) or x < 1 for x in values):
                raise UserError(f"{name} is {values}, expected whole numbers of at least 1")
        if head_offsets not in ("interleaved", "grouped", "none"):
            raise UserError(f"head_offsets is {head_offsets!r}, expected 'interleaved', 'grouped' or 'none'")
        if overlap not in ("multiset", "set"):
            raise UserError(f"overlap is {overlap!r}, expected 'multiset' or 'set'")
        if 1 not in rates:
            warnings.warn(
                f"no branch has dilation rate 1 (dilation_rates: {rates}): where no branch keeps a position for a "
                "head, that head outputs zero there",
                stacklevel=2,
            )
        self.branches: list[tuple[int, int]] = list(zip(lengths, rates, strict=True))
        self.head_offsets: HeadOffsets = head_offsets
        self.overlap: Overlap = overlap

    def offset(self, head: int, rate: int, heads: int) -> int:
        """The residue that a head keeps in a branch of dilation rate `rate`, out of `heads` heads in all."""
        return head_offset(head, rate, heads, self.head_offsets)

    def keeps(self, branch: tuple[int, int], seq_len: int, heads: int) -> Tensor:
        """Which positions each head keeps in one branch: (H, N) bool."""
        return kept([branch], self.head_offsets, torch.arange(seq_len), 0, heads, heads)[0].T

    def rows(self, queries: Tensor, seq_len: int, heads: int, causal: bool) -> Tensor:
        m = torch.zeros(heads, len(queries), seq_len, dtype=torch.int32)
        for branch in self.branches:
            m += self.branch_rows(branch, queries, seq_len, heads, causal)
        return m.clamp_(max=1) if self.overlap == "set" else m

    def rows_due(self, queries: Tensor, seq_len: int, heads: int, causal: bool) -> Iterator[tuple[int, Tensor]]:
        """Each branch's index, and which of `rows` are due to it, (H, Q, N) of 0 and 1; together they make `rows`.

        In a set a key is due to the densest branch that shows it, see `densest_first`.
        """
        seen: Tensor | None = None
        for i in densest_first(self.branches):
            shown = self.branch_rows(self.branches[i], queries, seq_len, heads, causal)
            yield i, shown if seen is None else shown & ~seen
            if self.overlap == "set":
                seen = shown if seen is None else seen | shown

    def branch_multiplicity(self, branch: tuple[int, int], seq_len: int, heads: int, causal: bool) -> Tensor:
        """What one branch (w, r) alone shows: (H, N, N) int32 of 0 and 1."""
        return self.branch_rows(branch, torch.arange(seq_len), seq_len, heads, causal)

    def branch_rows(self, branch: tuple[int, int], queries: Tensor, seq_len: int, heads: int, causal: bool) -> Tensor:
        """What one branch (w, r) alone shows chosen queries, (Q,) int: (H, Q, N) int32 of 0 and 1."""
        keeps = self.keeps(branch, seq_len, heads)  # (H, N)
        segment = torch.arange(seq_len) // branch[0]
        m = keeps[:, queries, None] & keeps[:, None, :] & (segment[queries, None] == segment)
        return _up_to(queries, m.to(torch.int32), causal)

    def pairs(self, seq_len: int, heads: int, causal: bool) -> int:
        if self.overlap == "set":
            offsets = Counter(tuple(self.offset(h, r, heads) for _, r in self.branches) for h in range(heads))
            branches = tuple(self.branches)
            return sum(n * unions.pairs(branches, own, seq_len, causal) for own, n in offsets.items())
        return sum(
            segments * square(-(-(length - offset) // r), causal)
            for w, r in self.branches
            for offset in (self.offset(h, r, heads) for h in range(heads))
            for segments, length in ((seq_len // w, w), (1, seq_len % w))
            if offset < length
        )


def kept(
    branches: Sequence[tuple[int, int]],
    rule: HeadOffsets,
    positions: Tensor,
    first_head: int,
    heads: int,
    total_heads: int,
) -> Tensor:
    """Which of some positions, (n,) int, heads first_head to first_head + H - 1 keep: (branches, n, H) bool."""
    some_heads = range(first_head, first_head + heads)
    offsets = [[head_offset(h, r, total_heads, rule) for h in some_heads] for _, r in branches]
    w, r = positions.new_tensor(branches).T[:, :, None]  # (branches, 1)
    return (positions % w % r).unsqueeze(-1) == positions.new_tensor(offsets)[:, None]


def densest_first(branches: Sequence[tuple[int, int]]) -> list[int]:
    """The indices of branches (w, r) in order of rate, and of length where that is equal."""
    return sorted(range(len(branches)), key=lambda i: branches[i][::-1])


def head_offset(head: int, rate: int, heads: int, rule: HeadOffsets) -> int:
    """o(h, r): the residue that head `head` of `heads` keeps in a branch of dilation rate `rate`."""
    if rule == "none":
        return 0
    return head % rate if rule == "interleaved" else head // -(-heads // rate)


@registry.register("block_sparse")
class BlockSparse(RowPattern):
    """Attention between blocks of tokens: a local window, or Sparse Transformer's fixed pattern (arXiv 1904.10509).

    Args:
        layout: `local`: block i sees blocks i - local_blocks + 1 to i, and as many after when not causal. `fixed`:
            windows of `local_blocks` blocks; a block sees its own window, and the last `summary_blocks` blocks of every
            earlier window (of every other window when not causal).
        block_size: tokens in a block; the last block may be shorter.
        local_blocks: blocks in a window.
        summary_blocks: blocks that summarise a window; at most `local_blocks`. Only `fixed` uses it.

    Raises:
        UserError: a number below 1, more summary blocks than the window has, or an unknown layout.
    """

    head_dependent = False

    def __init__(
        self,
        layout: Literal["fixed", "local"] = "fixed",
        block_size: Count = 64,
        local_blocks: Count = 4,
        summary_blocks: Count = 1,
    ) -> None:
        numbers = {"block_size": block_size, "local_blocks": local_blocks, "summary_blocks": summary_blocks}
        for name, value in numbers.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{name} is {value!r}, expected a whole number of at least 1")
        if layout not in ("fixed", "local"):
            raise UserError(f"the block-sparse pattern is {layout!r}, expected 'fixed' or 'local'")
        if summary_blocks > local_blocks:
            raise UserError(f"summary_blocks is {summary_blocks}, above local_blocks, which is {local_blocks}")
        self.layout = layout
        self.block_size = block_size
        self.local_blocks = local_blocks
        self.summary_blocks = summary_blocks

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether blocks, given by index, see others, if not causal: bool. The two broadcast; all heads are equal."""
        if self.layout == "local":
            return (query - key).abs() < self.local_blocks
        summary = key % self.local_blocks >= self.local_blocks - self.summary_blocks
        return (query // self.local_blocks == key // self.local_blocks) | summary

    def blocks(self, seq_len: int, causal: bool) -> Tensor:
        """Which blocks each block sees: (ceil(N / block_size), the same) bool. Equal for all heads."""
        index = torch.arange(-(-seq_len // self.block_size))
        seen = self.sees(index[:, None], index)
        return seen.tril() if causal else seen

    def rows(self, queries: Tensor, seq_len: int, heads: int, causal: bool) -> Tensor:
        block = torch.arange(seq_len) // self.block_size
        seen = self.sees(block[queries, None], block).to(torch.int32)
        return _up_to(queries, seen, causal).expand(heads, -1, -1)

    def pairs(self, seq_len: int, heads: int, causal: bool) -> int:
        window = self.local_blocks
        return heads * _block_pairs(self.layout, self.block_size, window, self.summary_blocks, seq_len, causal)


@lru_cache(maxsize=1024)  # every layer of a network asks
def _block_pairs(layout: str, size: int, window: int, summary: int, seq_len: int, causal: bool) -> int:
    """What a head of a `BlockSparse` computes: one number for each block, none for a pair of blocks."""

    def tokens(first: Tensor, last: Tensor) -> Tensor:
        """In blocks first to last - 1, as far as there are any."""
        return (last * size).clamp(0, seq_len) - (first * size).clamp(0, seq_len)

    block = torch.arange(-(-seq_len // size), device="cpu")
    end = block + 1
    if layout == "local":
        keys = tokens(end - window, end if causal else block + window)
    else:
        start = block - block % window
        of_summaries = tokens(start + window - summary, start + window)  # of the block's own window
        if causal:
            keys = tokens(start, end) + start // window * summary * size
        else:
            of_all = tokens(block[::window] + window - summary, block[::window] + window).sum()
            keys = tokens(start, start + window) + of_all - of_summaries
    own = tokens(block, end)
    upper_triangles = own * (own - 1) // 2 if causal else 0
    return int((own * keys - upper_triangles).sum())


def _up_to(queries: Tensor, seen: Tensor, causal: bool) -> Tensor:
    """`seen`, (..., Q, N), without the keys after each query's own position if causal."""
    if not causal:
        return seen
    return seen.masked_fill(torch.arange(seen.shape[-1]) > queries[:, None], 0)


def square(length: int, causal: bool) -> int:
    """Query-key pairs of `length` queries on as many keys."""
    return length * (length + 1) // 2 if causal else length * length
