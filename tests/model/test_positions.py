"""Position embeddings: relative, exact far out, and refused where their numbers would overflow."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longnet_kit.model import positions
from longnet_kit.model.positions import Rope, XPos, rotate
from tests.model.small import network, some_tokens

D = 16
PI = Fraction("3.14159265358979323846264338327950288419716939937510582097494459")


def turned(embedding: Rope, qk: torch.Tensor, at: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """One query and one key, (D,) each, as they stand at two positions."""
    tables = embedding.tables(torch.tensor(at), torch.float64)
    out = rotate(qk.expand(1, 2, 2, 1, D), tables)
    return out[0, 0, 0, 0], out[0, 1, 1, 0]


@given(n=st.integers(0, 60_000), distance=st.integers(0, 1000), seed=st.integers(0, 99))
def test_rope_is_the_rotation_of_the_paper(n: int, distance: int, seed: int) -> None:
    """A score is the real part of sum_i q_i conj(k_i) e^(i (n - m) theta_i), with q_i and k_i as complex numbers."""
    qk = torch.randn(2, 1, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, k = turned(Rope(D), qk, [n + distance, n])
    pairs = torch.complex(qk[:, 0, : D // 2], qk[:, 0, D // 2 :])
    theta = torch.tensor([10_000 ** (-2 * i / D) for i in range(D // 2)], dtype=torch.float64)
    expected = (pairs[0] * pairs[1].conj() * torch.polar(torch.ones_like(theta), distance * theta)).real.sum()
    torch.testing.assert_close(q @ k, expected, rtol=0, atol=1e-9)


@given(n=st.integers(0, 60_000), distance=st.integers(0, 1000), seed=st.integers(0, 99))
def test_xpos_decays_with_the_distance_alone(n: int, distance: int, seed: int) -> None:
    """The score of RoPE, each pair of dimensions times gamma^(distance / 512)."""
    qk = torch.randn(2, 1, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, k = turned(XPos(D, 60_000, torch.float64), qk, [n + distance, n])
    pairs = torch.complex(qk[:, 0, : D // 2], qk[:, 0, D // 2 :])
    theta = torch.tensor([10_000 ** (-2 * i / D) for i in range(D // 2)], dtype=torch.float64)
    gamma = torch.tensor([(2 * i + 0.4 * D) / (1.4 * D) for i in range(D // 2)], dtype=torch.float64)
    turn = torch.polar(gamma ** (distance / 512), distance * theta)
    expected = (pairs[0] * pairs[1].conj() * turn).real.sum()
    torch.testing.assert_close(q @ k, expected, rtol=1e-7, atol=1e-8)


def test_xpos_factors_span_the_least_range() -> None:
    """At the two ends of the sequence they are each other's inverses, for queries and for keys."""
    cos, sin = XPos(D, 4096).tables(torch.tensor([0, 2048, 4096]), torch.float64)
    factor = (cos.square() + sin.square()).sqrt()[:, :, 0]  # (position, query or key, D)
    torch.testing.assert_close(factor[0] * factor[2], torch.ones(2, D, dtype=torch.float64))
    torch.testing.assert_close(factor[1], torch.ones(2, D, dtype=torch.float64))
    assert factor[0, 0].max() == pytest.approx((2 / 7) ** -4)
    assert factor[0, 1].min() == pytest.approx((2 / 7) ** 4)


@pytest.mark.parametrize(
    ("dtype", "longest"), [(torch.float32, 54_391), (torch.bfloat16, 54_391), (torch.float64, 562_041)]
)
def test_xpos_is_refused_exactly_where_its_factor_leaves_less_than_2_to_the_30_of_the_range(
    dtype: torch.dtype, longest: int
) -> None:
    assert XPos.longest(dtype) == longest
    limits = torch.finfo(dtype)
    for length, fits in ((longest, True), (longest + 1, False)):
        smallest = (2 / 7) ** (length / 2 / 512)
        assert (smallest >= limits.tiny * 2**30 and 2**30 / smallest <= limits.max) is fits
    XPos(D, longest, dtype)
    says = rf"{longest:,} tokens in {str(dtype)[6:]}.*got {longest + 1:,} tokens; use positions: rope"
    with pytest.raises(ValueError, match=says):
        XPos(D, longest + 1, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_xpos_computes_large_and_small_queries_and_keys_at_its_limit(dtype: torch.dtype) -> None:
    """A score at either end of the longest sequence, against float64: of q and k times 2^28 and 2^-28."""
    longest = XPos.longest(dtype)
    at = torch.tensor([0, 3, longest - 3, longest - 1])
    for size in (2.0**28, 2.0**-28):
        qk = (torch.randn(1, 4, 2, 1, D, generator=torch.Generator().manual_seed(1)) * size).to(dtype)
        q, k = (x.double() for x in rotate(qk, XPos(D, longest, dtype).tables(at, torch.float32)).unbind(2))
        right_q, right_k = rotate(qk.double(), XPos(D, longest, dtype).tables(at, torch.float64)).unbind(2)
        for i in (1, 3):
            found, right = (q[0, i] * k[0, i - 1]).sum(), (right_q[0, i] * right_k[0, i - 1]).sum()
            scale = (right_q[0, i] * right_k[0, i - 1]).abs().sum()
            assert (found - right).abs() < 2 * torch.finfo(dtype).eps * scale


def test_xpos_in_float16_is_refused_however_the_model_came_to_it() -> None:
    options = {"positions": "xpos", "attention": {"backend": "sdpa"}}
    says = "xpos does not run in float16.*use positions: rope, or a precision"
    with pytest.raises(ValueError, match=says):
        network(**options, compute_dtype=torch.float16)
    net, tokens = network(**options).eval(), some_tokens()
    assert net(tokens).isfinite().all()
    cache = net.new_cache(2)
    with torch.autocast("cpu", torch.float16):
        for arguments in ({}, {"positions": torch.arange(32)}):
            with pytest.raises(ValueError, match=says):
                net(tokens, **arguments)
        with pytest.raises(ValueError, match=says):
            cache.check_room(1)
    with pytest.raises(ValueError, match=says):
        net.half()(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert network(**options)(tokens).isfinite().all()


def test_a_network_with_xpos_refuses_more_tokens_than_it_can_represent() -> None:
    net = network(positions="xpos", seq_len=54_000, attention={"backend": "sdpa"}, layers=1)
    tokens = some_tokens(1, 3)
    net(tokens, positions=torch.tensor([0, 1, 54_194]))
    with pytest.raises(ValueError, match="54,195 tokens in float32.*got 54,196 tokens in a model built for 54,000"):
        net(torch.zeros(1, 54_196, dtype=torch.long))
    with pytest.raises(ValueError, match="54,195 tokens in float32.*got 54,196 tokens"):
        net(tokens, positions=torch.tensor([0, 1, 54_195]))
    with pytest.raises(ValueError, match="positions from -195 on in a model built for 54,000 tokens, and got -196"):
        net(tokens, positions=torch.tensor([0, 1, -196]))
    with pytest.raises(ValueError, match="got 80,000 tokens"):
        network(positions="xpos", seq_len=80_000)


@pytest.mark.parametrize("far", [2**24 + 1, 2**30 + 3, 10**12 + 7, 2**62 + 1, -5, -(2**62)])
def test_the_turn_of_a_position_is_its_multiple_of_one_steps_turn(far: int) -> None:
    """In 2^-64 of a turn: against integers of any size. The bound is four units of float64's rounding of a turn."""
    cos, sin = Rope(D).tables(torch.tensor([far]), torch.float64)
    for i in range(D // 2):
        step = round(Fraction(10_000 ** (-2 * i / D)) / (2 * PI) * 2**64)
        angle = 2 * math.pi * (((far * step + 2**63) % 2**64 - 2**63) / 2**64)
        assert cos[0, 0, 0, i].item() == pytest.approx(math.cos(angle), abs=1e-15)
        assert sin[0, 0, 0, D // 2 + i].item() == pytest.approx(math.sin(angle), abs=1e-15)


@pytest.mark.parametrize("far", [2**24 + 1, 2**30 + 3, 10**12 + 7])
def test_rope_is_exact_far_past_float32_integers(far: int) -> None:
    """Against angles reduced in exact integer and high-precision arithmetic."""
    cos, sin = Rope(D).tables(torch.tensor([far]), torch.float64)
    for i in range(0, D // 2, 2):  # theta is a power of ten there, so exactly known
        theta = Fraction(1, 10 ** (i // 2))
        angle = float((far * theta) % (2 * PI))
        tolerance = 2.0**-51 * far * float(theta) + 1e-12
        assert cos[0, 0, 0, i].item() == pytest.approx(math.cos(angle), abs=tolerance)
        assert sin[0, 0, 0, D // 2 + i].item() == pytest.approx(math.sin(angle), abs=tolerance)


def test_far_positions_give_the_scores_of_near_ones() -> None:
    """In float32, whose integers end at 2^24, neighbours would coincide were angles not taken in float64."""
    net = network(attention={"backend": "naive"}).eval()
    tokens = some_tokens()
    near = net(tokens)
    far = net(tokens, positions=torch.arange(32) + 2**31)
    torch.testing.assert_close(far, near, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["rope", "xpos"])
def test_positions_feed_the_embedding_and_never_the_pattern(kind: str) -> None:
    net = network(positions=kind).double()
    tokens = some_tokens()
    shifted = net(tokens, positions=torch.arange(32) + 5)
    torch.testing.assert_close(shifted, net(tokens), rtol=0, atol=1e-9)
    assert not torch.allclose(net(tokens, positions=torch.arange(32) * 3), net(tokens))


def test_each_row_may_have_positions_of_its_own() -> None:
    net = network().double()
    tokens = some_tokens()
    rows = torch.stack([torch.arange(32), torch.arange(32) * 2])
    both = net(tokens, positions=rows)
    for row in range(2):
        alone = net(tokens[row : row + 1], positions=rows[row])
        torch.testing.assert_close(both[row : row + 1], alone, rtol=0, atol=1e-12)


def test_without_positions_order_before_the_last_token_does_not_matter_to_dense_attention() -> None:
    tokens = some_tokens(1)
    shuffled = torch.cat([tokens[:, :-1].flip(1), tokens[:, -1:]], dim=1)
    for kind, same in (("none", True), ("rope", False)):
        # One layer: what each position sees in the second depends on the order under a causal mask.
        net = network(positions=kind, attention={"backend": "naive"}, layers=1).double()
        assert torch.allclose(net(tokens)[:, -1], net(shuffled)[:, -1]) is same


def test_casting_the_model_does_not_round_the_angles() -> None:
    net = network().bfloat16()
    assert not list(net.buffers())
    tables = net._tables(some_tokens(1, 32), torch.arange(32) + 300)
    assert tables is not None and tables[0].dtype == torch.float32
    torch.testing.assert_close(tables[0], Rope(8).tables(torch.arange(32) + 300, torch.float32)[0], rtol=0, atol=0)


def test_rotation_computes_in_float32_at_least() -> None:
    tables = Rope(D).tables(torch.arange(50), torch.float32)
    qk = torch.randn(2, 50, 2, 3, D).bfloat16()
    assert torch.equal(rotate(qk, tables), rotate(qk.float(), tables).bfloat16())


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 'rope', 'xpos' or 'none'"):
        positions.build("learned", head_dim=8, seq_len=8, causal=True)  # type: ignore[arg-type]
