"""torchscale's LongNet encoder: random weights in its layout, and its forward pass written out, apart from the kit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

State = dict[str, Tensor]
Draw = Callable[..., Tensor]


def drawing(seed: int) -> Draw:
    """What draws float64 tensors of given shapes, small enough for a softmax."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5


def of_linear(draw: Draw, name: str, rows: int, columns: int) -> State:
    return {f"{name}.weight": draw(rows, columns), f"{name}.bias": draw(rows)}


def of_norm(draw: Draw, name: str, width: int) -> State:
    return {f"{name}.weight": 1 + draw(width), f"{name}.bias": draw(width)}


def of_layers(draw: Draw, layers: int, dim: int, ffn: int) -> State:
    """Weights of all layers, `encoder.layers.<i>...`."""
    made: State = {}
    for layer in (f"encoder.layers.{i}" for i in range(layers)):
        for name in ("k", "v", "q", "out"):
            made |= of_linear(draw, f"{layer}.self_attn.{name}_proj", dim, dim)
        made |= of_linear(draw, f"{layer}.ffn.fc1", ffn, dim) | of_linear(draw, f"{layer}.ffn.fc2", dim, ffn)
        for name in ("self_attn_layer_norm", "final_layer_norm", "self_attn.inner_attn_ln"):
            made |= of_norm(draw, f"{layer}.{name}", dim)
        made |= of_norm(draw, f"{layer}.ffn.ffn_layernorm", ffn)
    return made


def norm(w: State, x: Tensor, name: str) -> Tensor:
    return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-5)


def project(w: State, x: Tensor, name: str) -> Tensor:
    return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def states(w: State, x: Tensor, layers: int, heads: int, branches: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The states before each layer and after the last, (N, dim) each."""
    found = [x]
    for layer in (f"encoder.layers.{i}" for i in range(layers)):
        y = norm(w, x, f"{layer}.self_attn_layer_norm")
        q, k, v = (project(w, y, f"{layer}.self_attn.{name}_proj").view(len(x), heads, -1) for name in "qkv")
        y = norm(w, attend(q, k, v, branches), f"{layer}.self_attn.inner_attn_ln")
        x = x + project(w, y, f"{layer}.self_attn.out_proj")
        y = gelu(project(w, norm(w, x, f"{layer}.final_layer_norm"), f"{layer}.ffn.fc1"))
        x = x + project(w, norm(w, y, f"{layer}.ffn.ffn_layernorm"), f"{layer}.ffn.fc2")
        found.append(x)
    return found


def attend(q: Tensor, k: Tensor, v: Tensor, branches: Sequence[tuple[int, int]]) -> Tensor:
    """Each branch as a dense masked softmax, mixed by their denominators: (N, H, D) to (N, H * D)."""
    n, heads, head_dim = q.shape
    position = torch.arange(n)
    outs, denominators = [], []
    for w, r in branches:
        offset = torch.arange(heads)[:, None] // -(-heads // r)
        kept = position % w % r == offset  # (H, N)
        same = position[:, None] // w == position // w
        seen = same & kept[:, :, None] & kept[:, None, :]
        scores = torch.einsum("nhd,mhd->hnm", q, k) / head_dim**0.5
        mass = scores.exp() * seen
        denominators.append(mass.sum(-1))
        outs.append(torch.einsum("hnm,mhd->hnd", mass / mass.sum(-1, keepdim=True).clamp(min=1e-300), v))
    share = torch.stack(denominators) / torch.stack(denominators).sum(0)
    return (torch.stack(outs) * share[..., None]).sum(0).transpose(0, 1).flatten(1)
