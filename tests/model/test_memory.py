"""What is computed twice or in chunks to save memory: the same values and gradients, and nothing larger in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longnet_kit.model import Transformer
from longnet_kit.model.blocks import FeedForward
from longnet_kit.model.loss import token_losses
from tests.model.small import VOCAB, network, some_tokens

CHECKPOINTING = ["none", "blocks", "blocks_on_cpu"]


class Seen(TorchDispatchMode):
    """Notes how many rows the largest tensor whose last dimension is `width` had."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x.dim() > 1 and x.shape[-1] == self.width:
                self.rows = max(self.rows, x.numel() // self.width)
        return out


def outcome(net: Transformer, batch: int = 3, seq_len: int = 29) -> list[Tensor]:
    """The losses of all tokens, and the gradients of all weights."""
    torch.manual_seed(7)  # of dropout
    tokens = some_tokens(batch, seq_len)
    losses = token_losses(net.hidden(tokens), net.embedding.weight, tokens.roll(-1, 1), net.loss_chunk)
    return [losses, *torch.autograd.grad(losses.square().sum(), list(net.parameters()))]


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("ffn_chunk", [None, 1, 13, 87, 1000])
@pytest.mark.parametrize("loss_chunk", [None, 17])
def test_memory_options_change_neither_losses_nor_gradients(
    checkpointing: Any, ffn_chunk: int | None, loss_chunk: int | None
) -> None:
    options = {"activation_checkpointing": checkpointing, "ffn_chunk": ffn_chunk, "loss_chunk": loss_chunk}
    expected = outcome(network(dropout=0.2).double())
    for ours, theirs in zip(outcome(network(dropout=0.2, **options).double()), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 70), st.booleans())
def test_feed_forward_in_chunks_is_the_same(batch: int, seq_len: int, chunk: int, trains: bool) -> None:
    torch.manual_seed(0)
    whole, parts = FeedForward(6, 11).double(), FeedForward(6, 11, chunk).double()
    parts.load_state_dict(whole.state_dict())
    x, upstream = torch.randn(2, batch, seq_len, 6, dtype=torch.float64)
    x.requires_grad_()
    with torch.set_grad_enabled(trains):
        expected, ours = whole(x), parts(x)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    if trains:
        wanted = torch.autograd.grad(expected, (x, *whole.parameters()), upstream)
        for a, b in zip(torch.autograd.grad(ours, (x, *parts.parameters()), upstream), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("trains", [True, False])
def test_no_more_wide_states_and_logits_exist_than_a_chunk_has(checkpointing: Any, trains: bool) -> None:
    net = network(dim=16, ffn_dim=50, ffn_chunk=20, loss_chunk=20, activation_checkpointing=checkpointing)
    with torch.set_grad_enabled(trains), Seen(50) as wide, Seen(VOCAB) as logits:
        tokens = some_tokens(2, 32)
        losses = token_losses(net.hidden(tokens), net.embedding.weight, tokens, net.loss_chunk)
        if trains:
            losses.sum().backward()
    assert wide.rows == logits.rows == 20  # more than the 16 of transposed weights and their gradients


def test_inner_states_are_not_saved_for_the_backward_pass() -> None:
    saved: list[Tensor] = []
    feed_forward = FeedForward(6, 11, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        feed_forward(torch.randn(2, 10, 6, requires_grad=True))
    assert saved and not any(x.shape[-1] == 11 for x in saved)


def test_blocks_on_cpu_moves_the_blocks_inputs_and_nothing_else() -> None:
    moved: list[Tensor] = []

    @contextmanager
    def noted(pin_memory: bool) -> Iterator[None]:
        assert pin_memory is False
        with torch.autograd.graph.saved_tensors_hooks(lambda x: moved.append(x) or x, lambda x: x):
            yield

    net, inputs = network(layers=3, activation_checkpointing="blocks_on_cpu"), []
    net.save_on_cpu = noted
    for block in net.blocks:
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    net.hidden(some_tokens())
    large = [x for x in moved if x.numel() > 1]
    assert len(large) == 3 and all(a is b for a, b in zip(large, inputs, strict=True))


@pytest.mark.gpu
def test_blocks_on_cpu_leaves_the_gpu_without_the_blocks_inputs() -> None:
    def allocated(checkpointing: Any) -> int:
        net = network(dim=512, layers=12, activation_checkpointing=checkpointing).cuda()
        before = torch.cuda.memory_allocated()
        hidden = net.hidden(some_tokens(8).cuda())
        used = torch.cuda.memory_allocated() - before
        hidden.sum().backward()
        return used

    size = 8 * 32 * 512 * 4
    assert allocated("blocks") - allocated("blocks_on_cpu") > 10 * size


@pytest.mark.parametrize("options", [{"ffn_chunk": 0}, {"loss_chunk": -1}, {"activation_checkpointing": "layers"}])
def test_wrong_memory_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        network(**options)
