from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longnet_kit.attention import patterns
from tests.attention.oracle import dilated_options

pytestmark = pytest.mark.filterwarnings("ignore:no branch has dilation rate 1")


def kept(pattern: patterns.Dilated, branch: int, seq_len: int, heads: int) -> list[list[int]]:
    keeps = pattern.keeps(pattern.branches[branch], seq_len, heads)
    return [row.nonzero().flatten().tolist() for row in keeps]


def test_heads_keep_the_positions_of_the_paper() -> None:
    pattern = patterns.Dilated([4, 8, 16], [1, 2, 4])
    assert kept(pattern, 0, 16, 2) == [list(range(16))] * 2
    assert kept(pattern, 1, 16, 2) == [[0, 2, 4, 6, 8, 10, 12, 14], [1, 3, 5, 7, 9, 11, 13, 15]]
    assert kept(pattern, 2, 16, 4) == [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]]


def test_offsets_restart_in_every_segment_when_w_is_no_multiple_of_r() -> None:
    pattern = patterns.Dilated([5], [3])
    assert kept(pattern, 0, 12, 3) == [[0, 3, 5, 8, 10], [1, 4, 6, 9, 11], [2, 7]]


def test_head_offsets_are_interleaved_or_grouped_or_none() -> None:
    interleaved, grouped = patterns.Dilated([8], [2]), patterns.Dilated([8], [2], "grouped")
    assert [interleaved.offset(h, 2, 5) for h in range(5)] == [0, 1, 0, 1, 0]
    assert [grouped.offset(h, 2, 5) for h in range(5)] == [0, 0, 0, 1, 1]
    none = patterns.Dilated([8], [2], "none")
    assert [none.offset(h, 2, 5) for h in range(5)] == [0] * 5
    assert none.keeps((8, 2), 10, 3).tolist() == [[True, False] * 5] * 3


def test_multiplicity_counts_the_branches_that_show_a_key() -> None:
    m = patterns.Dilated([4, 8], [1, 2]).multiplicity(8, 2, causal=True)
    assert m[0, 2].tolist() == [2, 1, 2, 0, 0, 0, 0, 0]
    assert m[0, 6].tolist() == [1, 0, 1, 0, 2, 1, 2, 0]
    assert m[1, 6].tolist() == [0, 0, 0, 0, 1, 1, 1, 0]


def test_a_repeated_branch_counts_twice() -> None:
    once, twice = patterns.Dilated([4], [1]), patterns.Dilated([4, 4], [1, 1])
    assert torch.equal(2 * once.multiplicity(6, 1, False), twice.multiplicity(6, 1, False))


def test_fixed_blocks_see_their_window_and_the_summaries_of_earlier_ones() -> None:
    pattern = patterns.BlockSparse("fixed", block_size=1, local_blocks=3, summary_blocks=1)
    assert pattern.multiplicity(7, 1, True)[0, 6].tolist() == [0, 0, 1, 0, 0, 1, 1]
    assert pattern.multiplicity(7, 1, True)[0, 4].tolist() == [0, 0, 1, 1, 1, 0, 0]
    assert pattern.multiplicity(7, 1, False)[0, 4].tolist() == [0, 0, 1, 1, 1, 1, 0]


def test_local_blocks_see_a_window_and_causality_is_by_token() -> None:
    pattern = patterns.BlockSparse("local", block_size=2, local_blocks=2)
    assert pattern.multiplicity(7, 1, True)[0, 4].tolist() == [0, 0, 1, 1, 1, 0, 0]
    assert pattern.multiplicity(7, 1, False)[0, 4].tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert pattern.multiplicity(9, 1, False)[0, 2].tolist() == [1, 1, 1, 1, 1, 1, 0, 0, 0]


@st.composite
def any_pattern(draw: st.DrawFn) -> patterns.Pattern:
    """A built-in pattern, or one that writes only `multiplicity`."""
    kind = draw(st.sampled_from(["dense", "dilated", "local", "fixed", "plug-in"]))
    if kind == "dense":
        return patterns.Dense()
    if kind == "dilated":
        return patterns.Dilated(**draw(dilated_options()))  # type: ignore[arg-type]
    if kind == "plug-in":
        return Backwards()
    local = draw(st.integers(1, 5))
    return patterns.BlockSparse(kind, draw(st.integers(1, 9)), local, draw(st.integers(1, local)))  # type: ignore[arg-type]


class Backwards(patterns.Pattern):
    """Head h sees every key h + 1 times; written as a plug-in would."""

    def multiplicity(self, seq_len: int, heads: int, causal: bool) -> torch.Tensor:
        m = torch.arange(1, heads + 1, dtype=torch.int32)[:, None, None].expand(heads, seq_len, seq_len)
        return m.tril() if causal else m


@given(
    pattern=any_pattern(),
    seq_len=st.integers(1, 60),
    heads=st.integers(1, 7),
    causal=st.booleans(),
    chosen=st.lists(st.integers(0, 59), max_size=9),
)
def test_rows_are_those_of_the_matrix(
    pattern: patterns.Pattern, seq_len: int, heads: int, causal: bool, chosen: list[int]
) -> None:
    queries = torch.tensor([p % seq_len for p in chosen], dtype=torch.int64)
    found = pattern.rows(queries, seq_len, heads, causal)
    assert found.dtype == torch.int32
    assert torch.equal(found, pattern.multiplicity(seq_len, heads, causal)[:, queries])


@given(options=dilated_options(), seq_len=st.integers(1, 60), heads=st.integers(1, 7), causal=st.booleans())
def test_a_dilated_pattern_is_what_its_definition_says(options: dict, seq_len: int, heads: int, causal: bool) -> None:
    pattern = patterns.Dilated(**options)
    expected = torch.zeros(len(pattern.branches), heads, seq_len, seq_len, dtype=torch.int32)
    for i, (w, r) in enumerate(pattern.branches):
        for h in range(heads):
            o = {"interleaved": h % r, "grouped": h // -(-heads // r), "none": 0}[pattern.head_offsets]
            kept = [p for p in range(seq_len) if p % w % r == o]
            for p in kept:
                seen = [other for other in kept if other // w == p // w and (other <= p or not causal)]
                expected[i, h, p, seen] = 1
        assert torch.equal(pattern.branch_multiplicity((w, r), seq_len, heads, causal), expected[i])
        last = torch.tensor([seq_len - 1])
        assert torch.equal(pattern.branch_rows((w, r), last, seq_len, heads, causal), expected[i][:, -1:])
    assert torch.equal(pattern.multiplicity(seq_len, heads, causal), expected.sum(0))


def test_rows_of_a_long_sequence_need_no_square() -> None:
    """A million tokens: the matrix would have 10^12 entries."""
    queries = torch.tensor([0, 2**20 - 1])
    for pattern in (patterns.Dense(), patterns.Dilated([2048, 2**20], [1, 512]), patterns.BlockSparse("fixed", 64)):
        assert pattern.rows(queries, 2**20, 2, causal=True).shape == (2, 2, 2**20)


@given(options=dilated_options(), seq_len=st.integers(1, 60), heads=st.integers(1, 7), causal=st.booleans())
def test_pairs_count_what_a_dilated_pattern_shows(options: dict, seq_len: int, heads: int, causal: bool) -> None:
    pattern = patterns.Dilated(**options)
    assert pattern.pairs(seq_len, heads, causal) == pattern.multiplicity(seq_len, heads, causal).sum()


def test_pairs_of_a_long_sequence_are_counted_at_once() -> None:
    """Not block by block: that would take seconds and gigabytes here."""
    began = time.perf_counter()
    for layout in ("fixed", "local"):
        for causal in (True, False):
            assert patterns.BlockSparse(layout, block_size=64).pairs(2**19, 8, causal) > 0  # type: ignore[arg-type]
    assert time.perf_counter() - began < 1


@given(
    layout=st.sampled_from(["fixed", "local"]),
    blocks=st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 5)),
    seq_len=st.integers(1, 80),
    causal=st.booleans(),
)
def test_pairs_count_what_the_other_patterns_show(layout: str, blocks: tuple, seq_len: int, causal: bool) -> None:
    size, local, summary = blocks
    pattern = patterns.BlockSparse(layout, size, local, min(local, summary))  # type: ignore[arg-type]
    assert pattern.pairs(seq_len, 2, causal) == pattern.multiplicity(seq_len, 2, causal).sum()
    assert patterns.Dense().pairs(seq_len, 2, causal) == patterns.Dense().multiplicity(seq_len, 2, causal).sum()


def test_no_branch_of_rate_one_warns() -> None:
    with pytest.warns(UserWarning, match="outputs zero"):
        patterns.Dilated([4], [2])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"kind": "dilated", "segment_lengths": [4, 8], "dilation_rates": [1]}, "2 entries"),
        ({"kind": "dilated", "segment_lengths": [], "dilation_rates": []}, "at least one branch"),
        ({"kind": "dilated", "segment_lengths": [0], "dilation_rates": [1]}, "at least 1"),
        ({"kind": "dilated", "segment_lengths": [4], "dilation_rates": [1.5]}, "1.5"),
        ({"kind": "dilated", "segment_lengths": [4]}, "dilation_rates: missing"),
        ({"kind": "dilated", "segment_lengths": [4], "dilation_rates": [1], "head_offsets": "x"}, "interleaved"),
        ({"kind": "block_sparse", "local_blocks": 2, "summary_blocks": 3}, "above local_blocks"),
        ({"kind": "dilatd"}, "did you mean 'dilated'"),
        ({}, "kind: missing"),
    ],
)
def test_a_wrong_pattern_is_refused_by_name(config: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        patterns.build(config)
