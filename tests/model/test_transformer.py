"""The network: what its blocks compute, how it is drawn, and what it refuses."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from longnet_kit import attention, model
from longnet_kit.model.dropout import Dropout
from tests.model.small import DILATED, NAIVE_DILATED, SEQ_LEN, VOCAB, LoraEmbedding, network, some_tokens

ATTENTIONS = {
    "dilated": DILATED,
    "sdpa": {"backend": "sdpa"},
    "naive": {"backend": "naive"},
    "xformers": {"backend": "xformers", "block_size": 16, "pattern": "fixed", "local_blocks": 1},
}
POSITIONS = ["rope", "xpos", "none"]


def randomized(net: nn.Module) -> nn.Module:
    """Every parameter away from its special initial value (zero biases, unit gains)."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.2)
    return net


def layer_norm(x: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def test_the_network_is_magneto_written_out() -> None:
    """x + W_o LN(attention(LN x)), then x + W_2 LN(GELU(W_1 LN x)), a last LN, and the embedding as the head."""
    net = randomized(network(positions="none", attention={"backend": "naive"}).double())
    tokens = some_tokens()
    x = net.embedding.weight[tokens]
    for block in net.blocks:
        a, f = block.attention, block.feed_forward
        wq, wk, wv = a.qkv.weight.split(32)
        bq, bk, bv = a.qkv.bias.split(32)
        y = layer_norm(x, a.norm)
        heads = []
        for h in range(4):
            rows = slice(8 * h, 8 * h + 8)
            q, k, v = y @ wq[rows].T + bq[rows], y @ wk[rows].T + bk[rows], y @ wv[rows].T + bv[rows]
            scores = q @ k.transpose(1, 2) / 8**0.5
            future = torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).triu(1)
            heads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v)
        x = x + layer_norm(torch.cat(heads, -1), a.inner_norm) @ a.out.weight.T + a.out.bias
        y = layer_norm(x, f.norm) @ f.fc1.weight.T + f.fc1.bias
        y = y * (1 + torch.erf(y / 2**0.5)) / 2
        x = x + layer_norm(y, f.inner_norm) @ f.fc2.weight.T + f.fc2.bias
    expected = layer_norm(x, net.norm)
    torch.testing.assert_close(net.hidden(tokens), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(net(tokens), expected @ net.embedding.weight.T, rtol=0, atol=1e-11)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_no_logit_depends_on_a_later_token(name: str, positions: str) -> None:
    net = randomized(network(attention=ATTENTIONS[name], positions=positions).double())
    tokens = some_tokens(batch=1)
    logits = net(tokens)
    for cut in (1, 9, 31):
        changed = tokens.clone()
        changed[:, cut:] = (changed[:, cut:] + 1) % VOCAB
        torch.testing.assert_close(net(changed)[:, :cut], logits[:, :cut], rtol=0, atol=1e-12)
        assert not torch.allclose(net(changed)[:, cut], logits[:, cut])


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_non_causal_network_looks_ahead(name: str) -> None:
    net = randomized(network(attention=ATTENTIONS[name], causal=False).double())
    tokens = some_tokens(batch=1)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % VOCAB
    assert not torch.allclose(net(changed)[:, -2], net(tokens)[:, -2])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_padding_on_the_right_never_changes_a_real_token(name: str, causal: bool) -> None:
    net = randomized(network(attention=ATTENTIONS[name], causal=causal).double())
    tokens = some_tokens()
    lengths = torch.tensor([19, 32])
    real = torch.arange(SEQ_LEN) < lengths[:, None]
    padded = net(tokens, key_padding_mask=real)
    for row, length in enumerate(lengths):
        alone = net(tokens[row : row + 1, :length])
        torch.testing.assert_close(padded[row : row + 1, :length], alone, rtol=0, atol=1e-11)
    other = tokens.masked_fill(~real, 7)
    torch.testing.assert_close(net(other, key_padding_mask=real)[real], padded[real], rtol=0, atol=1e-12)


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_dilated_backend_gives_what_its_pattern_says(positions: str) -> None:
    fast = randomized(network(attention=DILATED, positions=positions).double())
    slow = network(attention=NAIVE_DILATED, positions=positions).double()
    slow.load_state_dict(fast.state_dict())
    tokens = some_tokens(seq_len=29)
    torch.testing.assert_close(fast(tokens), slow(tokens), rtol=0, atol=1e-10)
    for net in (fast, slow):
        net(tokens).square().mean().backward()
    for ours, theirs in zip(fast.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-11)


def test_the_embedding_is_the_head() -> None:
    net = network()
    assert not [name for name in net.state_dict() if "head" in name]
    assert sum(p.numel() for p in net.parameters()) == VOCAB * 32 + 2 * 32 + 2 * (
        3 * 32 * 33 + 32 * 33 + 4 * 32 + 48 * 33 + 32 * 49 + 2 * 32 + 2 * 48
    )
    with torch.no_grad():
        net.embedding.weight[5] = 0
    assert net(some_tokens())[..., 5].abs().max() == 0


def test_weights_are_drawn_as_magneto_says() -> None:
    dim, ffn, layers = 256, 768, 6
    torch.manual_seed(0)
    net = model.Transformer(
        2000, dim=dim, layers=layers, heads=4, ffn_dim=ffn, seq_len=8, attention={"backend": "sdpa"}
    )
    gain = math.sqrt(math.log(2 * layers))
    for block in net.blocks:
        a, f = block.attention, block.feed_forward
        q, k, v = a.qkv.weight.chunk(3)
        expected = {q: 1.0, k: 1.0, v: gain, a.out.weight: gain, f.fc1.weight: gain, f.fc2.weight: gain}
        for weight, its_gain in expected.items():
            std = its_gain * math.sqrt(2 / sum(weight.shape))
            assert weight.std().item() == pytest.approx(std, rel=0.02)  # 65,536 numbers and more: an error of 0.3%
            assert abs(weight.mean().item()) < 0.02 * std
    assert net.embedding.weight.std().item() == pytest.approx(dim**-0.5, rel=0.02)
    others = {name: p for name, p in net.named_parameters() if p.dim() == 1}
    for name, p in others.items():
        assert (p == ("norm" in name and name.endswith("weight"))).all(), name
    assert len(others) == layers * 12 + 2


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["naive", "dilated"])
def test_flops_are_those_that_torch_counts(name: str, causal: bool) -> None:
    net = network(attention=ATTENTIONS[name], causal=causal)
    with FlopCounterMode(display=False) as counter:
        net(some_tokens(batch=3, seq_len=28))
    expected = net.flops(28)
    if name == "naive" and causal:  # it computes the upper triangle too, and model FLOPs leave it out
        expected += 2 * 4 * 8 * 4 * (28 * 27 // 2)
    assert counter.get_total_flops() == 3 * expected


def test_flops_are_unknown_where_the_backend_does_not_count() -> None:
    net = network()
    net.attention_backends[1].flops = lambda *_: None  # type: ignore[method-assign, assignment]
    assert net.flops(16) is None


def test_each_layer_has_a_backend_of_its_own() -> None:
    backends = network(layers=3).attention_backends
    assert len({id(b) for b in backends}) == 3
    assert all(isinstance(b, attention.AttentionBackend) for b in backends)


@pytest.fixture
def fresh_compiler() -> None:
    """Otherwise the networks of other tests count towards the limit of recompilations."""
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["dilated", "sdpa"])
def test_the_whole_network_compiles_into_one_graph(name: str, backend: str) -> None:
    net = network(attention=ATTENTIONS[name]).double()
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    tokens, mask = some_tokens(), torch.arange(SEQ_LEN) < torch.tensor([[20], [32]])
    torch.testing.assert_close(compiled(tokens), net(tokens), rtol=0, atol=1e-12)
    compiled(tokens, key_padding_mask=mask).sum().backward()
    gradients = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    net(tokens, key_padding_mask=mask).sum().backward()
    for ours, theirs in zip(gradients, net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiling_with_xpos_works_too() -> None:
    net = network(positions="xpos")
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="eager")(some_tokens()), net(some_tokens()))


def test_a_network_on_the_meta_device_takes_no_memory_and_can_be_drawn_later() -> None:
    with torch.device("meta"):
        net = network()
    assert all(p.is_meta for p in net.parameters())
    assert net.flops(32) == network().flops(32)
    drawn = network(seed=1)
    for each in (net.to_empty(device="cpu"), drawn):
        torch.manual_seed(2)
        each.reset_parameters()
    assert torch.equal(net(some_tokens()), drawn(some_tokens()))


def test_lora_on_the_embedding_reaches_the_head_too() -> None:
    """So that merging it into the weight changes nothing; both of its factors learn from the head."""
    net, tokens = network(dropout=0.0).double(), some_tokens()
    plain = net(tokens)
    net.embedding = lora = LoraEmbedding(net.embedding).double()  # type: ignore[assignment]
    adapted, head = net(tokens), net.head_weight
    streamed = net.eval()(tokens, cache=net.new_cache(2))
    torch.testing.assert_close(head @ net.hidden(tokens)[0, 0], adapted[0, 0])
    head.sum().backward()
    assert all(factor.grad.abs().min() > 0 for factor in (lora.first, lora.second))
    assert not torch.allclose(adapted, plain)
    net.embedding = lora.merged()
    for found in (adapted, streamed):
        torch.testing.assert_close(found, net(tokens), rtol=0, atol=1e-10)
    assert net.head_weight is net.embedding.weight


def test_dropout_acts_in_training_only() -> None:
    net = network(dropout=0.5)
    tokens = some_tokens()
    assert not torch.equal(net(tokens), net(tokens))
    net.eval()
    assert torch.equal(net(tokens), net(tokens))
    torch.testing.assert_close(net(tokens), network(dropout=0.0)(tokens))


def test_dropout_is_on_the_embedding_and_on_each_sublayer() -> None:
    """With everything dropped, a block gives what it got, and the first one gets nothing."""
    net = network()
    for module in net.modules():
        if isinstance(module, Dropout):
            module.p = 1.0
    x = torch.randn(2, SEQ_LEN, 32)
    for block in net.blocks:
        assert torch.equal(block(x, None, None), x)
    assert net.hidden(some_tokens()).abs().max() == 0


def test_batch_rows_do_not_mix() -> None:
    net = network().double()
    tokens = some_tokens(batch=3)
    torch.testing.assert_close(net(tokens)[1:2], net(tokens[1:2]), rtol=0, atol=1e-12)


def test_build_takes_a_recipe_section() -> None:
    section = SimpleNamespace(
        dim=32, layers=2, heads=4, ffn_dim=48, dropout=0.1, positions="none", causal=False, attention=DILATED,
        activation_checkpointing="blocks", ffn_chunk=7, loss_chunk=None,
    )  # fmt: skip
    net = model.build(section, VOCAB, SEQ_LEN)  # type: ignore[arg-type]
    assert net.config == {"vocab_size": VOCAB, "seq_len": SEQ_LEN, **vars(section)}
    copy = model.Transformer(**net.config)
    copy.load_state_dict(net.state_dict())
    torch.testing.assert_close(copy.eval()(some_tokens()), net.eval()(some_tokens()))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dim": 30}, "dim is 30 and heads is 4"),
        ({"layers": 0}, "layers is 0"),
        ({"dim": 12}, "3 dimensions"),
        ({"positions": "alibi"}, "'alibi'"),
        ({"positions": "xpos", "causal": False}, "causal: true"),
        ({"attention": {"backend": "dilatd"}}, "did you mean 'dilated'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        network(**options)


def test_odd_heads_are_fine_without_positions() -> None:
    assert network(dim=12, positions="none")(some_tokens()).shape == (2, SEQ_LEN, VOCAB)


def test_malformed_arguments_are_refused() -> None:
    net = network()
    with pytest.raises(ValueError, match="two dimensions"):
        net(some_tokens()[0])
    for wrong in (torch.arange(31), torch.arange(32.0), torch.zeros(3, 32, dtype=torch.long)):
        with pytest.raises(ValueError, match="expected integers of shape"):
            net(some_tokens(), positions=wrong)


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_low_precision_stays_near(precision: str) -> None:
    net = network()
    tokens = some_tokens()
    expected = F.log_softmax(net(tokens), -1)
    if precision == "bf16":
        logits = net.bfloat16()(tokens)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(tokens)
    assert logits.dtype == torch.bfloat16
    assert (F.log_softmax(logits.float(), -1) - expected).abs().max() < 0.1
