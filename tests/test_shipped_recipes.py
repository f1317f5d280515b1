"""The shipped recipes: that they load, say what they are, and have the paper's settings."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import yaml

from longnet_kit import model, recipe, shipped

SHIPPED = shipped.names()
PAPER = [name for name in SHIPPED if name.startswith("paper/")]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_loads_and_says_what_it_is(name: str) -> None:
    r = recipe.load(name)
    assert r.description
    assert "\n" not in r.description
    assert len(r.description) <= 100
    assert not r.notes
    assert recipe.load(shipped.find(name)) == r
    own = yaml.safe_load(shipped.find(name).read_text())
    assert {"name", "description"} <= own.keys(), "a run or a line in the list would be taken for another recipe's"


def test_no_two_shipped_recipes_share_a_run_directory() -> None:
    names = [recipe.load(name).name for name in SHIPPED]
    assert len(set(names)) == len(names)


def test_the_quickstart_is_the_one_of_the_design() -> None:
    r = recipe.load("quickstart")
    assert r.model == recipe.Model(
        dim=128,
        layers=4,
        heads=4,
        ffn_dim=512,
        dropout=0.0,
        positions="rope",
        causal=True,
        attention={
            "backend": "dilated",
            "segment_lengths": [256, 512, 1024],
            "dilation_rates": [1, 2, 4],
            "head_offsets": "interleaved",
            "overlap": "multiset",
            "mixing": "denominators",
        },
    )
    assert (r.data.source, r.data.tokenizer, r.data.seq_len, r.data.batch_size) == ("python_stdlib", "bytes", 1024, 8)
    assert (r.optimizer.lr, r.optimizer.betas, r.optimizer.weight_decay) == (3e-3, (0.9, 0.98), 0.01)
    assert (r.trainer["max_steps"], r.trainer["devices"], r.trainer["precision"]) == (250, 1, "32-true")
    assert r.checkpoint == recipe.Checkpoint(every_n_steps=500, keep=3)
    assert r.strategy == recipe.Strategy(name="auto", sequence_parallel_size=1)


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("backends/")])
def test_the_backends_run_the_quickstart_and_differ_in_the_attention_alone(name: str) -> None:
    r, quickstart = recipe.load(name), recipe.load("quickstart")
    assert r.model.attention["backend"] == name.removeprefix("backends/")
    same = dataclasses.replace(r.model, attention=quickstart.model.attention)
    assert dataclasses.replace(r, name=quickstart.name, description=quickstart.description, model=same) == quickstart


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models_have_its_size_and_batch(name: str) -> None:
    r = recipe.load(name)
    batch = r.data.batch_size * r.trainer["devices"] * r.trainer["accumulate_grad_batches"]
    assert batch * r.data.seq_len == 2**19, "0.5M tokens in an optimizer step"
    assert name.endswith(f"_{r.data.seq_len // 1024}k")
    with torch.device("meta"):
        network = model.build(r.model, 100_277, r.data.seq_len, dtype=torch.bfloat16)
    assert next(network.parameters()).is_meta
    body = sum(p.numel() for p in network.parameters()) - 100_277 * 768
    # Four matrices of the attention and two of the feed-forward per layer; the rest are biases and layer norms.
    assert 12 * (4 * 768**2 + 2 * 768 * 3072) < body < 1.01 * 12 * (4 * 768**2 + 2 * 768 * 3072)


def test_the_papers_recipes_cover_what_it_compares() -> None:
    trained = {"transformer": [2], "sparse": [8, 16, 32], "longnet": [8, 16, 32]}
    assert set(PAPER) == {f"paper/{kind}_{k}k" for kind, lengths in trained.items() for k in lengths}
    backends = {"transformer": "sdpa", "sparse": "xformers", "longnet": "dilated"}
    for name in PAPER:
        kind = name.removeprefix("paper/").partition("_")[0]
        assert recipe.load(name).model.attention["backend"] == backends[kind]
