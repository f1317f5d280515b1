"""The classifier: padding changes nothing, shards are the whole, and its figures are those of its parts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from longnet_kit.attention.sharding import bound
from longnet_kit.model.classifier import Classifier, mean_of_real
from longnet_kit.parallel import threads
from longnet_kit.parallel.threads import ThreadShard
from tests.model.small import DILATED, NAIVE_DILATED, SEQ_LEN, VOCAB, some_tokens

pytestmark = pytest.mark.filterwarnings("ignore:no branch has dilation rate 1")
CLASSES = 5
TILING = {"backend": "dilated", "segment_lengths": [8, 32], "dilation_rates": [1, 3]}
BACKENDS: list[dict[str, Any]] = [DILATED, NAIVE_DILATED, {"backend": "sdpa"}, {"backend": "naive"}]


def classifier(seed: int = 0, **options: Any) -> Classifier:
    settings_: dict[str, Any] = {"dim": 32, "layers": 2, "heads": 4, "ffn_dim": 48, "seq_len": SEQ_LEN}
    torch.manual_seed(seed)
    return Classifier(
        VOCAB, classes=CLASSES, **(settings_ | {"attention": DILATED, "causal": False} | options)
    ).double()


def mask_of(lengths: list[int], width: int) -> torch.Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


@settings(max_examples=30)
@given(
    st.lists(st.integers(1, SEQ_LEN), min_size=1, max_size=4),
    st.integers(0, 9),
    st.sampled_from(BACKENDS),
    st.booleans(),
    st.sampled_from(["rope", "none"]),
)
def test_padding_never_changes_logits_or_gradients(
    lengths: list[int], more: int, attention: dict[str, Any], causal: bool, positions: str
) -> None:
    """A batch of sequences is each sequence by itself, whatever stands in the padding and however much there is."""
    model = classifier(attention=attention, causal=causal, positions=positions)
    width = max(lengths) + more
    tokens, mask = some_tokens(len(lengths), width), mask_of(lengths, width)
    padded = model(tokens, key_padding_mask=mask)
    assert padded.shape == (len(lengths), CLASSES)
    alone = torch.cat([model(row[None, :length]) for row, length in zip(tokens, lengths, strict=True)])
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-12)
    other = tokens.where(mask, (tokens + 1) % VOCAB)
    torch.testing.assert_close(model(other, key_padding_mask=mask), padded, rtol=0, atol=1e-12)
    parameters = list(model.parameters())
    weights = torch.randn(padded.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    of_batch = torch.autograd.grad((padded * weights).sum(), parameters)
    of_each = torch.autograd.grad((alone * weights).sum(), parameters)
    for ours, theirs in zip(of_batch, of_each, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("attention", BACKENDS, ids=str)
def test_nan_in_padding_does_no_harm(attention: dict[str, Any]) -> None:
    """One real token, everything else padding whose embedding is no number."""
    model = classifier(attention=attention)
    tokens = torch.full((1, 20), 7)
    tokens[0, 0] = 3
    expected = model(tokens[:, :1])
    with torch.no_grad():
        model.embedding.weight[7] = torch.nan
    found = model(tokens, key_padding_mask=mask_of([1], 20))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_mean_is_over_real_tokens_alone() -> None:
    states = torch.randn(2, 6, 3, dtype=torch.float64)
    found = mean_of_real(states, mask_of([2, 6], 6))
    torch.testing.assert_close(found, torch.stack((states[0, :2].mean(0), states[1].mean(0))), rtol=0, atol=1e-15)
    torch.testing.assert_close(mean_of_real(states, None), states.mean(1), rtol=0, atol=1e-15)


def test_the_mean_of_half_precision_does_not_overflow() -> None:
    states = torch.full((1, 3000, 2), 60.0, dtype=torch.float16)
    assert mean_of_real(states, None).tolist() == [[60.0, 60.0]]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("lengths", [[SEQ_LEN, 3], [1, 17]])
def test_shards_are_the_whole_sequence(size: int, lengths: list[int]) -> None:
    """Logits on every rank, and the sum of the ranks' gradients; a rank may have nothing but padding."""
    tokens, mask = some_tokens(2, SEQ_LEN), mask_of(lengths, SEQ_LEN)
    model = classifier(attention=TILING)
    weights = torch.randn(2, CLASSES, dtype=torch.float64)
    whole = model(tokens, key_padding_mask=mask)
    expected = torch.autograd.grad((whole * weights).sum(), list(model.parameters()))

    def work(shard: ThreadShard) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        own = copy.deepcopy(model)
        n = SEQ_LEN // size
        part = slice(shard.rank * n, (shard.rank + 1) * n)
        with bound(own, shard):
            logits = own(tokens[:, part], key_padding_mask=mask[:, part])
            # Each rank has the loss of the whole: their mean is what strategies make of it.
            return logits.detach(), torch.autograd.grad((logits * weights).sum() / size, list(own.parameters()))

    found = threads.run(size, work)
    for logits, _ in found:
        torch.testing.assert_close(logits, whole.detach(), rtol=0, atol=1e-12)
    for theirs, *ours in zip(expected, *(gradients for _, gradients in found), strict=True):
        torch.testing.assert_close(sum(ours), theirs, rtol=0, atol=1e-11)


def test_later_tokens_count_unless_it_is_causal() -> None:
    tokens = some_tokens(1, 16)
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % VOCAB
    for causal in (False, True):
        model = classifier(causal=causal)
        first = [model.hidden(x)[0, 0] for x in (tokens, other)]
        assert torch.equal(*first) == causal
        assert not torch.equal(model(tokens), model(other))


def test_flops_are_those_that_torch_counts() -> None:
    model = classifier(attention={"backend": "naive"})
    with FlopCounterMode(display=False) as counter:
        model(some_tokens(1))
    assert model.flops(SEQ_LEN) == counter.get_total_flops()


def test_what_makes_no_classifier_is_refused() -> None:
    with pytest.raises(ValueError, match="classes is 1, expected at least 2"):
        Classifier(VOCAB, classes=1, dim=8, layers=1, heads=1, ffn_dim=8, seq_len=8, attention={"backend": "sdpa"})
    with pytest.raises(ValueError, match="loss_chunk is 64, but a classifier has one row of logits"):
        classifier(loss_chunk=64)
