"""Networks compiled by Inductor give what eager ones give, at the first sequence length and at every later one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config

from longnet_kit.model import Transformer
from longnet_kit.model.positions import Rope, XPos
from tests.model.small import network, some_tokens

ROPE, XPOS = Rope(8), XPos(8, seq_len=64)
BACKENDS: dict[str, dict[str, Any]] = {
    "dilated": {"backend": "dilated", "segment_lengths": [8, 32], "dilation_rates": [1, 4]},
    "sdpa": {"backend": "sdpa"},
    "naive": {"backend": "naive"},
    "xformers": {"backend": "xformers", "block_size": 16, "pattern": "fixed", "local_blocks": 1},
    "block_sparse": {"backend": "block_sparse", "block_size": 8, "pattern": "fixed", "local_blocks": 2},
}
# A float32 result may differ by some roundings; bfloat16 keeps 8 bits. A wrong turn differs by about 1.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.1}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No kernel and no limit of recompilations is left from another test; compile in this process."""
    torch.compiler.reset()
    with config.patch(compile_threads=1):
        yield
    torch.compiler.reset()


def tables(tokens: Tensor, far: Tensor) -> list[Tensor]:
    """The tables of both embeddings in both dtypes, at the positions of tokens and at positions far away."""
    near = torch.arange(tokens.shape[1])
    asked = (ROPE, near), (ROPE, near + (2**31 - 5)), (ROPE, far), (XPOS, near)
    dtypes = torch.float32, torch.bfloat16
    return [x for embedding, at in asked for dtype in dtypes for x in embedding.tables(at, dtype)]


@pytest.mark.parametrize(("dynamic", "lengths"), [(None, [16, 17, 33, 64]), (False, [33])])
def test_compiled_tables_are_the_eager_ones(dynamic: bool | None, lengths: list[int]) -> None:
    compiled = torch.compile(tables, fullgraph=True, dynamic=dynamic)
    for n in lengths:
        tokens = torch.zeros(2, n)
        far = torch.randint(-(2**62), 2**62, (2, n), generator=torch.Generator().manual_seed(n))
        for ours, eager in zip(compiled(tokens, far), tables(tokens, far), strict=True):
            torch.testing.assert_close(ours, eager, rtol=2 * torch.finfo(eager.dtype).eps, atol=1e-7)


def outcome(net: Any, model: Transformer, tokens: Tensor) -> list[Tensor]:
    """Logits, then the gradient of each parameter."""
    model.zero_grad()
    logits = net(tokens)
    logits.float().square().mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def check(backend: str, positions: str, dtype: torch.dtype, lengths: list[int], dynamic: bool | None = None) -> None:
    """Compare a compiled network of one layer with itself run eagerly."""
    model = network(positions=positions, layers=1, attention=BACKENDS[backend]).to(dtype)
    compiled = torch.compile(model, dynamic=dynamic)
    for n in lengths:
        tokens = some_tokens(2, n)
        pairs = zip(outcome(compiled, model, tokens), outcome(model, model, tokens), strict=True)
        for ours, eager in pairs:
            atol = TOLERANCE[dtype] * max(1.0, eager.abs().max().item())
            torch.testing.assert_close(ours, eager, rtol=0, atol=atol)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_network_is_the_eager_one_at_every_length(backend: str) -> None:
    # Without `dynamic` the first length has code of its own; once is enough here, the soak does it for all.
    check(backend, "rope", torch.float32, [16, 17, 33], dynamic=None if backend == "sdpa" else True)


@pytest.mark.soak
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", ["rope", "xpos"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_network_is_the_eager_one_whatever_its_backend_positions_and_dtype(
    backend: str, positions: str, dtype: torch.dtype
) -> None:
    check(backend, positions, dtype, [16, 17, 1, 33, 32, 64])
    torch.compiler.reset()
    check(backend, positions, dtype, [31], dynamic=False)


@pytest.mark.soak
def test_a_compiled_network_draws_the_masks_of_dropout_that_an_eager_one_draws() -> None:
    model = network(layers=1, dropout=0.3, attention=BACKENDS["sdpa"])
    compiled = torch.compile(model, dynamic=True)
    for n in (16, 33):
        found = []
        for net in (compiled, model):
            torch.manual_seed(5)
            found.append(net(some_tokens(2, n)))
        torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_compiled_xpos_refuses_positions_beyond_its_range() -> None:
    network = Transformer(
        9, dim=8, layers=1, heads=1, ffn_dim=8, seq_len=64, positions="xpos", attention=BACKENDS["sdpa"]
    )
    compiled, tokens = torch.compile(network, backend="aot_eager", fullgraph=True), torch.zeros(1, 4, dtype=torch.int64)
    positions = torch.arange(4)
    torch.testing.assert_close(compiled(tokens, positions=positions), network(tokens, positions=positions))
    with pytest.raises(RuntimeError, match="out of xpos's range"):
        compiled(tokens, positions=positions + 1_000_000)
