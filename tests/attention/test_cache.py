"""Streams: chunks of any size on a cache give what the whole sequence gives, in memory that is stated beforehand."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longnet_kit import attention
from longnet_kit.attention import views
from longnet_kit.attention.cache import Cache
from longnet_kit.attention.dilated_cached import DilatedCache
from tests.attention.oracle import dilated_options

pytestmark = pytest.mark.filterwarnings("ignore:no branch has dilation rate 1")
EXACT = 1e-10

CONFIGS = {
    "dilated": {"backend": "dilated", "segment_lengths": [8, 20, 48], "dilation_rates": [1, 3, 4]},
    "dilated, no rate of 1": {"backend": "dilated", "segment_lengths": [16, 40], "dilation_rates": [2, 6]},
    "naive": {"backend": "naive"},
    "naive dilated": {
        "backend": "naive",
        "pattern": {"kind": "dilated", "segment_lengths": [4, 10], "dilation_rates": [1, 3]},
    },
    "sdpa": {"backend": "sdpa"},
    "xformers fixed": {"backend": "xformers", "block_size": 16, "local_blocks": 2},
    "xformers local": {"backend": "xformers", "pattern": "local", "block_size": 16, "local_blocks": 3},
}


def chunked(
    backend: attention.AttentionBackend, qkv: torch.Tensor, cuts: list[int], cache: Cache | None = None
) -> torch.Tensor:
    """Attention to a stream, (B, N, 3, H, D), that comes in chunks between the cuts."""
    batch, seq_len, _, heads, head_dim = qkv.shape
    if cache is None:
        cache = backend.new_cache(batch, heads, head_dim, dtype=qkv.dtype)
        if isinstance(cache, DilatedCache):
            cache.entries.fill_(float("nan"))  # what was not written must not be read
    ends = [0, *sorted(set(cuts) & set(range(1, seq_len))), seq_len]
    return torch.cat([backend(*qkv[:, a:b].unbind(2), cache=cache) for a, b in pairwise(ends)], 1)


def stream(batch: int, seq_len: int, heads: int, head_dim: int = 4, seed: int = 0) -> torch.Tensor:
    """Queries, keys and values as a projection leaves them: (B, N, 3, H, D)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, seq_len, 3, heads, head_dim, dtype=torch.float64, generator=generator)


def cuts(seq_len: int) -> st.SearchStrategy[list[int]]:
    """Chunks of one token, of a few, of any size."""
    return st.one_of(
        st.just(list(range(seq_len))),
        st.integers(2, 40).map(lambda step: list(range(0, seq_len, step))),
        st.lists(st.integers(1, max(1, seq_len)), max_size=8),
        st.integers(1, max(1, seq_len)).map(lambda first: list(range(first, seq_len))),  # a prompt, then tokens
    )


@settings(max_examples=300)
@given(data=st.data(), options=dilated_options(), batch=st.integers(1, 3), seq_len=st.integers(1, 200))
def test_any_chunks_of_any_branches_equal_the_whole(data: st.DataObject, options: dict, batch: int, seq_len: int):
    qkv = stream(batch, seq_len, data.draw(st.integers(1, 7), "heads"), data.draw(st.sampled_from([1, 4]), "head_dim"))
    backend = attention.build({"backend": "dilated", **options})
    whole = backend(*qkv.unbind(2))
    assert (chunked(backend, qkv, data.draw(cuts(seq_len), "cuts")) - whole).abs().max() < EXACT


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=40)
@given(data=st.data())
def test_every_backend_streams(name: str, data: st.DataObject) -> None:
    seq_len = data.draw(st.integers(1, 150), "seq_len")
    qkv = stream(data.draw(st.integers(1, 3), "batch"), seq_len, data.draw(st.integers(1, 5), "heads"))
    backend = attention.build(CONFIGS[name])
    whole = backend(*qkv.unbind(2))
    assert (chunked(backend, qkv, data.draw(cuts(seq_len), "cuts")) - whole).abs().max() < EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_narrow_dtypes_stream(name: str, dtype: torch.dtype) -> None:
    qkv = stream(2, 70, 3, 8).to(dtype)
    backend = attention.build(CONFIGS[name])
    whole = backend(*qkv.double().unbind(2))
    out = chunked(backend, qkv, [1, 2, 30, 31, 60])
    assert out.dtype == dtype
    assert (out.double() - whole).abs().max() < {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "within"), [(torch.float64, EXACT), (torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 5e-3)]
)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_gpu_streams(name: str, dtype: torch.dtype, within: float) -> None:
    qkv = stream(2, 150, 4, 16)
    backend = attention.build(CONFIGS[name])
    whole = backend(*qkv.unbind(2))
    cache = backend.new_cache(2, 4, 16, dtype=dtype, device="cuda")
    out = chunked(backend, qkv.to("cuda", dtype), [1, 2, 30, 31, 97], cache)
    assert (out.double().cpu() - whole).abs().max() < within


@example(options={"segment_lengths": [7, 14], "dilation_rates": [1, 2]}, tokens=3, first=4, heads=2)  # ends a segment
@example(options={"segment_lengths": [7, 14], "dilation_rates": [1, 2]}, tokens=17, first=11, heads=2)
@given(options=dilated_options(), tokens=st.integers(1, 60), first=st.integers(0, 200), heads=st.integers(1, 7))
def test_views_of_a_chunk_hold_each_kept_position_once(options: dict, tokens: int, first: int, heads: int) -> None:
    pattern = attention.build({"backend": "dilated", **options}).pattern
    whole = first + tokens
    for w, r in pattern.branches:
        found = views.chunk_views(tokens, first % w, w, r, pattern.head_offsets, 0, heads, heads)
        visits = torch.zeros(1, tokens, heads)
        for view in (*(view for view, *_ in found.opened), *found.begun):
            for (part,) in view.calls(visits):
                part += 1
        assert torch.equal(visits[0], pattern.keeps((w, r), whole, heads)[:, first:].T.float())
        visits.zero_()
        for view, before, after in found.last:
            for (part,) in view.calls(visits):
                part += 1
            assert before + view.kept + after <= -(-w // r)
        is_open = torch.arange(first, whole) // w == whole // w  # of the segment that the next token is in
        assert torch.equal(visits[0] > 0, pattern.keeps((w, r), whole, heads)[:, first:].T & is_open[:, None])


def test_a_dilated_cache_has_the_stated_size_and_keeps_it() -> None:
    lengths, rates = [8, 20, 48, 7], [1, 3, 4, 9]
    backend = attention.build({"backend": "dilated", "segment_lengths": lengths, "dilation_rates": rates})
    cache = backend.new_cache(2, 5, 4, dtype=torch.float64)
    entries = sum(-(-w // r) for w, r in zip(lengths, rates, strict=True))
    assert cache.nbytes == 2 * 2 * 5 * entries * 4 * 8  # keys and values, batch, heads, entries, width, bytes
    place = cache.entries.data_ptr()
    chunked(backend, stream(2, 300, 5), [1, 2, 100, 101], cache)
    assert cache.position == 300 and cache.entries.data_ptr() == place


def test_a_growing_cache_grows_to_its_limit_and_says_so() -> None:
    backend = attention.build({"backend": "sdpa"})
    cache = backend.new_cache(1, 2, 4, dtype=torch.float64, max_tokens=100)
    qkv = stream(1, 101, 2)
    out = chunked(backend, qkv[:, :100], [3, 4, 50, 99], cache)
    assert (out - backend(*qkv[:, :100].unbind(2))).abs().max() < EXACT
    assert cache.nbytes == 2 * 100 * 2 * 4 * 8
    with pytest.raises(ValueError, match=r"keeps every token, 100 at most, and holds 100; 1 more do not fit.*dilated"):
        backend(*qkv[:, 100:].unbind(2), cache=cache)
    assert cache.position == 100
    with pytest.raises(ValueError, match="max_tokens is 0"):
        backend.new_cache(1, 2, 4, max_tokens=0)


def test_the_limit_of_a_growing_cache_is_stated() -> None:
    cache = attention.build({"backend": "naive"}).new_cache(1, 1, 1)
    with pytest.raises(ValueError, match="65,536 at most"):
        cache.check_room(65_537)
    cache.check_room(65_536)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("at", [1, 37, 48, 96])
def test_a_saved_cache_goes_on(name: str, at: int) -> None:
    backend = attention.build(CONFIGS[name])
    qkv = stream(2, 130, 4)
    first = backend.new_cache(2, 4, 4, dtype=torch.float64)
    chunked(backend, qkv[:, :at], [5], first)
    second = backend.new_cache(2, 4, 4, dtype=torch.float64)
    second.load_state_dict(first.state_dict())
    undisturbed = chunked(backend, qkv[:, at:], [at + 1, at + 7], first)
    assert torch.equal(chunked(backend, qkv[:, at:], [at + 1, at + 7], second), undisturbed)


@pytest.mark.parametrize("name", ["dilated", "sdpa"])
def test_a_saved_cache_of_another_shape_is_refused(name: str) -> None:
    backend = attention.build(CONFIGS[name])
    cache = backend.new_cache(2, 4, 4, dtype=torch.float64)
    chunked(backend, stream(2, 10, 4), [], cache)
    for other in ((1, 4, 4, torch.float64), (2, 3, 4, torch.float64), (2, 4, 8, torch.float64), (2, 4, 4, torch.float)):
        *sizes, dtype = other
        with pytest.raises(ValueError, match="the saved keys and values are torch.float64 of shape"):
            backend.new_cache(*sizes, dtype=dtype).load_state_dict(cache.state_dict())


def test_what_a_cache_does_not_take_is_refused() -> None:
    backend = attention.build(CONFIGS["dilated"])
    x = torch.randn(2, 3, 4, 8)
    cache = backend.new_cache(2, 4, 8)
    for inputs, options, words in (
        ((x[:1],) * 3, {}, "for a batch of 2 and 4 heads of 8, and got a batch of 1"),
        ((x[:, :, :3],) * 3, {}, "got a batch of 2 and 3 heads of 8"),
        ((x.double(),) * 3, {}, "holds torch.float32 on cpu, and got torch.float64"),
        ((x,) * 3, {"causal": False}, "attention with one is causal"),
        ((x,) * 3, {"key_padding_mask": torch.ones(2, 3, dtype=torch.bool)}, "there is no padding"),
        ((x,) * 3, {"first_head": 2, "total_heads": 6}, "a cache is for all heads of a layer, and 4 of 6 came"),
    ):
        with pytest.raises(ValueError, match=words):
            backend(*inputs, cache=cache, **options)
    assert cache.position == 0


def test_a_backend_without_a_cache_says_so() -> None:
    class Plain(attention.AttentionBackend):
        def forward(self, q, k, v, causal=True, key_padding_mask=None):
            return v

    x = torch.zeros(1, 3, 2, 4)
    with pytest.raises(ValueError, match=r"Plain has no cache.*new_cache and forward_cached.*KeyValueCache"):
        Plain().new_cache(1, 2, 4)
    with pytest.raises(ValueError, match="Plain has no cache"):
        Plain()(x, x, x, cache=attention.KeyValueCache(1, 2, 4))


def test_no_gradient_flows_through_a_cache() -> None:
    backend = attention.build(CONFIGS["dilated"])
    x = torch.randn(1, 3, 4, 8, requires_grad=True)
    assert not backend(x, x, x, cache=backend.new_cache(1, 4, 8)).requires_grad
