"""A drop-in for torch's multi-head attention: equal to it where one branch is dense, and dilated where not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longnet_kit import attention
from longnet_kit.attention import MultiheadDilatedAttention
from longnet_kit.testing import reference

E, H, N, B = 24, 3, 13, 2


def pair(**options: Any) -> tuple[MultiheadDilatedAttention, nn.MultiheadAttention]:
    """Ours with one dense branch, and torch's with the same weights."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, H, dtype=torch.float64, **options)
    ours = MultiheadDilatedAttention(E, H, [N], [1], dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, E, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(3)]


def outcome(module: nn.Module, qkv: list[Tensor], **options: Any) -> list[Tensor]:
    """Output, weights, and the gradients of inputs and parameters."""
    out, weights = module(*qkv, **options)
    rows = torch.arange(1, out.numel() + 1, dtype=torch.float64).view(out.shape).sin()
    wanted = [*qkv, *(p for p in module.parameters())]
    return [out, *([] if weights is None else [weights]), *torch.autograd.grad(out, wanted, rows)]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert [x.shape for x in ours] == [x.shape for x in theirs]
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("causal", [None, "flag", "float", "bool"])
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (N, B)), ({"batch_first": True}, (B, N)), ({"bias": False}, (N, B)), ({}, (N,)),
        ({"batch_first": True}, (N,)),
    ],
)  # fmt: skip
def test_one_dense_branch_is_torchs(
    options: dict, shape: tuple, causal: str | None, average: bool, need_weights: bool
) -> None:
    ours, theirs = pair(**options)
    mask = nn.Transformer.generate_square_subsequent_mask(N, dtype=torch.float64)
    mask = mask == -torch.inf if causal == "bool" else mask
    call: dict[str, Any] = {"need_weights": need_weights, "average_attn_weights": average}
    expected = outcome(theirs, inputs(*shape), **call, **({"attn_mask": mask} if causal else {}))
    given = {"is_causal": True} if causal == "flag" else {"attn_mask": mask} if causal else {}
    assert_equal(outcome(ours, inputs(*shape), **call, **given), expected)


@pytest.mark.parametrize("as_float", [False, True])
@pytest.mark.parametrize("batched", [True, False])
def test_padded_keys_are_hidden_as_in_torch(as_float: bool, batched: bool) -> None:
    ours, theirs = pair(batch_first=True)
    padded = torch.zeros(B, N, dtype=torch.bool)
    padded[0, 9:] = padded[1, 4] = True
    padded = padded if batched else padded[0]
    mask = torch.zeros(padded.shape, dtype=torch.float64).masked_fill(padded, -torch.inf) if as_float else padded
    qkv = inputs(B, N) if batched else inputs(N)
    (out, weights), (wanted, wanted_weights) = (module(*qkv, key_padding_mask=mask) for module in (ours, theirs))
    torch.testing.assert_close(out[~padded], wanted[~padded], rtol=0, atol=1e-12)
    torch.testing.assert_close(weights[~padded], wanted_weights[~padded], rtol=0, atol=1e-12)


@pytest.mark.parametrize("head_offsets", ["interleaved", "grouped", "none"])
def test_branches_are_those_of_the_backend(head_offsets: Any) -> None:
    torch.manual_seed(0)
    module = MultiheadDilatedAttention(
        E, H, [4, 8], [1, 2], head_offsets=head_offsets, batch_first=True, dtype=torch.float64
    )
    x = inputs(B, N)[0]
    q, k, v = (nn.functional.linear(x, w, b).unflatten(-1, (H, -1)) for w, b in zip(
        module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3), strict=True))  # fmt: skip
    expected = module.out_proj(reference(module.attention.pattern, q, k, v, True, None).flatten(2))
    found, weights = module(x, x, x, is_causal=True, average_attn_weights=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    mixed = torch.einsum("bhpk,bkhd->bphd", weights, v)
    torch.testing.assert_close(module.out_proj(mixed.flatten(2)), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("branches", [([N], [1]), ([4, 8], [1, 2])])
def test_it_stands_in_an_encoder_layer_of_torch(branches: tuple[list[int], list[int]], training: bool) -> None:
    layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    x = inputs(B, N)[0]
    dense = layer(x)
    own = MultiheadDilatedAttention(E, H, *branches, batch_first=True, dtype=torch.float64)
    own.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = own  # type: ignore[assignment]
    expected = layer.norm1(x + own(x, x, x)[0])
    expected = layer.norm2(expected + layer._ff_block(expected))
    assert torch.allclose(expected, dense) == (branches[0] == [N])
    stack = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).train(training)
    stack.load_state_dict({f"layers.0.{name}": x for name, x in layer.state_dict().items()})
    with torch.no_grad():
        torch.testing.assert_close(layer.train(training)(x), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(stack(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"attn_mask": torch.zeros(N, N)}, "is not the causal mask of 13 tokens"),
        ({"attn_mask": ~torch.eye(N, dtype=torch.bool), "is_causal": True}, "is not the causal mask"),
        ({"attn_mask": torch.zeros(N, N), "is_causal": True, "need_weights": False}, "is not the causal mask"),
        ({"attn_mask": torch.ones(N, N).triu(1)}, "is not the causal mask"),
        ({"attn_mask": torch.ones(B * H, N, N, dtype=torch.bool).triu(1)}, "is not the causal mask"),
        ({"key_padding_mask": torch.zeros(B, N + 1, dtype=torch.bool)}, r"of shape \(2, 14\), expected bool or float"),
        ({"key_padding_mask": torch.ones(B, N)}, "holds values other than 0 and -inf"),
        ({"key_padding_mask": torch.zeros(B, N, dtype=torch.int64)}, "key_padding_mask is torch.int64"),
    ],
)
def test_what_branches_cannot_honour_is_refused(call: dict, words: str) -> None:
    module = MultiheadDilatedAttention(E, H, [4], [1], batch_first=True)
    x = torch.zeros(B, N, E)
    with pytest.raises(ValueError, match=words):
        module(x, x, x, **call)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="embed_dim is 10 and num_heads is 3"):
        MultiheadDilatedAttention(10, 3)
    module = MultiheadDilatedAttention(E, H, [4], [1])
    x = torch.zeros(N, B, E)
    with pytest.raises(ValueError, match=r"have shapes \(13, 2, 24\), \(12, 2, 24\), \(13, 2, 24\)"):
        module(x, x[1:], x)
    assert module.attention.branches == [(4, 1)] and "dilated" in attention.names()


def test_a_gradient_through_the_weights_raises() -> None:
    module = MultiheadDilatedAttention(E, H, [4], [1], batch_first=True)
    x = torch.randn(B, N, E, requires_grad=True)
    out, weights = module(x, x, x)
    out.sum().backward()  # the output's gradients are there
    assert weights is not None and x.grad is not None
    _, weights = module(x, x, x)
    with pytest.raises(ValueError, match="the weights of MultiheadDilatedAttention have no gradients"):
        weights.square().sum().backward()


def test_the_weights_can_be_mapped() -> None:
    module = MultiheadDilatedAttention(E, H, [4], [1], batch_first=True)
    x = torch.randn(3, B, N, E)
    found = torch.func.vmap(lambda x: module(x, x, x)[1])(x)
    torch.testing.assert_close(found, torch.stack([module(part, part, part)[1] for part in x]))
