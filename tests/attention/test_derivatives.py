"""Every derivative of every backend is the definition's, or raises; none is zero in silence."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from longnet_kit import attention
from longnet_kit.attention import dilated, dilated_union, patterns
from longnet_kit.attention.sharding import bind, to_heads, to_sequence
from longnet_kit.errors import UserError
from longnet_kit.model.classifier import mean_of_real
from longnet_kit.parallel import threads
from longnet_kit.parallel.threads import ThreadShard
from longnet_kit.testing import reference

BRANCHES: dict[str, Any] = {"segment_lengths": [4, 8], "dilation_rates": [1, 2]}
CONFIGS: dict[str, dict[str, Any]] = {
    "dilated": {"backend": "dilated", **BRANCHES},
    "set": {"backend": "dilated", "overlap": "set", **BRANCHES},
    "equal": {"backend": "dilated", "mixing": "equal", **BRANCHES},
    "learned": {"backend": "dilated", "mixing": "learned", **BRANCHES},
    "naive": {"backend": "naive", "pattern": {"kind": "dilated", **BRANCHES}},
    "sdpa": {"backend": "sdpa"},
    "block_sparse": {"backend": "block_sparse", "block_size": 2, "local_blocks": 2},
    "xformers": {"backend": "xformers", "block_size": 16, "local_blocks": 2},
}
EVERY = {"naive", "xformers"}
"""Their operations are torch's own, which have every derivative."""


def dual(f: Callable[[Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, t))).tangent
        assert tangent is not None
        return tangent


def jvp(f: Callable[[Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    return torch.func.jvp(f, (x,), (t,))[1]


def jacfwd(f: Callable[[Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    return torch.func.jacfwd(lambda a: f(x + a * t))(x.new_zeros(()))


def squares(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return f(x).pow(2).sum()


def func_grad(f: Callable[[Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    return torch.func.grad(partial(squares, f))(x)


def vjp(f: Callable[[Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    return torch.func.vjp(f, x)[1](t)[0]


def jacrev(f: Callable[[Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    return torch.func.jacrev(f)(x)


def hessian(f: Callable[[Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    return torch.func.hessian(lambda a: squares(f, x + a * t))(x.new_zeros(()))


def twice(f: Callable[[Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(squares(f, x), x, create_graph=True)
    return torch.autograd.grad(grad.pow(2).sum(), x)[0]


def twice_of_a_sum(f: Callable[[Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    """The gradient that arrives is a constant here."""
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    return torch.autograd.grad(x.sum() + grad.pow(2).sum(), x)[0]


def vmap(f: Callable[[Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    return torch.func.vmap(f)(torch.stack((x, t)))


def once(f: Callable[[Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(squares(f, x), x)[0]


FORWARD = [dual, jvp, jacfwd]
TORCHS = {("xformers", vmap), ("sdpa", hessian), ("sdpa", twice), ("sdpa", twice_of_a_sum)}
KINDS = [*FORWARD, func_grad, vjp, jacrev, hessian, twice, twice_of_a_sum, vmap, once]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("place", ["q", "k", "v"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_derivative_is_right_or_raises(name: str, kind: Callable[..., Tensor], place: str) -> None:
    backend = attention.build(CONFIGS[name]).double()
    x, t, *others = torch.randn(4, 1, 9, 2, 4, dtype=torch.float64)

    def call(attend: Callable[..., Tensor], x: Tensor) -> Tensor:
        q, k, v = {"q": (x, *others), "k": (others[0], x, others[1]), "v": (*others, x)}[place]
        return attend(q, k, v, True, None)

    refusal: Exception | None = None
    found = torch.empty(())
    try:
        found = kind(partial(call, backend), x, t)
    except (UserError, NotImplementedError, RuntimeError) as error:
        refusal = error
    if isinstance(refusal, UserError):
        assert name not in EVERY and kind is not once
        backend_name = CONFIGS[name]["backend"]
        assert f"the attention backend {backend_name} " in str(refusal) and "the backend naive" in str(refusal)
        return
    if refusal is not None:  # torch's own words for its own kernels
        assert (name, kind) in TORCHS, refusal
        return
    assert kind not in FORWARD or name in EVERY
    if name in ("equal", "learned"):
        return  # no one softmax of a pattern; test_ablations has their first derivatives
    pattern = backend.pattern
    assert pattern is not None
    assert (found - kind(partial(call, partial(reference, pattern)), x, t)).abs().max() < 1e-9


@pytest.mark.parametrize("transform", [dual, jvp], ids=["tangents from outside", "torch.func"])
def test_compiled_attention_keeps_no_tangent_to_itself(transform: Callable[..., Tensor]) -> None:
    backend = attention.build(CONFIGS["dilated"])
    q, k, v, t = torch.randn(4, 1, 9, 2, 4)
    compiled = torch.compile(lambda x: backend(x, k, v), backend="aot_eager")
    with pytest.raises(UserError, match="dilated has no forward-mode"):
        transform(compiled, q, t)
    inside = torch.compile(lambda q, t: transform(lambda x: backend(x, k, v), q, t), backend="aot_eager")
    with pytest.raises(Exception, match=r"dilated has no forward-mode"):
        inside(q, t)


@pytest.mark.parametrize("op", [dilated.dilated, dilated_union.dilated_union])
def test_the_operations_themselves_raise(op: Callable[..., tuple[Tensor, Tensor]]) -> None:
    q, k, v, t = torch.randn(4, 1, 9, 2, 4, dtype=torch.float64)
    rest = [4, 8], [1, 2], "interleaved", 0, 2, True, 0.5
    with pytest.raises(UserError, match="forward-mode"):
        jvp(lambda x: op(x, k, v, *rest)[0], q, t)
    out, _ = op(q.requires_grad_(), k, v, *rest)
    with forward_ad.dual_level(), pytest.raises(UserError, match="forward-mode"):
        torch.autograd.grad(out, q, forward_ad.make_dual(t, t))  # forward over reverse


@pytest.mark.parametrize("op", [dilated.dilated, dilated_union.dilated_union])
@pytest.mark.parametrize("causal", [True, False])
def test_the_denominators_have_gradients(op: Callable[..., tuple[Tensor, Tensor]], causal: bool) -> None:
    branches = [4, 7], [1, 2], "interleaved"
    overlap = "set" if op is dilated_union.dilated_union else "multiset"
    m = patterns.Dilated(*branches, overlap).multiplicity(9, 3, causal)  # type: ignore[arg-type]
    q, k, v, grad_out = torch.randn(4, 2, 9, 3, 4, dtype=torch.float64)
    grad_lse = torch.randn(2, 9, 3, dtype=torch.float64)
    for x in (q, k, v):
        x.requires_grad_()
    scores = torch.einsum("bphd,bkhd->bhpk", q, k) * 0.5 + m.to(q).log()
    right = torch.einsum("bhpk,bkhd->bphd", scores.softmax(-1), v), scores.logsumexp(-1).transpose(1, 2)
    found = op(q, k, v, *branches, 0, 3, causal, 0.5)
    for upstream in ((grad_out, grad_lse), (None, grad_lse)):
        outcomes = []
        for pair in (found, right):
            used = [(x, grad) for x, grad in zip(pair, upstream, strict=True) if grad is not None]
            grads = torch.autograd.grad(
                [x for x, _ in used], (q, k, v), [grad for _, grad in used], retain_graph=True, allow_unused=True
            )
            outcomes.append([torch.zeros_like(q) if grad is None else grad for grad in grads])
        for given, expected in zip(*outcomes, strict=True):
            assert (given - expected).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["dilated", "naive", "sdpa"])
def test_neither_shards_nor_caches_drop_a_tangent(name: str) -> None:
    q, k, v, t = torch.randn(4, 1, 8, 2, 4, dtype=torch.float64)
    backend = attention.build(CONFIGS[name])
    cache = backend.new_cache(1, 2, 4, dtype=torch.float64)
    with pytest.raises(UserError, match=f"{name} with a cache has no forward-mode"):
        dual(lambda x: backend(x, k, v, cache=cache), q, t)

    lock = threading.Lock()  # forward mode has one level for all threads

    def work(shard: ThreadShard) -> None:
        own = attention.build(CONFIGS[name])
        bind(own, shard)
        own_q, own_k, own_v, own_t = (x.chunk(2, 1)[shard.rank] for x in (q, k, v, t))
        for transform in (jvp, func_grad):
            with lock, pytest.raises(UserError, match=f"{name} on several ranks"):
                transform(lambda x: own(x, own_k, own_v), own_q, own_t)
        if name == "dilated":
            with pytest.raises(UserError, match="dilated has no second derivatives"):
                twice_of_a_sum(lambda x: own(x, own_k, own_v), own_q, own_t)

    threads.run(2, work)


def test_exchanges_between_ranks_have_second_derivatives() -> None:
    x = torch.randn(2, 8, 2, 4, dtype=torch.float64)

    def cubes(x: Tensor) -> Tensor:
        return x.pow(3)

    def grads(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), x)[0]

    def work(shard: ThreadShard) -> tuple[Tensor, Tensor]:
        own = x.chunk(2, 1)[shard.rank]
        traded = grads(lambda x: to_sequence(cubes(to_heads(x, shard)), shard).sum(), own)
        mean = grads(lambda x: cubes(mean_of_real(x.flatten(2), None, shard)).sum() / 2, own)
        return traded, mean

    traded, mean = (torch.cat(parts, 1) for parts in zip(*threads.run(2, work), strict=True))
    assert torch.allclose(traded, grads(lambda x: cubes(x).sum(), x), atol=1e-12)
    assert torch.allclose(mean, grads(lambda x: cubes(mean_of_real(x.flatten(2), None)).sum(), x), atol=1e-12)
