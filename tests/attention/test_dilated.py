"""How the dilated backend gets there: views instead of gathers, kernels in both directions, few saved tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from longnet_kit import attention
from longnet_kit.attention import dilated, flash, patterns, views
from longnet_kit.plan.ledger import run_backward, without_data
from tests.attention.oracle import dilated_options, problem

pytestmark = pytest.mark.filterwarnings("ignore:no branch has dilation rate 1")
SMALL = {"backend": "dilated", "segment_lengths": [4, 10, 40], "dilation_rates": [1, 3, 4]}
ROUTES = [flash.CPU, flash.MATH]


@given(
    options=dilated_options(),
    seq_len=st.integers(1, 60),
    heads=st.tuples(st.integers(0, 5), st.integers(1, 7), st.integers(0, 3)),
    batch=st.integers(1, 3),
)
def test_views_hold_each_kept_position_once(options: dict, seq_len: int, heads: tuple, batch: int) -> None:
    first, count, more = heads
    total = first + count + more
    pattern = patterns.Dilated(**options)
    fused = torch.zeros(batch, seq_len, 2, count)
    for w, r in pattern.branches:
        visits = fused.zero_()[:, :, 1]
        for view in views.branch_views(seq_len, w, r, pattern.head_offsets, first, count, total):
            for (part,) in view.calls(visits):
                assert part.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()
                part += 1
        kept = pattern.keeps((w, r), seq_len, total)[first : first + count].T
        assert torch.equal(visits, kept.float().expand(batch, seq_len, count))
        assert (fused[:, :, 0] == 0).all()


@pytest.mark.parametrize("head_offsets", ["interleaved", "grouped", "none"])
@pytest.mark.parametrize(("heads", "rate"), [(12, 1), (12, 2), (12, 4), (12, 8), (12, 12), (4, 16), (16, 4)])
def test_even_branches_take_few_kernel_calls(head_offsets: str, heads: int, rate: int) -> None:
    w = 4 * rate
    made = views.branch_views(8 * w, w, rate, head_offsets, 0, heads, heads)  # type: ignore[arg-type]
    assert len(made) <= min(rate, -(-heads // rate))
    assert all(len(list(view.calls(torch.zeros(3, 8 * w, heads)))) == 1 for view in made)


@pytest.mark.parametrize(("batch", "seq_len"), [(1, 40), (3, 40), (2, 8), (1, 47)])
def test_inputs_are_never_copied(monkeypatch: pytest.MonkeyPatch, batch: int, seq_len: int) -> None:
    qkv = torch.randn(batch, seq_len, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    seen: list[bool] = []
    for name in ("forward", "backward"):
        kernel = getattr(flash, name)

        def spy(*args: object, kernel: object = kernel, name: str = name) -> object:
            first = 0 if name == "forward" else 1
            inputs = args[first : first + 3]
            seen.extend(x.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr() for x in inputs)
            return kernel(*args)

        monkeypatch.setattr(flash, name, spy)
    out = attention.build(SMALL)(*qkv.unbind(2))
    out.sum().backward()
    assert len(seen) > 6 and all(seen)


def test_only_inputs_output_and_lse_are_saved() -> None:
    q, k, v = (torch.randn(2, 40, 4, 8, requires_grad=True) for _ in range(3))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        attention.build(SMALL)(q, k, v)
    assert sorted(x.numel() for x in saved) == sorted([2 * 40 * 4] + 4 * [2 * 40 * 4 * 8])


def memory(backend: attention.AttentionBackend, seq_len: int, heads: int, dtype: torch.dtype) -> float:
    """The peak of a forward and backward pass, over q, k, v, the output, its gradient and the three gradients."""
    with without_data() as ledger:
        ledger.phase = "inputs"
        q, k, v, grad = (torch.empty(1, seq_len, heads, 64, dtype=dtype) for _ in range(4))
        inputs = [x.requires_grad_() for x in (q, k, v)]
        ledger.phase = "attention"
        out = backend(*inputs)
        run_backward(out, grad)
        del out
        return ledger.peaks()["attention"].total() / (8 * grad.numel() * grad.element_size())


@pytest.mark.parametrize("seq_len", [16_384, 15_000])
@pytest.mark.parametrize(
    "branches",
    [
        [(2048, 1), (4096, 2), (8192, 4), (16384, 8)],
        [(2048, 1), (4096, 1), (8192, 1)],
        [(1024, 2), (4096, 1), (16384, 6)],
        [(2048, 1)],
    ],
)
def test_memory_is_that_of_inputs_results_and_little_more(seq_len: int, branches: list[tuple[int, int]]) -> None:
    """At most 15% beyond q, k, v, the output, its gradient and the three gradients, however many branches there are."""
    lengths, rates = zip(*branches, strict=True)
    backend = attention.build({"backend": "dilated", "segment_lengths": lengths, "dilation_rates": rates})
    assert 1 < memory(backend, seq_len, 12, torch.float32) <= 1.15


@pytest.mark.parametrize(("heads", "dtype", "most"), [(1, torch.float32, 1.4), (12, torch.bfloat16, 1.55)])
def test_one_head_and_half_precision_take_what_is_said(heads: int, dtype: torch.dtype, most: float) -> None:
    """A head is not cut, and sums are held in float32."""
    backend = attention.build(
        {"backend": "dilated", "segment_lengths": [2048, 4096, 16384], "dilation_rates": [1, 2, 1]}
    )
    assert memory(backend, 16_384, heads, dtype) <= most


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [1, 5, 33])
def test_every_route_gives_attention_and_its_gradients(route: flash.Route, causal: bool, n: int) -> None:
    q, k, v = (torch.randn(3, 2, n, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    scores = q @ k.transpose(-1, -2) * 0.3
    if causal:
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
    expected = scores.softmax(-1) @ v
    grad_out = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (q, k, v), grad_out)
    with torch.no_grad():
        out, lse = route.forward(q, k, v, causal, 0.3)
        grads = route.backward(grad_out, q, k, v, out, lse, causal, 0.3)
    assert (out - expected).abs().max() < 1e-12
    assert (lse - scores.logsumexp(-1)).abs().max() < 1e-12
    for grad, want in zip(grads, wanted, strict=True):
        assert (grad - want).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_routes_agree_in_lower_precision(dtype: torch.dtype) -> None:
    q, k, v, grad_out = (torch.randn(2, 3, 65, 16, dtype=dtype) for _ in range(4))
    within = {torch.float32: 1e-5, torch.bfloat16: 0.06, torch.float16: 0.01}[dtype]
    results = []
    for route in ROUTES:
        out, lse = route.forward(q, k, v, True, 0.25)
        assert out.dtype == dtype and lse.dtype == torch.float32
        results.append((out, *route.backward(grad_out, q, k, v, out, lse, True, 0.25)))
    for one, other in zip(*results, strict=True):
        assert (one.float() - other.float()).abs().max() < within


def test_the_math_route_and_chunked_launches_serve_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA does with float64 and with batches too large for a launch."""
    backend = attention.build(SMALL)
    monkeypatch.setattr(flash, "route", lambda *_: flash.MATH)
    monkeypatch.setattr(flash, "_MAX_SCORES", 64)
    monkeypatch.setattr(flash, "_batches", lambda q, k: [slice(0, 2), slice(2, None)] if len(q) > 2 else [slice(None)])
    problem(2, 43, 4).assert_matches(backend, backend.pattern)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "name"),
    [
        (torch.bfloat16, 64, (9, 0), "cudnn"),
        (torch.bfloat16, 128, (9, 0), "cudnn"),
        (torch.bfloat16, 192, (9, 0), "flash"),
        (torch.float16, 64, (8, 0), "flash"),
        (torch.float16, 64, (10, 0), "flash"),
        (torch.float16, 264, (8, 0), "efficient"),
        (torch.float16, 64, (7, 5), "efficient"),
        (torch.bfloat16, 64, (7, 5), "math"),
        (torch.float32, 64, (9, 0), "efficient"),
        (torch.float32, 30, (9, 0), "math"),
        (torch.bfloat16, 20, (9, 0), "math"),
        (torch.float64, 64, (9, 0), "math"),
    ],
)
def test_cuda_takes_the_kernel_that_runs(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, head_dim: int, capability: tuple, name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert flash.route(on_cuda(256, dtype, head_dim), on_cuda(128, dtype, head_dim)).name == name
    for n, m in ((1, 128), (128, 2731)):
        other = "flash" if name == "cudnn" else name
        assert flash.route(on_cuda(n, dtype, head_dim), on_cuda(m, dtype, head_dim)).name == other


def on_cuda(tokens: int, dtype: torch.dtype, head_dim: int) -> torch.Tensor:
    """Without data."""
    with FakeTensorMode():
        return torch.empty(1, 1, tokens, head_dim, dtype=dtype, device="cuda")


@pytest.mark.parametrize("op", ["flash", "cudnn", "efficient"])
@pytest.mark.parametrize("backward", [False, True])
def test_cuda_routes_fit_the_schemas_of_this_torch(op: str, backward: bool) -> None:
    """Without a GPU the arguments can still be bound: every op exists and takes what is passed."""
    calls: list[tuple[object, ...]] = []

    class Bound(Exception):
        pass

    class Recorder:
        def __getattr__(self, name: str) -> object:
            schema = getattr(torch.ops.aten, name).default._schema

            def bind(*args: object, **kwargs: object) -> object:
                positional = [a for a in schema.arguments if not a.kwarg_only]
                required = [a.name for a in positional[len(args) :] if not a.has_default_value()]
                assert len(args) <= len(positional) and not required
                assert set(kwargs) <= {a.name for a in schema.arguments}
                for argument, value in zip(positional, args, strict=False):
                    kind = str(argument.type)
                    if kind == "Tensor":
                        assert value is None or isinstance(value, torch.Tensor), argument
                    elif kind in ("bool", "float", "int"):
                        assert type(value).__name__ == kind, argument
                calls.append(args)
                raise Bound

            return bind

    route = {"flash": flash.FLASH, "cudnn": flash.CUDNN, "efficient": flash.EFFICIENT}[op]
    q = torch.randn(2, 3, 5, 8)
    lse = torch.randn(2, 3, 5)
    original = flash.aten
    flash.aten = Recorder()  # type: ignore[assignment]
    try:
        with pytest.raises(Bound):
            if backward:
                route.backward(q, q, q, q, q, lse, True, 0.5)
            else:
                route.forward(q, q, q, True, 0.5)
    finally:
        flash.aten = original
    assert len(calls) == 1


def test_the_ops_pass_torchs_own_checks() -> None:
    q, k, v = (torch.randn(2, 11, 3, 8, requires_grad=True) for _ in range(3))
    settings = ([4, 8], [1, 3], "interleaved", 0, 3, True, 0.3)
    torch.library.opcheck(dilated.dilated, (q, k, v, *settings))
    out, lse = dilated.dilated(q.detach(), k.detach(), v.detach(), *settings)
    q, k, v = (x.detach() for x in (q, k, v))
    torch.library.opcheck(dilated.dilated_backward, (torch.randn_like(out), q, k, v, out, lse, *settings))


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
@pytest.mark.parametrize("segment_length", [4, 16, 20])
@pytest.mark.parametrize("dims", [(0, 1, 2, 3), (1, 0, 2, 3), (0, 2, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_lie_as_the_fake_kernels_say(
    monkeypatch: pytest.MonkeyPatch, route: flash.Route, segment_length: int, dims: tuple, dtype: torch.dtype
) -> None:
    """Whatever the inputs' strides, and also where one kernel call makes all of them: compiled code relies on it."""
    monkeypatch.setattr(flash, "route", lambda *_: route)
    sizes = [(2, 16, 3, 8)[i] for i in dims]
    q, k, v = (torch.randn(sizes, dtype=dtype).permute([dims.index(i) for i in range(4)]) for _ in range(3))
    settings = ([segment_length], [1], "interleaved", 0, 3, True, 0.3)
    out, lse = dilated.dilated(q, k, v, *settings)
    results = [out, lse, *dilated.dilated_backward(torch.randn_like(q), q, k, v, out, lse, *settings)]
    assert all(x.is_contiguous() for x in results)
    checks = ("test_faketensor",)
    torch.library.opcheck(dilated.dilated, (q, k, v, *settings), test_utils=checks)
    torch.library.opcheck(dilated.dilated_backward, (q, q, k, v, out, lse, *settings), test_utils=checks)


def test_flops_are_counted_per_visible_pair() -> None:
    backend = attention.build(SMALL)
    q, k, v = (torch.randn(2, 43, 4, 8, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        out = backend(q, k, v)
    assert counter.get_total_flops() == 2 * backend.flops(43, 4, 8, causal=True)
    assert backend.flops(43, 4, 8) == 4 * 8 * int(backend.pattern.multiplicity(43, 4, True).sum())
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 5 * backend.flops(43, 4, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("lengths", [[64, 200], [90, 225], [150, 450]])
def test_cuda_gives_what_the_cpu_gives(dtype: torch.dtype, padded: bool, lengths: list[int]) -> None:
    backend = attention.build({"backend": "dilated", "segment_lengths": lengths, "dilation_rates": [1, 4]})
    mask = torch.arange(450).expand(2, 450) < torch.tensor([[450], [300]]) if padded else None
    qkv = torch.randn(2, 450, 3, 4, 64, dtype=torch.float64)
    results = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        leaf = qkv.to(device, kind).requires_grad_()
        out = backend(*leaf.unbind(2), True, None if mask is None else mask.to(device))
        (grad,) = torch.autograd.grad(out.sum(), leaf)
        results.append((out.detach().cpu().double(), grad.cpu().double()))
    within = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}[dtype]
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() / (1 + one.abs().max()) < within
