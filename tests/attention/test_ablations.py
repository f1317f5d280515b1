"""What `overlap` and `mixing` choose: keys that count once, and weights that branches have of their own."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from longnet_kit import attention, cli
from longnet_kit.attention import dilated_op, dilated_union, maps
from longnet_kit.attention.sharding import bind
from longnet_kit.parallel import threads
from longnet_kit.parallel.threads import ThreadShard
from longnet_kit.plan.ledger import without_data
from longnet_kit.testing import mixed_reference
from tests.attention.oracle import EXACT, Problem, dilated_options, problem, problems
from tests.attention.test_cache import chunked, cuts, stream
from tests.attention.test_sharding import cases, sharded_outcome

pytestmark = pytest.mark.filterwarnings("ignore:no branch has dilation rate 1")
SMALL: dict[str, Any] = {"backend": "dilated", "segment_lengths": [40, 4, 10], "dilation_rates": [4, 1, 3]}
UGLY = [
    (1, 5, [4], [1]),
    (31, 2, [64], [5]),  # w > N, r > H
    (24, 3, [2, 24], [5, 1]),  # r > w
    (37, 4, [16, 32], [1, 6]),  # N prime, w no multiple of r
    (7, 3, [3, 3, 3], [2, 1, 2]),  # repeated branches
    (50, 5, [8, 16, 32], [2, 4, 8]),  # no rate of 1, H no multiple of r
    (41, 7, [1, 41], [1, 40]),
    (40, 3, [10, 15, 40], [1, 1, 2]),  # one does not divide the next
]
MIXING = ("equal", "learned")
OPTIONS = ({"overlap": "set"}, {"mixing": "equal"}, {"mixing": "learned"})
ablated = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options.values())))


def build(options: dict[str, Any], logits: Tensor | None = None) -> attention.AttentionBackend:
    """A dilated backend in float64; learned weights are those given, or drawn."""
    backend = attention.build({"backend": "dilated", **options}).double()
    for parameter in backend.parameters():
        parameter.data = 2 * torch.randn_like(parameter) if logits is None else logits
    return backend


def by_hand(backend: attention.AttentionBackend, logits: Tensor, *inputs: Any) -> Tensor:
    """sum_i a_i softmax_i v, each branch by itself from `naive`, the weights one (position, head) at a time."""
    pattern: Any = backend.pattern
    q = inputs[0]
    _, seq_len, heads, _ = q.shape
    outs = []
    for w, r in pattern.branches:
        alone = {"kind": "dilated", "segment_lengths": [w], "dilation_rates": [r], "head_offsets": pattern.head_offsets}
        outs.append(attention.build({"backend": "naive", "pattern": alone})(*inputs))
    rows = []
    for p in range(seq_len):
        for h in range(heads):
            keep = [i for i, (w, r) in enumerate(pattern.branches) if p % w % r == pattern.offset(h, r, heads)]
            a = logits[keep].softmax(0)
            rows.append(sum((a_i * outs[i][:, p, h] for a_i, i in zip(a, keep, strict=True)), outs[0][:, p, h] * 0))
    return torch.stack(rows, 1).view(q.shape)


@given(problems(), dilated_options())
def test_a_set_is_one_softmax_over_keys_that_count_once(drawn: Problem, options: dict) -> None:
    backend = build(options | {"overlap": "set"})
    drawn.assert_matches(backend, backend.pattern)  # type: ignore[arg-type]


@given(drawn=problems(), options=dilated_options())
def test_naive_takes_the_set_too(drawn: Problem, options: dict) -> None:
    pattern = {"kind": "dilated", "overlap": "set", **options}
    slow, fast = attention.build({"backend": "naive", "pattern": pattern}), build(options | {"overlap": "set"})
    drawn.assert_matches(slow, fast.pattern)  # type: ignore[arg-type]


@given(options=dilated_options(), seq_len=st.integers(1, 60), heads=st.integers(1, 7), causal=st.booleans())
def test_the_set_is_the_multiset_with_counts_clipped(options: dict, seq_len: int, heads: int, causal: bool) -> None:
    every, once = build(options).pattern, build(options | {"overlap": "set"}).pattern
    m = once.multiplicity(seq_len, heads, causal)  # type: ignore[union-attr]
    assert torch.equal(m, every.multiplicity(seq_len, heads, causal).clamp(max=1))  # type: ignore[union-attr]
    assert once.pairs(seq_len, heads, causal) == m.sum()  # type: ignore[union-attr]


@given(options=dilated_options(), seq_len=st.integers(1, 60), heads=st.integers(1, 7), causal=st.booleans())
def test_every_key_is_due_to_one_branch(options: dict, seq_len: int, heads: int, causal: bool) -> None:
    for overlap in ("set", "multiset"):
        pattern: Any = build(options | {"overlap": overlap}).pattern
        queries = torch.arange(seq_len)
        due = dict(pattern.rows_due(queries, seq_len, heads, causal))
        assert sorted(due) == list(range(len(pattern.branches)))
        assert torch.equal(sum(due.values()), pattern.rows(queries, seq_len, heads, causal))  # type: ignore[arg-type]


def test_relations_of_nested_branches_stay_few() -> None:
    """Inclusion and exclusion over 20 branches would have a million terms."""
    from longnet_kit.attention import unions

    branches = [(4 << i, 1 << i) for i in range(20)]
    assert len(unions.signed(branches, [0] * 20, 4096)) < 60


def test_what_sparse_branches_share_takes_the_space_of_what_they_keep() -> None:
    from longnet_kit.attention import unions

    found = unions.signed([(4096, 32), (8192, 48), (1 << 15, 64)], [0] * 3, 1 << 16)
    assert sum(len(relation.positions) for relation, _ in found) < (1 << 16) / 8


@pytest.mark.parametrize(("lengths", "rates"), [([4, 12], [1, 2]), ([8], [1])])
def test_weights_drawn_anew_have_equal_branches(lengths: list[int], rates: list[int]) -> None:
    from longnet_kit.model import Transformer

    attention = {"backend": "dilated", "segment_lengths": lengths, "dilation_rates": rates, "mixing": "learned"}
    network = Transformer(7, dim=8, layers=2, heads=2, ffn_dim=8, seq_len=16, attention=attention)
    for backend in network.attention_backends:
        torch.nn.init.normal_(backend.branch_logits)
    network.reset_parameters()
    assert not any(backend.branch_logits.any() for backend in network.attention_backends)


@pytest.mark.parametrize("mixing", MIXING)
@given(drawn=problems(max_seq_len=24), options=dilated_options())
@settings(max_examples=60)
def test_own_weights_mix_the_softmax_of_each_branch(mixing: str, drawn: Problem, options: dict) -> None:
    backend = build(options | {"mixing": mixing})
    logits = backend.branch_logits.detach().double()  # type: ignore[union-attr]
    out, grad = drawn.outcome(backend)
    for reference in (partial(by_hand, backend, logits), partial(mixed_reference, backend.pattern, logits)):  # type: ignore[arg-type]
        expected, expected_grad = drawn.outcome(reference)
        assert (out - expected).abs().max() < EXACT
        assert (grad - expected_grad).abs().max() < EXACT


@given(drawn=problems(max_seq_len=24), options=dilated_options())
def test_the_gradient_of_learned_weights_is_that_of_the_definition(drawn: Problem, options: dict) -> None:
    backend = build(options | {"mixing": "learned"})
    logits: Any = backend.branch_logits
    out = backend(*drawn.qkv.unbind(2), drawn.causal, drawn.mask)
    (grad,) = torch.autograd.grad(out, logits, drawn.grad_out)
    other = logits.detach().clone().requires_grad_()
    expected = by_hand(backend, other, *drawn.qkv.unbind(2), drawn.causal, drawn.mask)
    (wanted,) = torch.autograd.grad(expected, other, drawn.grad_out, allow_unused=True)
    assert (grad - (0 if wanted is None else wanted)).abs().max() < EXACT


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("seq_len", "heads", "lengths", "rates"), UGLY)
@ablated
def test_hard_shapes(options: dict, causal: bool, seq_len: int, heads: int, lengths: list, rates: list) -> None:
    for head_offsets in ("interleaved", "grouped", "none"):
        branches = {"segment_lengths": lengths, "dilation_rates": rates, "head_offsets": head_offsets}
        backend = build(branches | options)
        one_left = torch.arange(seq_len) == torch.tensor([[0], [seq_len // 2], [seq_len - 1]])
        for mask in (None, torch.rand(3, seq_len) < 0.7, one_left):
            drawn = problem(3, seq_len, heads, 8, causal, mask)
            if backend.branch_logits is None:
                drawn.assert_matches(backend, backend.pattern)  # type: ignore[arg-type]
                continue
            expected = drawn.outcome(partial(mixed_reference, backend.pattern, backend.branch_logits.detach().double()))  # type: ignore[arg-type]
            for found, wanted in zip(drawn.outcome(backend), expected, strict=True):
                assert (found - wanted).abs().max() < EXACT


@ablated
def test_gradients_are_derivatives(options: dict) -> None:
    backend = build(SMALL | options)
    qkv = torch.randn(1, 21, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    parameters = list(backend.parameters())

    def run(qkv: Tensor, *_: Tensor) -> Tensor:
        return backend(*qkv.unbind(2))

    assert torch.autograd.gradcheck(run, (qkv, *parameters))


def test_the_defaults_are_the_papers_bit_for_bit() -> None:
    drawn = problem(2, 43, 5, 8, mask=torch.rand(2, 43) < 0.7)
    drawn.qkv = drawn.qkv.float()
    drawn.grad_out = drawn.grad_out.float()
    named = attention.build(SMALL | {"overlap": "multiset", "mixing": "denominators"})
    q, k, v = attention.padding.hide(*drawn.qkv.unbind(2), drawn.mask)  # type: ignore[arg-type]
    out, _ = dilated_op.dilated(q, k, v, [40, 4, 10], [4, 1, 3], "interleaved", 0, 5, True, 8**-0.5)
    for backend in (named, attention.build(SMALL)):
        assert not list(backend.parameters()) and backend.branch_logits is None
        found, _ = drawn.outcome(backend)
        assert torch.equal(found, attention.padding.reveal(out, drawn.mask))  # type: ignore[arg-type]


def test_keys_that_two_branches_show_count_once() -> None:
    """Scores are all 0: two keys of one branch, the second of which the other shows too."""
    q = torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    v = torch.tensor([0.0, 6.0], dtype=torch.float64).view(1, 2, 1, 1)
    branches = {"segment_lengths": [1, 2], "dilation_rates": [1, 1]}
    assert [build(branches | options)(q, q, v)[0, 1].item() for options in ({}, *OPTIONS[:2])] == pytest.approx(
        [4, 3, 4.5]
    )


@pytest.mark.parametrize("mixing", MIXING)
def test_weights_are_equal_at_first(mixing: str) -> None:
    backend = attention.build(SMALL | {"mixing": mixing})
    shares = backend.branch_weights(*(torch.randn(1, 40, 3, 4) for _ in range(2)))
    kept = shares > 0
    assert torch.allclose(shares, kept / kept.sum(0))
    assert [name for name, _ in backend.named_parameters()] == (["mixing.logits"] if mixing == "learned" else [])


@given(drawn=problems(), options=dilated_options(), ablation=st.sampled_from(OPTIONS))
def test_maps_and_shares_are_what_is_computed(drawn: Problem, options: dict, ablation: dict) -> None:
    backend = build(options | ablation)
    q, k, v = drawn.qkv.unbind(2)
    weights = backend.attention_map(q, k, None, drawn.causal, drawn.mask)
    clean = v if drawn.mask is None else v.masked_fill(~drawn.mask[:, :, None, None], 0)
    out = backend(q, k, v, drawn.causal, drawn.mask).detach()
    assert (torch.einsum("bhpk,bkhd->bphd", weights, clean) - out).abs().max() < EXACT
    shares = backend.branch_weights(q, k, drawn.causal, drawn.mask)
    assert shares.dtype == torch.float64 and not shares.requires_grad
    assert (shares.sum(0) - weights.sum(-1).transpose(1, 2)).abs().max() < EXACT
    if "overlap" in ablation:
        slow = attention.build({"backend": "naive", "pattern": {"kind": "dilated", **options, **ablation}})
        assert (slow.branch_weights(q, k, drawn.causal, drawn.mask) - shares).abs().max() < EXACT


@pytest.mark.parametrize("head_offsets", ["interleaved", "grouped", "none"])
@ablated
def test_some_heads_are_told_where_they_stand(options: dict, head_offsets: str) -> None:
    backend, drawn = build(SMALL | options | {"head_offsets": head_offsets}), problem(2, 31, 7)
    whole = drawn.outcome(backend)
    some = Problem(drawn.qkv[:, :, :, 2:5], drawn.grad_out[:, :, 2:5], True, None)
    outcome = some.outcome(lambda q, k, v, causal, mask: backend(q, k, v, causal, mask, first_head=2, total_heads=7))
    assert (outcome[0] - whole[0][:, :, 2:5]).abs().max() < EXACT
    assert (outcome[1] - whole[1][:, :, :, 2:5]).abs().max() < EXACT
    q, k, _ = drawn.qkv.unbind(2)
    for look in (backend.branch_weights, backend.attention_map):
        at = (slice(None),) * (3 if look == backend.branch_weights else 1)
        found = look(q[:, :, 2:5], k[:, :, 2:5], first_head=2, total_heads=7)
        assert (found - look(q, k)[*at, 2:5]).abs().max() < EXACT


@pytest.mark.parametrize("mixing", MIXING)
@given(case=cases())
@settings(max_examples=40)
def test_own_weights_from_shards_give_what_the_whole_gives(mixing: str, case: tuple) -> None:
    size, given, config = case
    config = config | {"mixing": mixing}
    expected = given.outcome(attention.build(config).double())
    for found, whole in zip(sharded_outcome(given, config, size, {}), expected, strict=True):
        assert (found - whole).abs().max() < EXACT
    q, k, _ = given.qkv.unbind(2)
    whole = attention.build(config).branch_weights(q, k, given.causal, given.mask)
    assert (torch.cat(threads.run(size, partial(shares_of_shard, config, given)), 2) - whole).abs().max() < EXACT


def test_the_gradient_of_learned_weights_adds_up_over_shards() -> None:
    config = SMALL | {"segment_lengths": [24, 4, 16], "mixing": "learned"}
    given, logits = problem(2, 24, 5), torch.randn(3, dtype=torch.float64)
    whole = gradient_of_logits(config, logits, given)
    parts = threads.run(3, partial(gradient_of_logits, config, logits, given))
    assert (sum(parts) - whole).abs().max() < EXACT  # type: ignore[arg-type]


def gradient_of_logits(config: dict, logits: Tensor, given: Problem, shard: ThreadShard | None = None) -> Tensor:
    backend = build(config, logits.clone())
    bind(backend, shard)
    qkv, grad_out = (x if shard is None else x.chunk(shard.size, 1)[shard.rank] for x in (given.qkv, given.grad_out))
    (grad,) = torch.autograd.grad(backend(*qkv.unbind(2)), list(backend.parameters()), grad_out)
    return grad


def shares_of_shard(config: dict, given: Problem, shard: ThreadShard) -> Tensor:
    backend = attention.build(config)
    bind(backend, shard)
    mask = None if given.mask is None else given.mask.chunk(shard.size, 1)[shard.rank]
    q, k, _ = given.qkv.chunk(shard.size, 1)[shard.rank].unbind(2)
    return backend.branch_weights(q, k, given.causal, mask)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("head_offsets", ["interleaved", "grouped"])
def test_a_set_trades_heads_for_the_sequence(causal: bool, padded: bool, head_offsets: str) -> None:
    """No segment here tiles a shard of 16."""
    config = SMALL | {"overlap": "set", "head_offsets": head_offsets}
    given = problem(2, 48, 6, 4, causal, torch.rand(2, 48) < 0.7 if padded else None)
    expected = given.outcome(attention.build(config))
    for found, whole in zip(sharded_outcome(given, config, 3, {}), expected, strict=True):
        assert (found - whole).abs().max() < EXACT
    q, k, _ = given.qkv.unbind(2)
    whole = attention.build(config).branch_weights(q, k, causal, given.mask)
    assert (torch.cat(threads.run(3, partial(shares_of_shard, config, given)), 2) - whole).abs().max() < EXACT


def test_heads_that_do_not_divide_are_refused_for_a_set() -> None:
    refusal = attention.build(SMALL | {"overlap": "set"}).supports_shards(seq_len=24, shards=3, heads=4)
    words = ("4 heads do not divide among 3 ranks", "sequence_parallel_size of 2", "6 heads", "overlap: multiset")
    assert not refusal and all(word in refusal.reason for word in words)


@pytest.mark.parametrize("mixing", MIXING)
@given(data=st.data(), seq_len=st.integers(1, 60), heads=st.integers(1, 5), options=dilated_options())
@settings(max_examples=60)
def test_streams_with_own_weights_give_what_the_whole_gives(
    mixing: str, data: st.DataObject, seq_len: int, heads: int, options: dict
) -> None:
    backend, qkv = build(options | {"mixing": mixing}), stream(2, seq_len, heads)
    with torch.no_grad():
        whole = backend(*qkv.unbind(2))
    assert (chunked(backend, qkv, data.draw(cuts(seq_len))) - whole).abs().max() < EXACT


def test_a_set_has_no_cache_and_says_why() -> None:
    backend = attention.build(SMALL | {"overlap": "set"})
    with pytest.raises(ValueError, match=r"overlap: set has no cache.*denser ones show.*overlap: multiset"):
        backend.new_cache(1, 2, 4)


@pytest.mark.parametrize("rates", [[4, 1, 3], [4, 2, 3]])
@ablated
def test_uninitialised_memory_is_never_read(options: dict, rates: list[int]) -> None:
    backend, drawn = build(SMALL | {"dilation_rates": rates} | options), problem(2, 23)
    expected = drawn.outcome(backend)
    torch.use_deterministic_algorithms(True)  # also fills fresh memory with NaN
    try:
        assert torch.empty(3).isnan().all()
        for found, known in zip(drawn.outcome(backend), expected, strict=True):
            assert torch.equal(found, known)
    finally:
        torch.use_deterministic_algorithms(False)


def test_pieces_of_a_set_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = build(SMALL | {"overlap": "set"})
    for scores, queries in ((1, 1), (50, 3), (2**20, 4)):
        monkeypatch.setattr(dilated_union, "_MAX_SCORES", scores)
        monkeypatch.setattr(dilated_union, "_QUERIES", queries)
        for causal in (True, False):
            problem(2, 43, 5, causal=causal).assert_matches(backend, backend.pattern)  # type: ignore[arg-type]


def test_chunks_of_maps_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = (torch.randn(3, 37, 5, 4, dtype=torch.float64) for _ in range(2))
    backends = [build(SMALL | options) for options in OPTIONS]
    whole = [backend.attention_map(q, k) for backend in backends]
    monkeypatch.setattr(maps, "MAX_SCORES", 3 * 5 * 37 * 4)
    for backend, known in zip(backends, whole, strict=True):
        assert (backend.attention_map(q, k) - known).abs().max() < EXACT


@ablated
def test_scores_as_large_as_trained_models_give_them_stay_exact(options: dict) -> None:
    drawn = problem(1, 40, 2, 8)
    drawn.qkv[:, :, :2] *= 30  # denominators far beyond the range of exp
    backend = build({"segment_lengths": [8, 40], "dilation_rates": [1, 2]} | options)
    weights = backend.attention_map(*drawn.qkv.unbind(2)[:2])
    out, grad = drawn.outcome(backend)
    assert (torch.einsum("bhpk,bkhd->bphd", weights, drawn.qkv[:, :, 2]) - out).abs().max() < EXACT
    assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@ablated
def test_low_precision_is_near(options: dict, dtype: torch.dtype) -> None:
    backend = attention.build(SMALL | options)
    exact = problem(2, 43, 3, 8)
    low = Problem(exact.qkv.to(dtype), exact.grad_out.to(dtype), True, None)
    within = {torch.float32: 1e-5, torch.bfloat16: 0.06, torch.float16: 0.01}[dtype]
    for found, known in zip(low.outcome(backend), exact.outcome(backend), strict=True):
        assert found.dtype == dtype and (found - known).abs().max() < within * max(1, known.abs().max())


@pytest.mark.parametrize("padded", [False, True])
@ablated
def test_compiles_without_a_graph_break_and_under_autocast(options: dict, padded: bool) -> None:
    backend = build(SMALL | options)
    mask = torch.arange(21).expand(2, 21) < torch.tensor([[21], [9]]) if padded else None
    drawn = problem(2, 21, 3, 8, mask=mask)
    torch._dynamo.reset()
    compiled = torch.compile(backend, backend="aot_eager", fullgraph=True)
    for found, known in zip(drawn.outcome(compiled), drawn.outcome(backend), strict=True):
        assert (found - known).abs().max() < EXACT
    narrow = attention.build(SMALL | options)
    qkv = torch.randn(2, 21, 3, 3, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = narrow(*qkv.unbind(2), True, mask)
    assert out.dtype == torch.bfloat16
    assert (out - narrow(*qkv.detach().double().unbind(2), True, mask)).abs().max() < 0.04
    assert torch.autograd.grad(out.sum(), qkv)[0].dtype == torch.float32


def test_the_ops_of_a_set_pass_torchs_own_checks() -> None:
    q, k, v = (torch.randn(2, 11, 3, 8, requires_grad=True) for _ in range(3))
    rest = ([4, 8], [1, 3], "interleaved", 0, 3, True, 0.3)
    torch.library.opcheck(dilated_union.dilated_union, (q, k, v, *rest))
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = dilated_union.dilated_union(q, k, v, *rest)
    results = [out, lse, *dilated_union.dilated_union_backward(torch.randn_like(out), q, k, v, out, lse, *rest)]
    assert all(x.is_contiguous() for x in results)
    torch.library.opcheck(dilated_union.dilated_union_backward, (torch.randn_like(out), q, k, v, out, lse, *rest))


@ablated
def test_flops_of_the_score_are_those_of_visible_keys(options: dict) -> None:
    """A set computes scores that it hides: its operation counts them, its pattern does not."""
    backend, paper = attention.build(SMALL | options), attention.build(SMALL)
    assert backend.flops(43, 4, 8) == 4 * 8 * int(backend.pattern.multiplicity(43, 4, True).sum())  # type: ignore[union-attr]
    q, k, v = (torch.randn(2, 43, 4, 8, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        out = backend(q, k, v)
    assert counter.get_total_flops() == 2 * paper.flops(43, 4, 8)  # type: ignore[operator]
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 5 * paper.flops(43, 4, 8)  # type: ignore[operator]


def test_a_set_makes_no_square() -> None:
    """32,768 tokens: the scores of one head would take 4 GiB."""
    backend = attention.build(
        {"backend": "dilated", "segment_lengths": [512, 32768], "dilation_rates": [1, 64], "overlap": "set"}
    )
    with without_data() as ledger:
        ledger.phase = "forward"
        qkv = torch.empty(1, 32768, 3, 4, 32, requires_grad=True)
        backend(*qkv.unbind(2)).sum().backward()
        assert ledger.peaks()["forward"].total() < 6 * qkv.numel() * 4
    assert backend.branch_weights(*(torch.randn(1, 2**15, 2, 4) for _ in range(2))).shape == (2, 1, 2**15, 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["overlap=sets"], "got 'sets', expected one of 'multiset', 'set'; did you mean 'set'?"),
        (["mixing=learnt"], "expected one of 'denominators', 'equal', 'learned'; did you mean 'learned'?"),
        (["overlp=set"], "did you mean model.attention.overlap?"),
        (["overlap=set", "mixing=equal"], "a set is one softmax over the keys of all branches"),
        (["overlap=set", "mixing=learned"], "set overlap to 'multiset', or mixing to 'denominators'"),
        (["backend=naive", "pattern.kind=dilated", "pattern.mixing=equal"], "model.attention.pattern.mixing"),
    ],
)
def test_wrong_keys_are_told_of(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "quickstart", *(f"model.attention.{option}" for option in options)]) == 2
    told = capsys.readouterr().err
    assert words in told.replace("\n", " ") and "Traceback" not in told


@pytest.mark.parametrize("given", [{"overlap": "bag"}, {"mixing": "max"}])
def test_the_constructors_refuse_by_name(given: dict) -> None:
    from longnet_kit.attention.dilated import DilatedAttention

    ((key, value),) = given.items()
    with pytest.raises(ValueError, match=f"{key} is '{value}', expected '"):
        DilatedAttention([4], [1], **given)
