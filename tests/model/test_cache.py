"""A network on a stream: chunks equal the whole, a past can be saved, and one that does not belong is refused."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longnet_kit.model import Transformer
from longnet_kit.model.cache import StreamCache, fingerprint
from tests.attention.oracle import dilated_options
from tests.model.small import DILATED, NAIVE_DILATED, VOCAB, network, some_tokens

pytestmark = pytest.mark.filterwarnings("ignore:no branch has dilation rate 1")
EXACT = 1e-10
BACKENDS = {
    "dilated": DILATED,
    "naive": NAIVE_DILATED,
    "sdpa": {"backend": "sdpa"},
    "xformers": {"backend": "xformers", "block_size": 16, "local_blocks": 2},
}


def exact_network(**options: Any) -> Transformer:
    """In float64, for evaluation."""
    return network(**options).double().eval()


def chunked(model: Transformer, tokens: torch.Tensor, sizes: list[int], cache: StreamCache) -> torch.Tensor:
    """Logits of tokens that come in chunks of these sizes, again and again."""
    ends = [0]
    while ends[-1] < tokens.shape[1]:
        ends.append(min(tokens.shape[1], ends[-1] + sizes[(len(ends) - 1) % len(sizes)]))
    return torch.cat([model(tokens[:, a:b], cache=cache) for a, b in pairwise(ends)], 1)


def whole(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens)


@settings(max_examples=150)
@given(
    options=dilated_options(),
    heads=st.sampled_from([1, 2, 4]),
    positions=st.sampled_from(["rope", "xpos", "none"]),
    batch=st.integers(1, 3),
    seq_len=st.integers(1, 300),
    sizes=st.lists(st.integers(1, 120), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_any_chunks_give_the_logits_of_the_whole(
    options: dict, heads: int, positions: str, batch: int, seq_len: int, sizes: list[int], seed: int
) -> None:
    """Segments of up to 60 tokens: their borders are crossed several times, and fall anywhere in the chunks."""
    attention = {"backend": "dilated", **options}
    model = exact_network(seed=seed, heads=heads, positions=positions, attention=attention)
    tokens = some_tokens(batch, seq_len, seed)
    given = chunked(model, tokens, sizes, model.new_cache(batch))
    assert (given - whole(model, tokens)).abs().max() < EXACT


@pytest.mark.parametrize("positions", ["rope", "xpos"])
@pytest.mark.parametrize("sizes", [[1], [150], [1, 100], [37], [64, 1, 1, 1]])
@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_streams_in_a_network(name: str, sizes: list[int], positions: str) -> None:
    model = exact_network(attention=BACKENDS[name], positions=positions)
    tokens = some_tokens(3, 150)
    cache = model.new_cache(3)
    assert (chunked(model, tokens, sizes, cache) - whole(model, tokens)).abs().max() < EXACT
    assert cache.position == 150


def test_chunked_feed_forward_layers_and_checkpointing_do_no_harm() -> None:
    model = exact_network(ffn_chunk=7, activation_checkpointing="blocks")
    tokens = some_tokens(2, 90)
    assert (chunked(model, tokens, [40], model.new_cache(2)) - whole(model, tokens)).abs().max() < EXACT


def test_a_cache_is_as_large_as_it_says_and_does_not_grow() -> None:
    model = network(seed=0).eval()
    cache = model.new_cache(3)
    entries = sum(-(-w // r) for w, r in zip(DILATED["segment_lengths"], DILATED["dilation_rates"], strict=True))
    assert cache.nbytes == 2 * entries * 2 * 3 * 4 * 8 * 4  # layers, entries, k and v, batch, heads, width, bytes
    before = cache.nbytes
    chunked(model, some_tokens(3, 500), [64], cache)
    assert cache.nbytes == before


@given(step=st.integers(1, 31), position=st.integers(0, 2**40), distance=st.integers(0, 2**20), pair=st.integers(0, 7))
def test_a_rotation_depends_on_the_distance_alone_however_far_out(
    step: int, position: int, distance: int, pair: int
) -> None:
    """Positions are exact: two tokens stand to each other as they would at the beginning, to rounding of float64."""
    embedding = network(dim=64, heads=4, seed=step).positions
    assert embedding is not None
    cos, sin = (
        x[:, 0, 0].double() for x in embedding.tables(torch.tensor([position, position + distance]), torch.float64)
    )
    near_cos, near_sin = (x[:, 0, 0].double() for x in embedding.tables(torch.tensor([distance]), torch.float64))
    turned = cos[0, pair] * cos[1, pair] + sin[0, pair] * sin[1, pair]  # of one position relative to the other
    assert abs(turned - near_cos[0, pair]) < 1e-14
    turned = cos[0, pair] * sin[1, pair] - sin[0, pair] * cos[1, pair]
    assert abs(turned - near_sin[0, pair]) < 1e-14


@pytest.mark.parametrize("start", [2**24 + 1, 2**31 - 50, 2**31 + 12_345, 3 * 2**40 + 7])
def test_a_stream_is_exact_at_any_position(start: int) -> None:
    """With the caches advanced, not replayed: what a token sees there is what it would see from the beginning.

    The start is a multiple of no segment; segments that hold nothing yet are opened by the padding tokens before.
    """
    model = exact_network(positions="rope")
    tokens = some_tokens(2, 200)
    period = 8 * 12 * 32  # of all segments: there everything begins anew
    begin = -(-start // period) * period
    cache = model.new_cache(2)
    cache.position = begin
    for layer in cache.layers:
        layer.position = begin
    given = chunked(model, tokens, [1, 50, 3], cache)
    assert cache.position == begin + 200
    assert (given - whole(model, tokens)).abs().max() < EXACT


def test_a_saved_past_goes_on_in_another_process(tmp_path: Path) -> None:
    model, tokens = exact_network(), some_tokens(2, 120)
    cache = model.new_cache(2)
    chunked(model, tokens[:, :67], [20], cache)
    torch.save(cache.state_dict(), tmp_path / "cache.pt")
    other = exact_network()
    loaded = other.new_cache(2)
    loaded.load_state_dict(torch.load(tmp_path / "cache.pt", weights_only=True))
    assert loaded.position == 67
    assert torch.equal(chunked(other, tokens[:, 67:], [9], loaded), chunked(model, tokens[:, 67:], [9], cache))


def test_a_saved_past_of_another_model_is_refused() -> None:
    model = exact_network()
    cache = model.new_cache(2)
    model(some_tokens(2, 5), cache=cache)
    state = cache.state_dict()
    other_branches = DILATED | {"dilation_rates": [1, 2, 2]}
    for other, batch, words in (
        (exact_network(seed=1), 2, "a model like this one with other weights"),
        (exact_network(layers=1), 2, "of another model: layers is 2 there and 1 here"),
        (exact_network(attention=other_branches), 2, "of another model: attention is .* there and .* here"),
        (exact_network(), 3, r"for 2 streams and this one for 3; load it into new_cache\(2\)"),
    ):
        with pytest.raises(ValueError, match=words):
            other.new_cache(batch).load_state_dict(state)
    with pytest.raises(ValueError, match="it has no layers"):
        model.new_cache(2).load_state_dict({key: x for key, x in state.items() if key != "layers"})
    layers = state["layers"]
    for wrong in ([], layers[:1], [{}, {}], [layers[0], layers[1] | {"position": 4}], 7):
        with pytest.raises(ValueError, match="its layers are not all there, or at different positions"):
            model.new_cache(2).load_state_dict(state | {"layers": wrong})
    exact_network(dropout=0.5, ffn_chunk=3).new_cache(2).load_state_dict(state)  # these change nothing


def test_what_does_not_go_with_a_cache_is_refused_and_moves_nothing() -> None:
    model = exact_network()
    cache = model.new_cache(2)
    tokens = some_tokens(2, 5)
    model(tokens, cache=cache)
    expected = model(tokens, cache=copy_of(model, cache))
    for wrong, words in (
        (lambda: exact_network()(tokens, cache=cache), "the cache is of another model"),
        (lambda: model(tokens[:1], cache=cache), "for 2 streams, and tokens has a batch of 1"),
        (lambda: model(tokens[:, :0], cache=cache), "give at least one token"),
        (lambda: model(tokens.double(), cache=cache), "tokens is torch.float64 on cpu, expected torch.int64 or int32"),
        (lambda: model(tokens + VOCAB, cache=cache), r"tokens holds \d+, and the model's vocabulary is 0 to 40"),
        (lambda: model(tokens - 99, cache=cache), r"tokens holds -\d+, and the model's vocabulary is 0 to 40"),
        (lambda: model(tokens, cache=cache, key_padding_mask=torch.ones(2, 5, dtype=torch.bool)), "no padding"),
        (lambda: model(tokens[0], cache=cache), "expected two dimensions"),
        (lambda: model.new_cache(0), "batch_size is 0"),
        (lambda: network(causal=False).new_cache(1), "not causal"),
        (lambda: dropping(model)(tokens, cache=cache), "call eval"),
    ):
        model.eval()
        with pytest.raises(ValueError, match=words):
            wrong()
        assert cache.position == 5
    model.eval()
    assert torch.equal(model(tokens, cache=cache), expected)


def copy_of(model: Transformer, cache: StreamCache) -> StreamCache:
    copied = model.new_cache(cache.batch_size)
    copied.load_state_dict(copy.deepcopy(cache.state_dict()))
    return copied


def dropping(model: Transformer) -> Transformer:
    """The model in training with dropout, until eval is called; then it drops nothing."""
    model.dropout.p = 0.5
    return model.train()


def test_a_cache_that_an_error_left_half_way_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = exact_network(), some_tokens(2, 5)
    cache = model.new_cache(2)
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(model.blocks[1], "forward", lambda *_: (_ for _ in ()).throw(MemoryError()))
        model(tokens, cache=cache)
    with pytest.raises(ValueError, match="left half-way by an error"):
        model(tokens, cache=cache)
    with pytest.raises(ValueError, match="nothing to save"):
        cache.state_dict()


def test_xpos_is_refused_once_a_stream_outgrows_it() -> None:
    model = network(positions="xpos", seq_len=64).eval()
    longest = model.positions.longest(torch.float32)
    cache = model.new_cache(1)
    reach = longest // 2 + 32  # centred for 64 tokens, the factor grows from there on
    cache.position = reach - 5
    for layer in cache.layers:
        layer.position = reach - 5
    model(some_tokens(1, 5), cache=cache)
    with pytest.raises(ValueError, match=r"positions: xpos reaches .* tokens in float32"):
        model(some_tokens(1, 1), cache=cache)
    fresh = model.new_cache(1)
    fresh.check_room(reach)
    with pytest.raises(ValueError, match="positions: xpos reaches"):
        fresh.check_room(reach + 1)


def test_under_autocast_the_cache_is_of_its_dtype() -> None:
    model, tokens = network().eval(), some_tokens(2, 60)
    with torch.autocast("cpu", torch.bfloat16):
        cache = model.new_cache(2)
        assert cache.layers[0].dtype == torch.bfloat16
        given = chunked(model, tokens, [7], cache)
        assert (given - whole(model, tokens)).abs().max() < 0.1
    with pytest.raises(ValueError, match=r"holds torch.bfloat16 and the model computes in torch.float32 now"):
        model(tokens, cache=cache)
    assert cache.position == 60
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens, cache=cache)  # nothing is lost


@pytest.mark.parametrize("attention", [DILATED, {"backend": "sdpa"}], ids=["dilated", "sdpa"])
def test_a_cache_of_inference_mode_goes_on_outside_of_it(attention: dict) -> None:
    model, tokens = exact_network(attention=attention), some_tokens(2, 90)
    with torch.inference_mode():
        cache = model.new_cache(2)
        parts = [model(tokens[:, :40], cache=cache)]
    parts.append(model(tokens[:, 40:60], cache=cache))
    with torch.inference_mode():
        parts.append(model(tokens[:, 60:], cache=cache))
    assert (torch.cat(parts, 1) - whole(model, tokens)).abs().max() < EXACT


def test_no_gradient_is_kept_from_chunk_to_chunk() -> None:
    model = network()
    cache = model.new_cache(2)
    assert not model(some_tokens(2, 5), cache=cache).requires_grad
    assert not model.hidden(some_tokens(2, 5), cache=cache).requires_grad


def test_the_limit_of_a_growing_cache_reaches_the_layers() -> None:
    model = network(attention={"backend": "sdpa"}).eval()
    with pytest.raises(ValueError, match=r"keeps every token, 10 at most.*give max_tokens=11"):
        model(some_tokens(1, 11), cache=model.new_cache(1, max_tokens=10))


def test_any_change_of_a_weight_shows_in_the_fingerprint() -> None:
    model = network()
    seen = {fingerprint(model)}
    for parameter in model.parameters():
        with torch.no_grad():
            place = parameter.flatten()[-1:]
            place.copy_(torch.nextafter(place, torch.tensor(9.0)))
        seen.add(fingerprint(model))
    with torch.no_grad():
        model.embedding.weight.copy_(model.embedding.weight.flip(0))
    seen.add(fingerprint(model))
    assert len(seen) == 2 + len(list(model.parameters()))
    assert fingerprint(model) == fingerprint(copy.deepcopy(model))
    double = network().double()
    before = fingerprint(double)
    with torch.no_grad():
        double.embedding.weight[0, 1].neg_()
    assert fingerprint(double) != before
