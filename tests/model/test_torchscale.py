"""Weights of torchscale's decoder give here what they give there, by a forward pass written out from its definition."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from longnet_kit import weights
from longnet_kit.model import Transformer, torchscale

V, DIM, HEADS, FFN, LAYERS, N = 29, 24, 3, 40, 2, 21
BRANCHES = [(4, 1), (8, 2), (16, 4)]
State = dict[str, Tensor]


def state(prefix: str = "decoder.", xpos: bool = True, seed: int = 0) -> State:
    """Random weights in torchscale's layout."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

    made = {"embed_tokens.weight": draw(V, DIM), "version": torch.tensor([3.0])}
    made["output_projection.weight"] = made["embed_tokens.weight"]
    for i in range(LAYERS):
        layer = f"layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            made |= {f"{layer}.self_attn.{name}.weight": draw(DIM, DIM), f"{layer}.self_attn.{name}.bias": draw(DIM)}
        for name, (rows, columns) in {"fc1": (FFN, DIM), "fc2": (DIM, FFN)}.items():
            made |= {f"{layer}.ffn.{name}.weight": draw(rows, columns), f"{layer}.ffn.{name}.bias": draw(rows)}
        norms = {"self_attn_layer_norm": DIM, "self_attn.inner_attn_ln": DIM, "final_layer_norm": DIM}
        for name, width in {**norms, "ffn.ffn_layernorm": FFN}.items():
            made |= {f"{layer}.{name}.weight": 1 + draw(width), f"{layer}.{name}.bias": draw(width)}
        if xpos:
            head_dim = DIM // HEADS
            made[f"{layer}.self_attn.xpos.scale"] = (torch.arange(0, head_dim, 2) + 0.4 * head_dim) / (1.4 * head_dim)
    made |= {"layer_norm.weight": 1 + draw(DIM), "layer_norm.bias": draw(DIM)}
    return {prefix + key: x for key, x in made.items()}


def expected(given: State, tokens: list[int], xpos: bool, scaled: bool, prefix: str = "decoder.") -> Tensor:
    """Logits of one sequence, (N, V), with the score matrix written out."""
    w = {key.removeprefix(prefix): x for key, x in given.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def project(x: Tensor, name: str) -> Tensor:
        return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    x = w["embed_tokens.weight"][tokens] * (math.sqrt(DIM) if scaled else 1)
    for i in range(LAYERS):
        attention, ffn = f"layers.{i}.self_attn", f"layers.{i}.ffn"
        y = norm(x, f"layers.{i}.self_attn_layer_norm")
        q, k, v = (project(y, f"{attention}.{name}_proj").view(len(tokens), HEADS, -1) for name in "qkv")
        if xpos:
            q, k = turned(q, 1), turned(k, -1)
        x = x + project(norm(attend(q, k, v), f"{attention}.inner_attn_ln"), f"{attention}.out_proj")
        y = gelu(project(norm(x, f"layers.{i}.final_layer_norm"), f"{ffn}.fc1"))
        x = x + project(norm(y, f"{ffn}.ffn_layernorm"), f"{ffn}.fc2")
    return norm(x, "layer_norm") @ w["embed_tokens.weight"].T


def turned(x: Tensor, sign: int) -> Tensor:
    """xPos on neighbouring dimensions 2i and 2i + 1, (N, H, D)."""
    out = torch.empty_like(x)
    head_dim = x.shape[-1]
    for n in range(len(x)):
        for i in range(head_dim // 2):
            angle = n * 10_000 ** (-2 * i / head_dim)
            factor = ((2 * i + 0.4 * head_dim) / (1.4 * head_dim)) ** (sign * (n - 10) / 512)
            a, b = x[n, :, 2 * i], x[n, :, 2 * i + 1]
            out[n, :, 2 * i] = factor * (a * math.cos(angle) - b * math.sin(angle))
            out[n, :, 2 * i + 1] = factor * (b * math.cos(angle) + a * math.sin(angle))
    return out


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dilated attention whose head h keeps residue h // ceil(H / r): (N, H, D) to (N, H * D)."""
    n, heads, head_dim = q.shape
    out = torch.zeros_like(q)
    for h in range(heads):
        for p in range(n):
            keys = [
                m
                for w, r in BRANCHES
                for m in range(p // w * w, p + 1)
                if p % w % r == m % w % r == h // -(-heads // r)
            ]
            scores = torch.stack([q[p, h] @ k[m, h] for m in keys]) / head_dim**0.5
            out[p, h] = scores.softmax(0) @ v[keys, h]
    return out.flatten(1)


def network(**options: Any) -> Transformer:
    lengths, rates = (list(numbers) for numbers in zip(*BRANCHES, strict=True))
    attention = {"backend": "dilated", "segment_lengths": lengths, "dilation_rates": rates, "head_offsets": "grouped"}
    sizes = {"dim": DIM, "layers": LAYERS, "heads": HEADS, "ffn_dim": FFN, "seq_len": N, "positions": "xpos"}
    torch.manual_seed(9)
    return Transformer(options.pop("vocab_size", V), **{**sizes, "attention": attention, **options}).double()


TOKENS = [(7 * i * i + 3) % V for i in range(N)]


@pytest.mark.parametrize("prefix", ["", "decoder.", "model.decoder."])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("xpos", [True, False])
def test_the_logits_are_torchscales(prefix: str, scaled: bool, xpos: bool) -> None:
    given = state(prefix, xpos)
    model = network(positions="xpos" if xpos else "none")
    model.load_state_dict(torchscale.convert(given, model, scale_embedding=scaled))
    with torch.no_grad():
        found = model(torch.tensor([TOKENS]))[0]
    assert (found - expected(given, TOKENS, xpos, scaled, prefix)).abs().max() < 1e-9


@pytest.mark.parametrize("is_nested", [False, True])
def test_init_from_takes_a_file_of_them(is_nested: bool, tmp_path: Path) -> None:
    given = state()
    torch.save({"model": given, "step": 7} if is_nested else given, tmp_path / "torchscale.pt")
    model = network()
    weights.load(model, tmp_path / "torchscale.pt")
    with torch.no_grad():
        found = model(torch.tensor([TOKENS]))[0]
    assert (found - expected(given, TOKENS, xpos=True, scaled=True)).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim": 30}, r"do not fit: embed_tokens.weight is \(29, 24\) there and \(29, 30\) here.* and \d+ more"),
        ({"layers": 3}, r"are missing: layers.2.self_attn.q_proj.weight.* and \d+ more"),
        ({"layers": 1}, r"are left over: layers.1.self_attn.q_proj.weight.* and \d+ more"),
        ({"ffn_dim": 41}, r"layers.0.ffn.fc1.weight is \(40, 24\) there and \(41, 24\) here"),
        ({"vocab_size": 30}, r"embed_tokens.weight is \(29, 24\) there and \(30, 24\) here"),
        ({"positions": "rope"}, r"trained with xPos and this model is without it; set model.positions to xpos"),
    ],
)
def test_weights_of_another_network_name_what_differs(options: dict, words: str, tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "torchscale.pt")
    with pytest.raises(ValueError, match=f"torchscale.pt: torchscale's weights .*{words}"):
        weights.load(network(**options), tmp_path / "torchscale.pt")


def test_what_is_no_weight_or_has_no_place_there_is_named(tmp_path: Path) -> None:
    torch.save({**state(), "decoder.layer_norm.bias": 3}, tmp_path / "torchscale.pt")
    with pytest.raises(ValueError, match=r"do not fit: layer_norm.bias is a int there and a tensor here"):
        weights.load(network(), tmp_path / "torchscale.pt")
    torch.save(state(), tmp_path / "torchscale.pt")
    attention = {"backend": "dilated", "segment_lengths": [4], "dilation_rates": [1], "mixing": "learned"}
    with pytest.raises(ValueError, match=r"do not fit this model: blocks.0.attention.backend.mixing.logits is only h"):
        weights.load(network(attention=attention), tmp_path / "torchscale.pt")


def test_a_head_of_its_own_and_positions_that_are_missing_are_refused() -> None:
    given = state()
    given["decoder.output_projection.weight"] = given["decoder.output_projection.weight"] + 1
    with pytest.raises(ValueError, match="output projection is not its embedding"):
        torchscale.convert(given, network())
    with pytest.raises(ValueError, match="trained without xPos and this model is with it; set model.positions to none"):
        torchscale.convert(state(xpos=False), network())
