"""`longnet pattern`: the text for the terminal, the figure's file, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longnet_kit import attention, recipe
from longnet_kit.attention.patterns import BlockSparse, Dense, Dilated, Pattern
from longnet_kit.recipe import Recipe
from longnet_kit.report import pattern_panels, pattern_text
from longnet_kit.report.pattern import draw
from tests.attention.oracle import dilated_options

pytestmark = pytest.mark.filterwarnings("ignore:no branch has dilation rate 1")
QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
SMALL = ["model.attention.segment_lengths=[4,8,16]", "model.attention.dilation_rates=[1,2,4]"]


def load(*overrides: str) -> Recipe:
    return recipe.load(QUICKSTART, list(overrides))


class Skewed(Pattern):
    """Heads 0 and 2 see one thing, head 1 another; written as a plug-in would."""

    def multiplicity(self, seq_len: int, heads: int, causal: bool) -> Tensor:
        m = torch.ones(heads, seq_len, seq_len, dtype=torch.int32).tril()
        m[1::2, -1, 0] = 0
        return m


def parsed(picture: list[str]) -> Tensor:
    """The multiplicities that a drawing shows."""
    return torch.tensor([[0 if mark == "·" else int(mark) for mark in row] for row in picture], dtype=torch.int32)


@given(options=dilated_options(), seq_len=st.integers(1, 40), heads=st.integers(1, 8), causal=st.booleans())
def test_every_head_is_in_one_group_and_sees_what_the_group_sees(
    options: dict[str, Any], seq_len: int, heads: int, causal: bool
) -> None:
    pattern = Dilated(**options)
    groups = pattern_panels.alike(pattern, seq_len, heads, causal)
    assert sorted(head for group in groups for head in group) == list(range(heads))
    parts = torch.stack([pattern.branch_multiplicity(b, seq_len, heads, causal) for b in pattern.branches], 1)
    firsts = [parts[group[0]] for group in groups]
    assert all(torch.equal(parts[head], first) for group, first in zip(groups, firsts, strict=True) for head in group)
    assert all(not torch.equal(a, b) for i, a in enumerate(firsts) for b in firsts[:i])


def test_heads_of_other_patterns_are_grouped_too() -> None:
    assert pattern_panels.alike(Dense(), 8, 3, True) == [[0, 1, 2]]
    assert pattern_panels.alike(BlockSparse(), 8, 3, True) == [[0, 1, 2]]
    assert pattern_panels.alike(Skewed(), 8, 5, True) == [[0, 2, 4], [1, 3]]


def test_groups_have_names() -> None:
    names = [pattern_panels.name(group, 16) for group in ([3], [0, 4], list(range(16)), list(range(1, 16, 2)))]
    assert names == ["head 3", "heads 0, 4", "all 16 heads", "heads 1, 3, 5, … 15 (8)"]
    assert pattern_panels.name([0], 1) == "head 0"


@given(options=dilated_options(), seq_len=st.integers(1, 40), heads=st.integers(1, 5), causal=st.booleans())
def test_the_text_shows_every_branch_and_the_mixture_of_every_head(
    options: dict[str, Any], seq_len: int, heads: int, causal: bool
) -> None:
    pattern = Dilated(**options)
    text = pattern_text.draw_heads(pattern, seq_len, heads, causal, most=heads)
    blocks = text.split("\n\n")
    for group in pattern_panels.alike(pattern, seq_len, heads, causal):
        assert blocks.pop(0).startswith(pattern_panels.name(group, heads) + ": residues ")
        parts = [pattern.branch_multiplicity(b, seq_len, heads, causal) for b in pattern.branches]
        shown = [m[group[0]] for m in parts]
        titles = [f"({w}, {r})" for w, r in pattern.branches]
        if len(parts) > 1:
            shown.append(pattern.multiplicity(seq_len, heads, causal)[group[0]])
            titles.append("mixed")
        while shown:
            lines = blocks.pop(0).split("\n")
            assert max(map(len, lines)) <= 120
            assert len(lines) == seq_len + 1
            columns = list(zip(*(line.split() for line in lines[1:]), strict=True))
            assert lines[0].split("   ")[0].strip() == titles[0]
            for column in columns:
                assert torch.equal(parsed(list(column)), shown.pop(0).clamp(max=9))
                titles.pop(0)
    assert not blocks


def test_the_residues_of_a_group_are_named() -> None:
    text = pattern_text.draw_heads(Dilated([4, 8], [1, 2]), 8, 4, True, most=8)
    assert [line for line in text.split("\n") if "residues" in line] == [
        "heads 0, 2: residues 0 mod 1, 0 mod 2",
        "heads 1, 3: residues 0 mod 1, 1 mod 2",
    ]
    (line,) = pattern_text.draw_heads(Dilated([4], [8]), 1, 3, True, most=1).split("\n\n")[-1:]
    assert line == "... and 2 more, which see other keys"
    assert "heads 1, 2: residues 1 or 2 mod 8" in pattern_text.draw_heads(Dilated([4], [8]), 1, 3, True, most=8)


def test_titles_wider_than_the_picture_keep_the_columns_apart() -> None:
    lines = pattern_text.side_by_side(pattern_text.panels(Dilated([4, 8], [1, 2]), 1, 2, True, 0)).split("\n")
    assert lines == ["(4, 1)   (8, 2)   mixed", "1        1        2"]


def test_the_recipes_pattern_is_drawn_under_what_it_is() -> None:
    text = draw(load(*SMALL))
    assert text.startswith(
        "dilated, 4 heads, causal, 16 tokens\n\nhead 0: residues 0 mod 1, 0 mod 2, 0 mod 4\n\n(4, 1)  "
    )
    last = pattern_text.panels(Dilated([4, 8, 16], [1, 2, 4]), 16, 4, True, 3)
    assert pattern_text.side_by_side(last) in text
    assert "shows more" not in text and "figure" not in text
    r = load(*SMALL)
    r.model.causal = False
    assert "not causal" in draw(r, 4) and "1111\n1111" in draw(r, 4)


def test_the_union_shows_each_key_once(tmp_path: Path) -> None:
    text = draw(load(*SMALL, "model.attention.overlap=set"), 16, tmp_path / "a.png")
    assert "union" in text and "mixed" not in text and "2" not in text.split("\n\n")[2].split("\n", 1)[1]


@pytest.mark.parametrize("mixing", ["equal", "learned"])
def test_weights_of_the_branches_own_are_told_of(mixing: str, tmp_path: Path) -> None:
    text = draw(load(*SMALL, f"model.attention.mixing={mixing}"), 16, tmp_path / "a.svg")
    note = "each branch has a softmax and a weight of its own: mixed is in how many of them a key is"
    assert f"note: {note}" in text and note in (tmp_path / "a.svg").read_text()
    assert "weight of its own" not in draw(load(*SMALL))


def test_a_pattern_without_branches_is_drawn_alone() -> None:
    assert draw(load("model.attention.backend=sdpa"), 3) == (
        "sdpa, 4 heads, causal, 3 tokens\n\nall 4 heads\n\n1··\n11·\n111"
    )


@pytest.mark.parametrize(
    ("overrides", "length", "words"),
    [
        ([], 16, "longer than 16 tokens (the shortest has 256). This shows more: length=1024 --output pattern.png, or "
                 "model.attention.segment_lengths=[4,8,16]"),
        ([], 256, ""),
        ([], 1, "longer than 1 token (the shortest has 256). This shows more: length=1024 --output pattern.png"),
        (["model.attention.segment_lengths=[131072,262144,1048576]"], 16,
         "This shows more: model.attention.segment_lengths=[2,4,16]"),
        (["model.attention.backend=naive",
          "model.attention.pattern={kind: dilated, segment_lengths: [64], dilation_rates: [1]}"], 32,
         "model.attention.pattern.segment_lengths=[32]"),
        (["model.attention.backend=naive"], 16, ""),
        (["model.attention.backend=xformers"], 32, "One window (4 blocks of 64) holds 32 tokens. This shows more: "
                                                   "length=1024 --output"),
        (["model.attention.backend=xformers"], 300, ""),
    ],
)  # fmt: skip
def test_a_length_that_shows_nothing_of_the_pattern_is_noted(overrides: list[str], length: int, words: str) -> None:
    text = draw(load(*overrides), length)
    assert words in text and ("shows more" in text) == bool(words)


def test_what_a_note_proposes_shows_more() -> None:
    scaled = draw(load("model.attention.segment_lengths=[4,8,16]"), 16)
    assert "shows more" not in scaled and "shows more" not in draw(load(), 1024)


def test_what_is_too_wide_for_a_terminal_is_offered_as_a_figure(tmp_path: Path) -> None:
    assert "(4, 1)" in draw(load(*SMALL), 64)
    text = draw(load(*SMALL), 65)
    assert "up to 64 tokens" in text and "--output pattern.png" in text and "·" not in text
    assert "too wide" not in draw(load(*SMALL), 65, tmp_path / "a.png")


@pytest.mark.parametrize(
    ("name", "begins"), [("a.png", b"\x89PNG"), ("a.PNG", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml")]
)
def test_the_figure_is_written_in_the_format_of_its_name(tmp_path: Path, name: str, begins: bytes) -> None:
    text = draw(load(*SMALL), 16, tmp_path / name)
    assert text.endswith(f"figure: {tmp_path / name}") and "mixed" in text
    assert (tmp_path / name).read_bytes().startswith(begins)


@pytest.mark.parametrize("name", ["a.gif", "a", "png", "missing/a.png", "folder.png"])
def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match=r"\.png, \.pdf, \.svg|name a file in a folder that exists"):
        draw(load(*SMALL), 4, tmp_path / name)


@pytest.mark.parametrize("length", [0, -3, 65_537])
def test_a_length_that_cannot_be_drawn_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"length is {length}; a pattern can be drawn for 1 to 65536"):
        draw(load(*SMALL), length)


def test_a_backend_without_a_pattern_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mean(attention.AttentionBackend):
        def forward(self, q, k, v, causal=True, key_padding_mask=None):  # type: ignore[no-untyped-def]
            return v.cumsum(1)

    monkeypatch.setattr(attention.registry, "_classes", {**attention.registry._classes, "mean": Mean})
    with pytest.raises(ValueError, match="'mean' has no pattern to draw"):
        draw(load("model.attention.backend=mean"))
