"""Which items are axes, and what their cells are called."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from longnet_kit import recipe_files, sweep_grid
from longnet_kit.recipe_yaml import Dumper

SCALARS = (
    st.none() | st.booleans() | st.integers(-5, 999) | st.floats(-2, 2) | st.text("ab,:'\"[]{}#\\ .-+A_é1", max_size=8)
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=5,
)


def written(value: Any) -> str:
    """A value as YAML in one line; text with commas in quotes, as in a list."""
    text = yaml.dump([value], Dumper=Dumper, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.strip()[1:-1]


def distinct(values: list[Any]) -> list[Any]:
    kept: list[Any] = []
    for value in values:
        if not any(sweep_grid._is_same(value, other) for other in kept):
            kept.append(value)
    return kept


def values_of(items: list[str]) -> dict[str, Any]:
    layer, problems = recipe_files.parse_dotlist(items)
    assert not problems
    return layer.values


@given(st.lists(VALUES, min_size=1, max_size=4))
@example(["it's", "a, b", {"a": ["it's", 'say "x, y"']}, [["]", "{,"]]])
def test_what_commas_join_they_part(values: list[Any]) -> None:
    texts = [written(value) for value in values]
    assert sweep_grid.split(",".join(texts)) == texts
    assert sweep_grid.split(" , ".join(texts)) == texts


def test_commas_in_brackets_and_quotes_part_nothing() -> None:
    assert sweep_grid.split("{backend: dilated, segment_lengths: [64, 128]},{backend: sdpa}") == [
        "{backend: dilated, segment_lengths: [64, 128]}",
        "{backend: sdpa}",
    ]
    assert sweep_grid.split("[1, 2],[3]") == ["[1, 2]", "[3]"]
    assert sweep_grid.split("""'it''s, so',"a\\", b",it's,c""") == ["'it''s, so'", '"a\\", b"', "it's", "c"]
    assert sweep_grid.split("src/[ab,c].py,b") == ["src/[ab,c].py", "b"]
    assert sweep_grid.split("[1, 2") == ["[1, 2"]  # the recipe says what is wrong with it
    assert sweep_grid.split("a],b") == ["a]", "b"]
    assert sweep_grid.split("") == [""]


def test_a_grid_has_every_combination_the_last_axis_fastest() -> None:
    grid = sweep_grid.parse(["trainer.max_steps=4", "model.attention.backend=naive,sdpa", "data.seq_len=128, 256"])
    cells = grid.cells()
    assert [cell.label for cell in cells] == [
        f"backend={backend} seq_len={length}" for backend in ("naive", "sdpa") for length in (128, 256)
    ]
    assert [cell.name for cell in cells][1] == "backend-naive+seq_len-256"
    assert cells[2].items == ["trainer.max_steps=4", "data.seq_len=128", "model.attention.backend=sdpa"]
    assert grid.fixed == ["trainer.max_steps=4"] and grid.name is None


def test_a_grid_may_be_one_cell() -> None:
    (cell,) = sweep_grid.parse(["model.dim=8", "name=mine"]).cells()
    assert cell.items == ["model.dim=8"] and cell.name == "cell"
    assert sweep_grid.parse(["name=mine"]).name == "mine"
    assert sweep_grid.parse([]).cells()[0].items == []


def test_a_mapping_comes_before_the_keys_inside_it() -> None:
    grid = sweep_grid.parse(["model.attention.dropout=0.5", "model.attention={backend: naive},{backend: sdpa}"])
    for cell, backend in zip(grid.cells(), ("naive", "sdpa"), strict=True):
        assert values_of(cell.items) == {"model": {"attention": {"backend": backend, "dropout": 0.5}}}


def test_keys_are_short_where_that_is_clear() -> None:
    keys = ["model.dim", "other.dim", "data.seq_len", "lr", "optimizer.lr"]
    assert list(sweep_grid.short_keys(keys).values()) == ["model.dim", "other.dim", "seq_len", "lr", "optimizer.lr"]


@given(st.lists(VALUES, min_size=1, max_size=5), st.lists(VALUES, min_size=1, max_size=3), st.integers(20, 100))
@example(["x+b-y", "x"], ["z", "y"], 100)
@example(["README.md", "readme.md"], ["a", "A"], 100)
@example(["1", 1, True, "true", None, "null", ""], [0.5, "0.5"], 100)
def test_two_cells_never_share_a_name(first: list[Any], second: list[Any], room: int) -> None:
    first, second = distinct(first), distinct(second)
    items = [
        f"{key}={','.join(map(written, values))}"
        for key, values in (("m.a", first), ("m.b", second))
        if len(values) > 1
    ]
    grid = sweep_grid.parse(items)
    cells = grid.cells(room)
    assert len(cells) == (len(first) if len(first) > 1 else 1) * (len(second) if len(second) > 1 else 1)
    names = [cell.name for cell in cells]
    assert len({name.casefold() for name in names}) == len(names)  # folders of some systems know no case
    for name in names:
        assert len(name) <= room and re.fullmatch(r"\w[\w.+-]*", name) and ".." not in name and name.isascii()
        assert not name.endswith(".")
    assert next(cell.name for cell in sweep_grid.parse(items[::-1]).cells(room)) == names[0]


def test_a_name_does_not_depend_on_the_other_cells() -> None:
    few = sweep_grid.parse(["model.dim=8,16", "optimizer.lr=1e-3,0.5"]).cells()
    more = sweep_grid.parse(["optimizer.lr=0.5, 0.001,2", "model.dim=32,16,8"]).cells()
    assert {cell.name for cell in few} < {cell.name for cell in more}
    assert few[0].name == "dim-8+lr-0.001"


@pytest.mark.parametrize(
    ("items", "told"),
    [
        (["model.dim=8,16,8"], r"model\.dim: got 8 twice"),
        (["optimizer.lr=1,1.0"], "got 1.0 twice"),
        (["optimizer.lr=1e-3,0.001"], "got 0.001 twice"),
        (["model.dim=8,16", "model.dim=4"], r"model\.dim: stands twice.*model\.dim=a,b"),
        (["model.dim=8", "model.dim=8"], "stands twice"),
        (["name=a,b"], "name: got a, b; every cell is a run with a name of its own"),
        (["resume=auto"], "resume: got auto; a sweep goes on with every run by itself"),
        (["resume=auto,null"], "resume: got auto, null"),
        (["model.dim=8,"], "an empty value"),
        (["model.dim=,"], "an empty value"),
        (["model.dim=[1,}"], "not a YAML value"),
        (["model.dim={a: 1, a: 2},3"], "stands twice in one mapping"),
        (["model.dim"], "expected key.path=value"),
        (["--model.dim=1,2"], r"write model\.dim=\.\.\."),
        (["extends=a,b"], "only a recipe file can extend another"),
        (["a=1,1", "b=2,2"], r"2 problems\n  a: got 1 twice.*\n  b: got 2 twice"),
    ],
)
def test_what_is_no_grid_is_refused(items: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        sweep_grid.parse(items)


def test_true_is_not_one() -> None:
    assert len(sweep_grid.parse(["model.causal=true,1"]).cells()) == 2
