"""What is claimed of one large GPU: the kernels' rate, 64M tokens, and the paper's model on 1M tokens.

Each test prints its figures (`-s` shows them); the tables of tools/ are where they are kept.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import pytest
import torch

from longnet_kit import attention, recipe
from longnet_kit.attention import flash
from longnet_kit.model import Transformer
from longnet_kit.model.loss import token_losses

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


def needs(gigabytes: int) -> None:
    """Skip on a device with less memory."""
    there = torch.cuda.get_device_properties(0).total_memory / 1e9
    if there < gigabytes:
        pytest.skip(f"needs a device with {gigabytes} GB of memory; this one has {there:.0f}")


@pytest.fixture(autouse=True)
def peak_from_here() -> None:
    """What a test says of memory is of itself."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def geometric(n: int) -> attention.AttentionBackend:
    """(2048, 1), (4096, 2), ... up to n."""
    rates = [2**i for i in range(n.bit_length()) if 2048 * 2**i <= n]
    return attention.build(
        {"backend": "dilated", "segment_lengths": [2048 * r for r in rates], "dilation_rates": rates}
    )


def milliseconds(run: Callable[[], object], rounds: int = 10) -> float:
    """Of the median round, after two that do not count."""
    found = []
    for _ in range(rounds + 2):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        run()
        ended.record()
        torch.cuda.synchronize()
        found.append(began.elapsed_time(ended))
    return statistics.median(found[2:])


def test_dilated_attention_runs_near_its_kernels_rate() -> None:
    """At least 0.75 of what the same kernel does on tensors of the branches' shapes, forward and backward together."""
    n, heads, width = 262_144, 12, 64
    scale, backend = width**-0.5, geometric(n)
    qkv = [torch.randn(1, n, heads, width, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    grad = torch.randn_like(qkv[0])
    flops = 3.5 * (backend.flops(n, heads, width) or 0)
    ours = milliseconds(lambda: torch.autograd.grad(backend(*qkv), qkv, grad))
    alone = 0.0
    for w, r in backend.pattern.branches:
        q, k, v, grad_ = (
            x.detach()[:, ::r].reshape(n // w, w // r, heads, width).transpose(1, 2) for x in (*qkv, grad)
        )

        def both_ways(*given: torch.Tensor) -> None:
            out, lse = flash.forward(*given[1:], True, scale)
            flash.backward(*given, out, lse, True, scale)

        alone += milliseconds(partial(both_ways, grad_, q, k, v))
    print({name: f"{flops / taken / 1e9:.0f} TFLOP/s" for name, taken in (("dilated", ours), ("its kernels", alone))})
    assert alone / ours > 0.75


def test_64m_tokens_pass_forward_on_one_device() -> None:
    needs(130)
    n = 2**26
    q, k, v = (torch.randn(1, n, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    with torch.no_grad():
        out = geometric(n)(q, k, v)
        # A prefix of a causal sequence does not depend on what follows.
        prefix = geometric(n)(*(x[:, : 2**14] for x in (q, k, v)))
        torch.testing.assert_close(out[:, : 2**14], prefix, rtol=0, atol=1e-2)
    for p in (n - 1, n - 2, n // 2 + 12_345):
        for h in range(2):
            kept = [
                torch.arange(p // w * w + h % r, p + 1, r) for w, r in geometric(n).branches if (p % w) % r == h % r
            ]
            keys = torch.cat(kept).cuda()
            weights = (k[0, keys, h].float() @ q[0, p, h].float() / 8).softmax(0)
            torch.testing.assert_close(out[0, p, h].float(), weights @ v[0, keys, h].float(), rtol=0, atol=1e-2)
    print(f"{torch.cuda.max_memory_allocated() / 1e9:.0f} GB")


def test_the_papers_model_trains_on_1m_tokens_on_one_device() -> None:
    needs(130)
    r = recipe.load("parallel/longnet_1m")
    n, vocab = r.data.seq_len, 100_277  # of cl100k_base
    options = {"layers": 12, "dim": 768, "heads": 12, "ffn_dim": 3072, "attention": r.model.attention}
    assert options == {key: getattr(r.model, key) for key in options}
    model = Transformer(
        vocab, seq_len=n, positions="rope", activation_checkpointing="blocks_on_cpu", ffn_chunk=65_536, **options
    ).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(vocab, (1, n), device="cuda")
    losses = []
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            loss = token_losses(model.hidden(tokens), model.embedding.weight, tokens.roll(-1, 1)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0] < 20
    print(f"{losses}, {torch.cuda.max_memory_allocated() / 1e9:.0f} GB")
