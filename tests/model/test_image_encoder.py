"""The networks for images give, with LongViT's weights, what its definition says, by a forward pass written from it."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from longnet_kit import attention, weights
from longnet_kit.model import (
    ImageClassifier,
    ImageEncoder,
    LongViT,
    SlideEncoder,
    image_encoder,
    image_weights,
    slide_weights,
)
from tests.model import torchscale_encoder
from tests.model.torchscale_encoder import State

PATCH, SIDE, DIM, HEADS, FFN, LAYERS, CLASSES = 4, 4, 24, 3, 40, 2, 5
BRANCHES = [(4, 1), (8, 2), (16, 4)]
N = TypeVar("N", bound=nn.Module)


def state(kind: str, prefix: str = "", side: int = SIDE, seed: int = 0) -> State:
    """Random weights in LongViT's layout, `pretrained` or `finetuned`."""
    draw = torchscale_encoder.drawing(seed)
    body = {"pos_embed": draw(1, side * side, DIM), "patch_embed.proj.weight": draw(DIM, 3, PATCH, PATCH)}
    body |= {"patch_embed.proj.bias": draw(DIM)} | torchscale_encoder.of_layers(draw, LAYERS, DIM, FFN)
    if kind == "pretrained":
        body |= torchscale_encoder.of_norm(draw, "norm", DIM)
        return {prefix + key: x for key, x in body.items()}
    made = {f"model.{key}": x for key, x in body.items()} | torchscale_encoder.of_norm(draw, "fc_norm", DIM)
    made |= torchscale_encoder.of_linear(draw, "head", CLASSES, DIM)
    return {prefix + key: x for key, x in made.items()}


def dino(prefix: str = "") -> State:
    """A teacher as DINO saves it: the pre-trained network, and the head of its loss beside it."""
    made = state("pretrained", f"{prefix}backbone.")
    extra = {f"head.mlp.{i}.{name}": torch.ones(3) for i in (0, 2, 4) for name in ("weight", "bias")}
    extra |= {"head.last_layer.weight_g": torch.ones(2, 1), "head.last_layer.weight_v": torch.ones(2, 3)}
    return made | {prefix + key: x for key, x in extra.items()}


def cubic(distance: float) -> float:
    """Keys' kernel, with a = -0.75 as torch has it."""
    a, x = -0.75, abs(distance)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resampling(new: int, scale: float) -> Tensor:
    """What makes `new` values of SIDE ones along an axis, (new, SIDE): cubic, borders repeated."""
    made = torch.zeros(new, SIDE, dtype=torch.float64)
    for i in range(new):
        at = (i + 0.5) / scale - 0.5
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            made[i, min(max(j, 0), SIDE - 1)] += cubic(at - j)
    return made


def resampled(table: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(1, SIDE * SIDE, DIM) to (rows * columns, DIM)."""
    return torch.einsum("ai,bj,ijd->abd", rows, columns, table.view(SIDE, SIDE, DIM)).flatten(0, 1)


def expected(w: State, image: Tensor) -> Tensor:
    """Of one image, (3, height, width), and a backbone's weights: the states of its patches, (N, DIM)."""
    rows, columns = image.shape[1] // PATCH, image.shape[2] // PATCH
    patches = [
        image[:, i * PATCH : (i + 1) * PATCH, j * PATCH : (j + 1) * PATCH].flatten()
        for i in range(rows)
        for j in range(columns)
    ]
    places = w["pos_embed"][0]
    if (rows, columns) != (SIDE, SIDE):
        down, across = (resampling(n, (n + 0.1) / SIDE) for n in (rows, columns))
        places = resampled(w["pos_embed"], down, across)
    kernel = w["patch_embed.proj.weight"].flatten(1)
    x = linear(torch.stack(patches), kernel, w["patch_embed.proj.bias"]) + places
    return torchscale_encoder.states(w, x, LAYERS, HEADS, BRANCHES)[-1]


def vector(w: State, image: Tensor) -> Tensor:
    """A pre-trained network's of one image: the mean of the normed states."""
    return layer_norm(expected(w, image), (DIM,), w["norm.weight"], w["norm.bias"], eps=1e-6).mean(0)


def features(w: State, image: Tensor) -> Tensor:
    """A fine-tuned network's of one image: the normed mean of the states."""
    body = {key.removeprefix("model."): x for key, x in w.items()}
    return layer_norm(expected(body, image).mean(0), (DIM,), w["fc_norm.weight"], w["fc_norm.bias"], eps=1e-5)


def images(height: int, width: int, count: int = 1) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def backbone(**options: Any) -> LongViT:
    lengths, rates = (list(numbers) for numbers in zip(*BRANCHES, strict=True))
    branches = {"backend": "dilated", "segment_lengths": lengths, "dilation_rates": rates, "head_offsets": "grouped"}
    sizes: dict[str, Any] = {"patch_size": PATCH, "dim": DIM, "layers": LAYERS, "heads": HEADS, "ffn_dim": FFN}
    torch.manual_seed(9)
    return LongViT(options.pop("image_size", PATCH * SIDE), **{**sizes, "attention": branches, **options}).double()


def encoder(**options: Any) -> ImageEncoder:
    return ImageEncoder(backbone(**options)).double().eval()


def classifier(classes: int = CLASSES, **options: Any) -> ImageClassifier:
    return ImageClassifier(backbone(**options), classes).double().eval()


def loaded(given: State, network: N) -> N:
    network.load_state_dict(image_weights.convert(given, network))
    return network


SIZES = [(16, 16), (32, 32), (8, 8), (8, 32), (32, 8), (4, 4), (12, 20)]
"""The table's own side, others, as many patches in another shape, and patches that fill no whole segment."""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone."])
def test_the_vector_is_that_of_the_pretrained_network(size: tuple[int, int], prefix: str) -> None:
    given = images(*size, count=2)
    found = loaded(state("pretrained", prefix), encoder())(given)
    assert found.shape == (2, DIM)
    for i, image in enumerate(given):
        assert (found[i] - vector(state("pretrained"), image)).abs().max() < 1e-10


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_logits_are_those_of_the_finetuned_network(size: tuple[int, int], prefix: str) -> None:
    w, given = state("finetuned"), images(*size, count=2)
    network = loaded(state("finetuned", prefix), classifier())
    logits, vectors = network(given), network.features(given)
    assert logits.shape == (2, CLASSES) and vectors.shape == (2, DIM)
    for i, image in enumerate(given):
        assert (vectors[i] - features(w, image)).abs().max() < 1e-10
        assert (logits[i] - (w["head.weight"] @ features(w, image) + w["head.bias"])).abs().max() < 1e-10


@pytest.mark.parametrize("kind", ["pretrained", "finetuned"])
def test_a_backbone_takes_either_file_and_leaves_the_rest(kind: str) -> None:
    given, w = images(16, 8), state(kind)
    body = {key.removeprefix("model."): x for key, x in w.items()}
    found = loaded(w, backbone())(given)
    assert found.shape == (1, 8, DIM)
    assert (found[0] - expected(body, given[0])).abs().max() < 1e-10


@pytest.mark.parametrize("side", [8, 3])
def test_a_table_for_images_of_another_side_is_resized_as_for_finetuning(side: int) -> None:
    network = loaded(state("pretrained"), encoder(image_size=PATCH * side))
    along = resampling(side, side / SIDE)
    table = resampled(state("pretrained")["pos_embed"], along, along)
    assert network.backbone.places.shape == (side, side, DIM)
    assert (network.backbone.places.flatten(0, 1) - table).abs().max() < 1e-10


def test_a_table_in_half_precision_is_resized_in_full() -> None:
    given = {key: x.half() for key, x in state("pretrained").items()}
    found = image_weights.convert(given, encoder(image_size=PATCH * 8))["backbone.places"]
    along = resampling(8, 2.0)
    assert found.dtype == torch.float32
    assert (found.flatten(0, 1) - resampled(given["pos_embed"].double(), along, along)).abs().max() < 1e-5


def test_everything_is_trained_positions_too() -> None:
    for size in ((16, 16), (8, 20)):
        network = classifier().train()
        network(images(*size)).square().sum().backward()
        for name, p in network.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


@pytest.mark.parametrize("under", ["teacher", "model", "module", None])
def test_weights_load_takes_files_as_they_are_saved(under: str | None, tmp_path: Path) -> None:
    beside = {"args": argparse.Namespace(lr=1e-3), "optimizer": {"param_groups": [{"lr": np.float64(1e-4)}]}}
    torch.save(dino() if under is None else {**beside, under: dino()}, tmp_path / "longvit.pth")
    network = encoder()
    weights.load(network, tmp_path / "longvit.pth")
    for name, x in loaded(state("pretrained"), encoder()).state_dict().items():
        assert torch.equal(network.state_dict()[name], x), name


@pytest.mark.parametrize("make", [backbone, classifier])
def test_weights_load_takes_a_classifier_in_safetensors(make: Any, tmp_path: Path) -> None:
    save_file(state("finetuned"), tmp_path / "longvit.safetensors")
    network = make()
    weights.load(network, tmp_path / "longvit.safetensors")
    for name, x in loaded(state("finetuned"), make()).state_dict().items():
        assert torch.equal(network.state_dict()[name], x), name


@pytest.mark.parametrize("scalar", [np.float32(1e-4), np.int64(3)])
def test_what_stands_beside_the_weights_is_never_made(scalar: Any, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "args": argparse.Namespace(lr=scalar)}, tmp_path / "some.pth")
    assert not isinstance(weights.read(tmp_path / "some.pth")["args"], argparse.Namespace)
    with torch.serialization.safe_globals([argparse.Namespace]):
        before = set(torch.serialization.get_safe_globals())
        weights.read(tmp_path / "some.pth")
        assert set(torch.serialization.get_safe_globals()) == before


def test_a_file_that_holds_code_is_still_refused(tmp_path: Path) -> None:
    torch.save({"teacher": dino(), "beside": Path}, tmp_path / "longvit.pth")
    with pytest.raises(ValueError, match="is not a checkpoint of this kit, or it is damaged"):
        weights.load(encoder(), tmp_path / "longvit.pth")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim": 36}, r"do not fit: pos_embed is \(1, 16, 24\) there and \(1, 16, 36\) here.* and \d+ more"),
        (
            {"patch_size": 8, "image_size": 32},
            r"do not fit: patch_embed.proj.weight is \(24, 3, 4, 4\) there and \(24, 3, 8, 8\) here",
        ),
        ({"layers": 3}, r"are missing: encoder.layers.2.self_attn.q_proj.weight.* and \d+ more"),
        ({"layers": 1}, r"are left over: encoder.layers.1.self_attn.k_proj.weight.* and \d+ more"),
        ({"ffn_dim": 41}, r"do not fit: encoder.layers.0.ffn.fc1.weight is \(40, 24\) there and \(41, 24\) here"),
    ],
)
def test_weights_of_another_network_name_what_differs(options: dict, words: str, tmp_path: Path) -> None:
    torch.save({"teacher": dino()}, tmp_path / "longvit.pth")
    with pytest.raises(ValueError, match=f"longvit.pth: LongViT's weights {words}"):
        weights.load(encoder(**options), tmp_path / "longvit.pth")


def test_other_classes_and_a_table_that_is_no_square_are_named() -> None:
    with pytest.raises(ValueError, match=r"do not fit: head.weight is \(5, 24\) there and \(2, 24\) here"):
        image_weights.convert(state("finetuned"), classifier(classes=2))
    given = state("pretrained")
    given["pos_embed"] = given["pos_embed"][:, 1:]
    with pytest.raises(ValueError, match=r"do not fit: pos_embed is \(1, 15, 24\) there and \(1, 16, 24\) here"):
        image_weights.convert(given, encoder())


def test_keys_that_are_missing_or_nobody_knows_are_named() -> None:
    for given, network in ((dino(), encoder()), (state("finetuned"), classifier())):
        key = next(key for key in given if key.endswith("norm.bias") and "layers" not in key)
        name = key.removeprefix("backbone.")
        given["mask_token"] = given.pop(key)
        with pytest.raises(ValueError, match=f"LongViT's weights are missing: {name}$"):
            image_weights.convert(given, network)
        given[key] = given["mask_token"]
        with pytest.raises(ValueError, match="LongViT's weights are left over: mask_token$"):
            image_weights.convert(given, network)
    given = state("pretrained")
    del given["pos_embed"]
    with pytest.raises(ValueError, match="LongViT's weights are missing: pos_embed$"):
        image_weights.convert(given, backbone())


def test_weights_go_into_a_network_of_their_kind_alone() -> None:
    with pytest.raises(ValueError, match="fine-tuned .* is an ImageEncoder; load them into an ImageClassifier, or"):
        image_weights.convert(state("finetuned"), encoder())
    with pytest.raises(ValueError, match="without a classifier .* is an ImageClassifier; load them into its backbone"):
        image_weights.convert(dino(), classifier())
    slides = SlideEncoder(8, dim=8, layers=1, heads=2, ffn_dim=8, attention={"backend": "naive"})
    with pytest.raises(ValueError, match="weights of LongViT, and this network is a SlideEncoder; load them into a"):
        image_weights.convert(dino(), slides)


def test_images_and_slides_are_told_apart() -> None:
    for given in (dino(), state("finetuned"), state("pretrained")):
        assert image_weights.is_longvit(given) and not slide_weights.is_slide_encoder(given)
    as_slides = {key: x.flatten(1) if key == "patch_embed.proj.weight" else x for key, x in state("pretrained").items()}
    assert slide_weights.is_slide_encoder(as_slides) and not image_weights.is_longvit(as_slides)


@pytest.mark.parametrize(
    ("height", "width", "words"),
    [
        (17, 16, "images are 17 x 16 .* patches 4 x 4; resize, crop or pad the images to 16 x 16"),
        (16, 23, "resize, crop or pad the images to 16 x 24"),
        (1, 16, "resize, crop or pad the images to 4 x 16"),
        (0, 16, "resize, crop or pad the images to 4 x 16"),
    ],
)
def test_images_that_no_patches_fill_are_refused_with_a_size_that_works(height: int, width: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        encoder()(images(height, width))


def test_what_cannot_be_encoded_is_refused_at_the_door() -> None:
    for wrong in (images(16, 16)[0], images(16, 16)[:, :2], images(16, 16).to(torch.uint8)):
        with pytest.raises(
            ValueError, match=r"images is torch.*\), expected floating point of \(batch, 3, height, width"
        ):
            encoder()(wrong)
    for options, words in (
        ({"dim": 25}, "dim is 25 and heads is 3; dim must be a multiple of heads"),
        ({"layers": 0}, "layers is 0, expected at least 1"),
        ({"image_size": 18}, "image_size is 18 and patch_size is 4; .* as 16 is"),
    ):
        with pytest.raises(ValueError, match=words):
            backbone(**options)
    with pytest.raises(ValueError, match="classes is 0, expected at least 1"):
        classifier(classes=0)


@pytest.mark.parametrize(
    ("image_size", "lengths"),
    [
        (1024, [64, 128, 256, 512, 1024]),
        (2048, [64, 128, 256, 512, 1024]),
        (4096, [1024, 2048, 4096, 8192, 16384]),
        (8192, [1024, 4096, 8192, 16384, 65536]),
        (16384, [1024, 4096, 16384, 65536, 262144]),
        (32768, [1024, 4096, 32768, 262144, 1048576]),
    ],
)
def test_the_published_attention(image_size: int, lengths: list[int]) -> None:
    found = image_encoder.image_attention(image_size)
    assert attention.build(found).branches == list(zip(lengths, [1, 2, 4, 8, 16], strict=True))
    assert found["head_offsets"] == "grouped"


def test_the_defaults_are_the_published_architecture() -> None:
    with torch.device("meta"):
        network = ImageEncoder(LongViT())
    body = network.backbone
    assert [len(body.blocks), body.dim, body.patch_size, body.blocks[0].attention.heads] == [12, 384, 32, 16]
    assert body.blocks[11].attention.backend.branches[-1] == (1024, 16)
    assert sum(p.numel() for p in network.parameters()) == 22_913_664
