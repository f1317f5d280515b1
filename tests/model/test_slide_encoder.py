"""The slide encoder with GigaPath's weights gives what its definition says, by a forward pass written out from it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from longnet_kit import attention, weights
from longnet_kit.model import SlideEncoder, Transformer, slide_encoder, slide_weights
from tests.model import torchscale_encoder
from tests.model.torchscale_encoder import State

IN, DIM, HEADS, FFN, LAYERS, GRID, TILE = 10, 24, 3, 40, 2, 5, 256
BRANCHES = [(4, 1), (8, 2), (16, 4)]


def state(prefix: str = "", places: bool = False, seed: int = 0) -> State:
    """Random weights in GigaPath's layout."""
    draw = torchscale_encoder.drawing(seed)
    made = {"cls_token": draw(1, 1, DIM)} | torchscale_encoder.of_linear(draw, "patch_embed.proj", DIM, IN)
    made |= torchscale_encoder.of_layers(draw, LAYERS, DIM, FFN)
    for name in ("encoder.layer_norm", "norm"):
        made |= torchscale_encoder.of_norm(draw, name, DIM)
    if places:
        made["pos_embed"] = torch.tensor([[0.0] * DIM] + [place(i, j) for i in range(GRID) for j in range(GRID)])[None]
    return {prefix + key: x for key, x in made.items()}


def place(first: int, second: int) -> list[float]:
    """The embedding of the grid's cell (first, second)."""
    found = []
    for p in (second, first):
        angles = [p / 10_000 ** (i / (DIM // 4)) for i in range(DIM // 4)]
        found += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return found


def expected(w: State, features: Tensor, coordinates: Tensor) -> tuple[list[Tensor], Tensor]:
    """Of one slide, (N, IN) and (N, 2): the states before each layer and after the last, and the normed last one."""
    cells = (coordinates // TILE).long().tolist()
    tiles = torchscale_encoder.project(w, features, "patch_embed.proj") + torch.tensor(
        [place(*c) for c in cells], dtype=torch.float64
    )
    x = torch.cat((w["cls_token"][0], tiles))
    states = torchscale_encoder.states(w, x, LAYERS, HEADS, BRANCHES)
    return states, torchscale_encoder.norm(w, states[-1], "encoder.layer_norm")


def pooled(w: State, x: Tensor, pooling: str) -> Tensor:
    x = x[0] if pooling == "cls" else x[1:].mean(0)
    return layer_norm(x, x.shape, w["norm.weight"], w["norm.bias"], eps=1e-6)


def slide(tiles: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Features and coordinates of a slide, somewhere in their tiles."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(tiles, IN, generator=generator, dtype=torch.float64)
    return features, torch.randint(GRID * TILE, (tiles, 2), generator=generator)


def network(**options: Any) -> SlideEncoder:
    lengths, rates = (list(numbers) for numbers in zip(*BRANCHES, strict=True))
    branches = {"backend": "dilated", "segment_lengths": lengths, "dilation_rates": rates, "head_offsets": "grouped"}
    sizes: dict[str, Any] = {"dim": DIM, "layers": LAYERS, "heads": HEADS, "ffn_dim": FFN, "grid": GRID}
    torch.manual_seed(9)
    return SlideEncoder(options.pop("in_dim", IN), **{**sizes, "attention": branches, **options}).double().eval()


def loaded(given: State, **options: Any) -> SlideEncoder:
    model = network(**options)
    model.load_state_dict(slide_weights.convert(given, model))
    return model


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize(("prefix", "places"), [("", False), ("", True), ("slide_encoder.", True)])
@pytest.mark.parametrize("tiles", [15, 31])  # with the class token, whole segments of every branch
def test_the_vector_is_gigapaths(pooling: str, prefix: str, places: bool, tiles: int) -> None:
    model = loaded(state(prefix, places), pooling=pooling)
    features, coordinates = slide(tiles)
    states, last = expected(state(), features, coordinates)
    with torch.no_grad():
        found = model(features[None], coordinates[None])
        layers = model.layer_vectors(features[None], coordinates[None])
    assert found.shape == (1, DIM) and layers.shape == (LAYERS + 1, 1, DIM)
    assert (found[0] - pooled(state(), last, pooling)).abs().max() < 1e-10
    for vector, x in zip(layers, states, strict=True):
        assert (vector[0] - pooled(state(), x, pooling)).abs().max() < 1e-10


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("tiles", [1, 4, 16, 22])
def test_any_number_of_tiles_and_padding_of_any_content_give_the_definition(pooling: str, tiles: int) -> None:
    model = loaded(state(), pooling=pooling)
    one, other = slide(tiles), slide(23, seed=2)
    features = torch.full((2, 23, IN), torch.nan, dtype=torch.float64)
    coordinates = torch.full((2, 23, 2), -7)
    mask = torch.zeros(2, 23, dtype=torch.bool)
    for i, (given, places) in enumerate((one, other)):
        features[i, : len(given)], coordinates[i, : len(given)], mask[i, : len(given)] = given, places, True
    features.requires_grad_()
    found = model(features, coordinates, mask)
    for vector, (given, places) in zip(found, (one, other), strict=True):
        assert (vector - pooled(state(), expected(state(), given, places)[1], pooling)).abs().max() < 1e-10
    found.square().sum().backward()
    assert features.grad is not None and features.grad.isfinite().all()
    assert not features.grad[~mask].any() and features.grad[:, 0].any(-1).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_weights_load_takes_gigapaths_file(tmp_path: Path) -> None:
    torch.save({"model": state(places=True)}, tmp_path / "slide_encoder.pth")
    model = network()
    weights.load(model, tmp_path / "slide_encoder.pth")
    for name, x in loaded(state()).state_dict().items():
        assert torch.equal(model.state_dict()[name], x), name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim": 36}, r"do not fit: cls_token is \(1, 1, 24\) there and \(1, 1, 36\) here.* and \d+ more"),
        ({"in_dim": 11}, r"do not fit: patch_embed.proj.weight is \(24, 10\) there and \(24, 11\) here"),
        ({"layers": 3}, r"are missing: encoder.layers.2.self_attn.q_proj.weight.* and \d+ more"),
        ({"layers": 1}, r"are left over: encoder.layers.1.self_attn.k_proj.weight.* and \d+ more"),
        ({"ffn_dim": 41}, r"do not fit: encoder.layers.0.ffn.fc1.weight is \(40, 24\) there and \(41, 24\) here"),
        ({"grid": 6}, r"do not fit: pos_embed is \(1, 26, 24\) there and \(1, 37, 24\) here; build the encoder with"),
    ],
)
def test_weights_of_another_encoder_name_what_differs(options: dict, words: str, tmp_path: Path) -> None:
    torch.save({"model": state(places=True)}, tmp_path / "slide_encoder.pth")
    with pytest.raises(ValueError, match=f"slide_encoder.pth: the slide encoder's weights {words}"):
        weights.load(network(**options), tmp_path / "slide_encoder.pth")


def test_keys_that_are_missing_or_nobody_knows_are_named() -> None:
    given = state()
    given["head.weight"] = given.pop("norm.bias")
    with pytest.raises(ValueError, match="the slide encoder's weights are missing: norm.bias$"):
        slide_weights.convert(given, network())
    given["norm.bias"] = given["head.weight"]
    with pytest.raises(ValueError, match="the slide encoder's weights are left over: head.weight$"):
        slide_weights.convert(given, network())


@pytest.mark.parametrize("spoilt", [(0, 3), (7, 2), (7, 20)])
def test_places_that_were_trained_are_refused(spoilt: tuple[int, int]) -> None:
    given = state(places=True)
    given["pos_embed"][0, *spoilt] += 0.1
    with pytest.raises(ValueError, match="pos_embed there is not the sines and cosines"):
        slide_weights.convert(given, network())


def test_weights_go_into_a_network_of_their_kind_alone() -> None:
    other = Transformer(7, dim=8, layers=1, heads=2, ffn_dim=8, seq_len=8, attention={"backend": "naive"})
    with pytest.raises(ValueError, match="weights of a slide encoder, and this network is a Transformer"):
        slide_weights.convert(state(), other)


@pytest.mark.parametrize(
    ("coordinates", "words"),
    [
        (
            [[0, 0], [0, 5 * TILE]],
            r"a tile stands at \(0, 1280\), and coordinates are 0 to below 1,280 \(5 tiles of 256\)",
        ),
        ([[-1.0, 0], [0, 0]], r"a tile stands at \(-1.0, 0.0\)"),
        ([[math.nan, 0], [0, 0]], r"a tile stands at \(nan, 0.0\)"),
        ([[0, 0]], r"coordinates has shape \(1, 1, 2\), expected \(1, 2, 2\)"),
    ],
)
def test_tiles_beyond_the_grid_are_named(coordinates: list, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        network()(torch.zeros(1, 2, IN).double(), torch.tensor([coordinates]))


def test_what_cannot_be_encoded_is_refused_at_the_door() -> None:
    model, features, coordinates = network(), torch.zeros(1, 2, IN).double(), torch.zeros(1, 2, 2)
    with pytest.raises(ValueError, match=r"features has shape \(1, 2, 9\), expected \(batch, at least one tile, 10\)"):
        model(features[..., 1:], coordinates)
    with pytest.raises(ValueError, match=r"key_padding_mask is torch.float32 of shape \(1, 2\), expected torch.bool"):
        model(features, coordinates, torch.ones(1, 2))
    with pytest.raises(ValueError, match="leaves a slide without a tile"):
        model(features, coordinates, torch.zeros(1, 2, dtype=torch.bool))
    for options, words in (
        ({"dim": 25}, "dim is 25 and heads is 3; dim must be a multiple of heads and of 4"),
        ({"layers": 0}, "layers is 0, expected at least 1"),
        ({"pooling": "max"}, "pooling is 'max', expected 'cls' or 'mean'"),
    ):
        with pytest.raises(ValueError, match=words):
            network(**options)
    with pytest.raises(ValueError, match="slides of 4096 have at most 256 tiles of 256, and the shortest segment is"):
        slide_encoder.slide_attention(4096)


def test_the_published_attention() -> None:
    found = slide_encoder.slide_attention()
    assert found["segment_lengths"] == [1024, 5792, 32768, 185363, 1048576]
    assert attention.build(found).branches == list(zip(found["segment_lengths"], [1, 2, 4, 8, 16], strict=True))


def test_the_defaults_are_the_published_architecture() -> None:
    with torch.device("meta"):
        model = SlideEncoder()
    assert [len(model.blocks), model.embed.in_features, model.embed.out_features] == [12, 1536, 768]
    assert sum(p.numel() for p in model.parameters()) == 86_330_880
