"""Conformance checks that hold an attention backend, plug-ins included, to what the kit expects of one.

`check_backend` raises on the first look; `run_checks` reports. Where the backend has a pattern it is compared, values
and gradients in the widest dtype that it supports (float64, as a rule), with the softmax over that pattern's multiset
of keys. Where it has none, only what needs no pattern is checked, and the report says so.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longnet_kit import attention
from longnet_kit.attention.backend import AttentionBackend, Support
from longnet_kit.attention.patterns import Pattern
from longnet_kit.attention.sharding import SequenceShard, bind

SEQ_LENS = (1, 2, 7, 32, 61)
WITHIN = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""How far from what is expected a result in each dtype may be, for each unit of the largest number expected above 1."""
HEAD_DIMS = (8, 12, 16, 32, 64, 128)
"""Head widths to try; the first two that the backend supports are taken, the second only for values and gradients."""


class Check(NamedTuple):
    """One claim about a backend and what came of it."""

    claim: str
    passed: bool | None
    """None when it could not be checked."""
    message: str = ""

    def __str__(self) -> str:
        mark = {True: "ok  ", False: "FAIL", None: "--  "}[self.passed]
        return f"{mark} {self.claim}" + (f": {self.message}" if self.message else "")


class ConformanceError(AssertionError):
    """A backend that breaks a claim; the message lists every broken one."""


class _Broken(Exception):
    """A claim does not hold; the message says where."""


class _Unchecked(Exception):
    """A claim cannot be checked; the message says why."""


class _Subject(NamedTuple):
    """A backend under test and where."""

    backend: AttentionBackend
    device: torch.device
    seq_lens: tuple[int, ...]
    dtype: torch.dtype
    """The widest that it supports."""
    head_dims: tuple[int, ...]
    """Up to two."""

    @property
    def within(self) -> float:
        return WITHIN[self.dtype]


def check_backend(
    backend: AttentionBackend, *, device: str | torch.device = "cpu", seq_lens: Sequence[int] | None = None
) -> list[Check]:
    """Hold a backend to every claim.

    Args:
        backend: an instance, built with lengths small enough that its pattern shows at `seq_lens`.
        device: where to run it.
        seq_lens: sequence lengths to try; None takes short ones, and longer ones if the pattern only shows there.

    Returns:
        The checks; those with `passed` None could not be made.

    Raises:
        ConformanceError: a claim does not hold. The message lists every one. Or none could be checked.
    """
    checks = run_checks(backend, device=device, seq_lens=seq_lens)
    if all(check.passed is None for check in checks):
        reasons = "\n".join(str(check) for check in checks)
        raise ConformanceError(f"{type(backend).__name__}: no claim could be checked:\n{reasons}")
    broken = [str(check) for check in checks if check.passed is False]
    if broken:
        raise ConformanceError(f"{type(backend).__name__} breaks {len(broken)} of {len(checks)}:\n" + "\n".join(broken))
    return checks


def run_checks(
    backend: AttentionBackend, *, device: str | torch.device = "cpu", seq_lens: Sequence[int] | None = None
) -> list[Check]:
    """Try every claim on a backend and report; arguments as of `check_backend`. The backend is left in eval mode."""
    backend = backend.eval().to(device)
    lengths = tuple(seq_lens) if seq_lens is not None else _telling_lengths(backend.pattern)
    subject = _Subject(backend, torch.device(device), lengths, *_widest(backend, torch.device(device)))
    with torch.random.fork_rng(devices=[subject.device] if subject.device.type == "cuda" else []):
        return [_run(claim, subject) for claim in _CLAIMS]


def main_check(name: str, options: Mapping[str, Any]) -> int:
    """Check the backend registered as `name`, built with `options`; print the report.

    Returns:
        0 when every claim holds that could be checked, at least one; else 1.

    Raises:
        ValueError: there is no such backend, or it does not take these options.
    """
    if "backend" in options:
        raise ValueError(
            f"backend is no option: the backend to check is {name!r}; leave out backend={options['backend']}"
        )
    try:
        backend = attention.build({"backend": name, **options})
    except ValueError as error:  # of a plug-in's constructor too
        raise ValueError(f"check-backend {name}: {error}") from error
    checks = run_checks(backend)
    for check in checks:
        print(check)
    failed = sum(check.passed is False for check in checks)
    unchecked = sum(check.passed is None for check in checks)
    print(f"{name}: {len(checks) - failed - unchecked} claims hold, {failed} broken, {unchecked} not checked")
    return 1 if failed or unchecked == len(checks) else 0


def reference(
    pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, causal: bool, key_padding_mask: Tensor | None = None
) -> Tensor:
    """The softmax over the multiset of keys that `pattern` shows each query, written out.

    Args:
        q, k, v: (B, N, H, D).
        key_padding_mask: (B, N) bool, True where the token is real.

    Returns:
        (B, N, H, D); 0 for padded queries and for queries that see nothing.
    """
    batch, seq_len, heads, head_dim = q.shape
    real = torch.ones(batch, seq_len, dtype=torch.bool) if key_padding_mask is None else key_padding_mask.cpu()
    m = pattern.multiplicity(seq_len, heads, causal)
    m = m * real[:, None, None, :] * real[:, None, :, None]  # (B, H, N, N)
    m = m.to(q)
    q, k, v = (torch.where(real[:, :, None, None].to(x.device), x, 0) for x in (q, k, v))
    scores = (torch.einsum("bphd,bkhd->bhpk", q, k) / head_dim**0.5).masked_fill(m == 0, -torch.inf)
    largest = scores.amax(-1, keepdim=True).detach().clamp(min=torch.finfo(scores.dtype).min)
    weights = m * (scores - largest).exp()
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("bhpk,bkhd->bphd", weights / torch.where(total == 0, 1, total), v)


def _widest(backend: AttentionBackend, device: torch.device) -> tuple[torch.dtype, tuple[int, ...]]:
    """The widest dtype that the backend supports, and up to two head widths; float64 where it supports none."""
    for dtype in WITHIN:
        widths = [
            width
            for width in HEAD_DIMS
            if any(backend.supports(device=device, dtype=dtype, head_dim=width, causal=c) for c in (True, False))
        ]
        if widths:
            return dtype, tuple(widths[:2])
    return torch.float64, HEAD_DIMS[:1]


def _telling_lengths(pattern: Pattern | None) -> tuple[int, ...]:
    """Short lengths, and the first longer one at which the pattern is not simply dense."""
    if pattern is None or not _is_dense(pattern, SEQ_LENS[-1]):
        return SEQ_LENS
    return SEQ_LENS + next(((length,) for length in (130, 300, 610) if not _is_dense(pattern, length)), ())


def _is_dense(pattern: Pattern, seq_len: int) -> bool:
    m = pattern.multiplicity(seq_len, 2, False)
    return bool((m == m[0, 0, 0]).all())


def _run(claim: Callable[[_Subject], None], subject: _Subject) -> Check:
    words = (claim.__doc__ or "").strip()
    torch.manual_seed(0)
    try:
        claim(subject)
    except _Unchecked as reason:
        return Check(words, None, str(reason))
    except _Broken as broken:
        return Check(words, False, str(broken))
    except Exception as error:  # a plug-in may raise anything
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Check(words, False, f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})")
    return Check(words, True)


_Inputs = tuple[Tensor, Tensor, Tensor]


def _each(inputs: _Inputs, change: Callable[[Tensor], Tensor]) -> _Inputs:
    q, k, v = inputs
    return change(q), change(k), change(v)


def _inputs(subject: _Subject, seq_len: int, batch: int = 2, heads: int = 3, head_dim: int | None = None) -> _Inputs:
    """q, k, v as slices of one fused projection, standard normal, in the widest dtype."""
    shape = (batch, seq_len, 3, heads, head_dim or subject.head_dims[0])
    qkv = torch.randn(shape, dtype=torch.float64).to(subject.device, subject.dtype)
    q, k, v = qkv.unbind(2)
    return q, k, v


def _cases(subject: _Subject, padding: bool = False) -> Iterator[tuple[int, bool, str]]:
    """Every length, causal and not, as far as the backend supports it in the widest dtype; and words for the case."""
    reason = ""
    for causal in (True, False):
        support = _supports(subject, causal=causal, padding=padding)
        reason = reason or support.reason
        for seq_len in subject.seq_lens if support else ():
            yield seq_len, causal, f"{'causal' if causal else 'not causal'}, {seq_len} tokens"
    if reason and not any(_supports(subject, causal=causal, padding=padding) for causal in (True, False)):
        raise _Unchecked(f"the backend says: {reason}")


def _supports(subject: _Subject, dtype: torch.dtype | None = None, **inputs: bool) -> Support:
    dtype = dtype or subject.dtype
    return subject.backend.supports(device=subject.device, dtype=dtype, head_dim=subject.head_dims[0], **inputs)


def _masks(batch: int, seq_len: int, device: torch.device) -> Iterator[Tensor]:
    """Padding on the right, on the left, scattered, and all but one token."""
    position = torch.arange(seq_len, device=device).expand(batch, seq_len)
    row = torch.arange(batch, device=device)[:, None]
    yield position < (seq_len - row * (seq_len // 3)).clamp(min=1)
    yield position >= (row * (seq_len // 4))
    yield (torch.rand(batch, seq_len) < 0.6).to(device)
    yield position == seq_len // 2


def _outcome(
    run: Callable[..., Tensor], inputs: _Inputs, grad_out: Tensor, *rest: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and gradients of `run(*inputs, *rest)` with respect to fresh leaves with the strides of `inputs`."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(*leaves, *rest)
    if not out.requires_grad:
        raise _Broken("the output has no gradient")
    grads = torch.autograd.grad(out, leaves, grad_out.to(out.dtype), allow_unused=True)
    return out.detach(), tuple(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True))


def _expect_close(got: Tensor, expected: Tensor, within: float, what: str) -> None:
    if got.shape != expected.shape:
        raise _Broken(f"{what} has shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    if not got.isfinite().all():
        raise _Broken(f"{what} is not finite")
    difference = (got.double() - expected.double()).abs().max().item()
    within *= max(1.0, expected.abs().max().item())
    if not difference <= within:
        raise _Broken(f"{what} is off by {difference:.1e}, allowed {within:.0e}")


def _shape_and_dtype(subject: _Subject) -> None:
    """The output has the shape and dtype of q, for any length, batch and number of heads"""
    for seq_len, causal, case in _cases(subject):
        for batch, heads in ((1, 1), (3, 5)):
            q, k, v = _inputs(subject, seq_len, batch, heads)
            out = subject.backend(q, k, v, causal=causal)
            if out.shape != q.shape or out.dtype != q.dtype or out.device != q.device:
                given = f"{tuple(out.shape)} {out.dtype} on {out.device}"
                raise _Broken(f"{case}: got {given}, expected {tuple(q.shape)} {q.dtype} on {q.device}")


def _values_and_gradients(subject: _Subject) -> None:
    """Values and gradients are those of one softmax over the pattern's keys, scores scaled by 1/sqrt(D)"""
    pattern = subject.backend.pattern
    if pattern is None:
        raise _Unchecked("the backend has no pattern, so there is nothing to compare with")
    for seq_len, causal, case in _cases(subject):
        masks: list[Tensor | None] = [None]
        if _supports(subject, causal=causal, padding=True):
            masks += _masks(2, seq_len, subject.device)
        for head_dim in subject.head_dims:
            inputs = _inputs(subject, seq_len, head_dim=head_dim)
            grad_out = torch.randn_like(inputs[0])
            for mask in masks:
                got, grads = _outcome(subject.backend, inputs, grad_out, causal, mask)
                wanted, wanted_grads = _expected(pattern, inputs, grad_out, causal, mask)
                where = f"{case}, heads {head_dim} wide" + ("" if mask is None else ", padded")
                _expect_close(got, wanted, subject.within, f"{where}: the output")
                for name, grad, wanted_grad in zip("qkv", grads, wanted_grads, strict=True):
                    _expect_close(grad, wanted_grad, subject.within, f"{where}: the gradient of {name}")


def _expected(
    pattern: Pattern, inputs: _Inputs, grad_out: Tensor, causal: bool, mask: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and gradients of the reference, in float64 whatever the inputs are."""
    return _outcome(partial(reference, pattern), _each(inputs, Tensor.double), grad_out.double(), causal, mask)


def _large_scores(subject: _Subject) -> None:
    """Scores far beyond what exp can take leave values and gradients finite, and are a softmax still"""
    for seq_len, causal, case in _cases(subject):
        q, k, v = _inputs(subject, seq_len)
        inputs, grad_out = (30 * q, 30 * k, v), torch.randn_like(q)
        out, grads = _outcome(subject.backend, inputs, grad_out, causal)
        if not all(x.isfinite().all() for x in (out, *grads)):
            raise _Broken(f"{case}, q and k times 30: the output or a gradient is not finite")
        # In narrow dtypes the rounding of such scores decides which key wins.
        within = {torch.float64: WITHIN[torch.float64], torch.float32: 1e-2}.get(subject.dtype)
        if subject.backend.pattern is not None and within is not None:
            wanted, _ = _expected(subject.backend.pattern, inputs, grad_out, causal)
            _expect_close(out, wanted, within, f"{case}, q and k times 30: the output")


def _gradients_are_derivatives(subject: _Subject) -> None:
    """Gradients are the derivatives of the output, by finite differences"""
    if subject.dtype != torch.float64:
        support = _supports(subject, torch.float64)
        raise _Unchecked(f"that takes float64, and the backend says: {support.reason}")
    step = 1e-5
    for seq_len, causal, case in _cases(subject):
        inputs = _inputs(subject, seq_len)
        grad_out = torch.randn_like(inputs[0])
        _, grads = _outcome(subject.backend, inputs, grad_out, causal)
        for i, name in enumerate("qkv"):
            direction = torch.randn_like(inputs[i])
            ends = []
            for sign in (1, -1):
                moved = list(inputs)
                moved[i] = inputs[i] + sign * step * direction
                ends.append((subject.backend(*moved, causal=causal) * grad_out).sum())
            slope = (ends[0] - ends[1]) / (2 * step)
            scale = 1 + slope.abs().item()
            _expect_close((grads[i] * direction).sum() / scale, slope / scale, 1e-6, f"{case}: the slope along {name}")


def _no_future(subject: _Subject) -> None:
    """A causal query sees nothing after its own position"""
    for seq_len, causal, case in _cases(subject):
        if not causal or seq_len < 2:
            continue
        inputs = _inputs(subject, seq_len)
        before = subject.backend(*inputs)
        for cut in {1, seq_len // 2, seq_len - 1}:
            after = subject.backend(*_each(inputs, partial(_other_after, cut)))
            _expect_close(after[:, :cut], before[:, :cut], subject.within, f"{case}: the output before position {cut}")


def _other_after(cut: int, x: Tensor) -> Tensor:
    return torch.cat([x[:, :cut], 10 * torch.randn_like(x[:, cut:])], 1)


def _weights_sum_to_one(subject: _Subject) -> None:
    """Every query mixes values with weights that sum to one, or outputs zero"""
    for seq_len, causal, case in _cases(subject):
        q, k, v = _inputs(subject, seq_len)
        out = subject.backend(q, k, torch.ones_like(v), causal=causal)
        _expect_close(out, (out > 0.5).to(out), subject.within, f"{case}: the sum of the weights")


def _padding_is_unseen(subject: _Subject) -> None:
    """Padded tokens take no weight, get no gradient and output zero; NaN in them does no harm"""
    for seq_len, causal, case in _cases(subject, padding=True):
        inputs = _inputs(subject, seq_len)
        for mask in _masks(2, seq_len, subject.device):
            grad_out = torch.randn_like(inputs[0])
            padded = ~mask[:, :, None, None]
            results = []
            for filling in (float("nan"), 7.0):
                filled = _each(inputs, partial(Tensor.masked_fill, mask=padded, value=filling))
                results.append(_outcome(subject.backend, filled, grad_out, causal, mask))
            (out, grads), (other_out, other_grads) = results
            _expect_close(out * padded, torch.zeros_like(out), 0.0, f"{case}: the output of padding")
            _expect_close(out, other_out, subject.within, f"{case}: the output, under another padding,")
            for name, grad, other in zip("qkv", grads, other_grads, strict=True):
                _expect_close(grad * padded, torch.zeros_like(grad), 0.0, f"{case}: the gradient of padding in {name}")
                _expect_close(grad, other, subject.within, f"{case}: the gradient of {name}, under another padding,")


def _right_padding_is_shorter(subject: _Subject) -> None:
    """Padding on the right gives what the shorter sequence gives"""
    for seq_len, causal, case in _cases(subject, padding=True):
        length = max(1, seq_len * 2 // 3)
        inputs = _inputs(subject, seq_len)
        mask = torch.arange(seq_len, device=subject.device).expand(2, seq_len) < length
        padded = subject.backend(*inputs, causal, mask)[:, :length]
        cut = subject.backend(*_each(inputs, partial(Tensor.narrow, dim=1, start=0, length=length)), causal)
        _expect_close(padded, cut, subject.within, f"{case}, {length} of them real: the output")


def _batch_rows_are_independent(subject: _Subject) -> None:
    """A row of a batch gives what it gives alone"""
    for seq_len, causal, case in _cases(subject):
        inputs = _inputs(subject, seq_len, batch=3)
        whole = subject.backend(*inputs, causal)
        for row in range(3):
            alone = subject.backend(*_each(inputs, partial(Tensor.narrow, dim=0, start=row, length=1)), causal)
            _expect_close(alone, whole[row : row + 1], subject.within, f"{case}: row {row} alone")


def _heads_by_index(subject: _Subject) -> None:
    """Some of the heads, given their index, output what they output among all"""
    for seq_len, causal, case in _cases(subject):
        inputs = _inputs(subject, seq_len, heads=5)
        whole = subject.backend(*inputs, causal)
        for first, last in ((0, 2), (2, 5), (3, 4)):
            given = _each(inputs, partial(Tensor.narrow, dim=2, start=first, length=last - first))
            some = subject.backend(*given, causal, first_head=first, total_heads=5)
            _expect_close(some, whole[:, :, first:last], subject.within, f"{case}: heads {first} to {last - 1}")


def _shards(subject: _Subject) -> None:
    """Ranks that hold a shard of the sequence each give what one gives for the whole, gradients too"""
    from longnet_kit.parallel import threads

    refusal, checked = "no length divides among the ranks", False
    for seq_len, causal, case in _cases(subject):
        for ranks in (2, 4):
            if seq_len % ranks:
                continue
            support = subject.backend.supports_shards(seq_len=seq_len, shards=ranks, heads=4)
            refusal = refusal if support else support.reason
            if not support:
                continue
            checked = True
            inputs = _inputs(subject, seq_len, heads=4)
            grad_out = torch.randn_like(inputs[0])
            out, grads = _outcome(subject.backend, inputs, grad_out, causal)
            parts = threads.run(ranks, partial(_from_shard, subject.backend, inputs, grad_out, causal))
            where = f"{case} on {ranks} ranks"
            _expect_close(torch.cat([part for part, _ in parts], 1), out, subject.within, f"{where}: the output")
            for i, name in enumerate("qkv"):
                joined = torch.cat([part_grads[i] for _, part_grads in parts], 1)
                _expect_close(joined, grads[i], subject.within, f"{where}: the gradient of {name}")
    if not checked:
        raise _Unchecked(refusal)


def _from_shard(
    backend: AttentionBackend, inputs: _Inputs, grad_out: Tensor, causal: bool, shard: SequenceShard
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and gradients of this rank's part; each rank has a module of its own, as in a job."""
    own = copy.deepcopy(backend)
    bind(own, shard)
    *parts, grad_part = (x.chunk(shard.size, 1)[shard.rank] for x in (*inputs, grad_out))
    return _outcome(own, tuple(parts), grad_part, causal)  # type: ignore[arg-type]


def _memory_layout(subject: _Subject) -> None:
    """Slices of a fused projection give what contiguous tensors give"""
    for seq_len, causal, case in _cases(subject):
        sliced = _inputs(subject, seq_len)
        grad_out = torch.randn_like(sliced[0])
        out, grads = _outcome(subject.backend, sliced, grad_out, causal)
        contiguous = _each(sliced, Tensor.contiguous)
        other, other_grads = _outcome(subject.backend, contiguous, grad_out, causal)
        _expect_close(out, other, subject.within, f"{case}: the output")
        for name, grad, other_grad in zip("qkv", grads, other_grads, strict=True):
            _expect_close(grad, other_grad, subject.within, f"{case}: the gradient of {name}")


def _deterministic(subject: _Subject) -> None:
    """In eval mode the same inputs give the same output, to the bit"""
    for seq_len, causal, case in _cases(subject):
        inputs = _inputs(subject, seq_len)
        first, second = (subject.backend(*inputs, causal) for _ in range(2))
        if not torch.equal(first, second):
            raise _Broken(f"{case}: two runs differ by {(first - second).abs().max().item():.1e}")


def _other_dtypes(subject: _Subject) -> None:
    """float32, bfloat16 and float16 give the result of the widest dtype to their precision, gradients too"""
    checked = False
    for seq_len, causal, case in _cases(subject):
        widest_inputs = _inputs(subject, seq_len)
        for dtype, within in WITHIN.items():
            if dtype == subject.dtype or not _supports(subject, dtype, causal=causal):
                continue
            checked = True
            inputs = _each(widest_inputs, partial(Tensor.to, dtype=dtype))
            grad_out = torch.randn_like(inputs[0])
            out, grads = _outcome(subject.backend, inputs, grad_out, causal)
            if out.dtype != dtype:
                raise _Broken(f"{case}: {dtype} in, {out.dtype} out")
            widened = _each(inputs, partial(Tensor.to, dtype=subject.dtype))
            wanted, wanted_grads = _outcome(subject.backend, widened, grad_out.to(subject.dtype), causal)
            _expect_close(out, wanted, within, f"{case}, {dtype}: the output")
            for name, grad, wanted_grad in zip("qkv", grads, wanted_grads, strict=True):
                _expect_close(grad, wanted_grad, within, f"{case}, {dtype}: the gradient of {name}")
    if not checked:
        raise _Unchecked(f"the backend runs in {subject.dtype} alone")


def _autocast(subject: _Subject) -> None:
    """Runs under autocast, forward and backward"""
    support = _supports(subject, torch.float32)
    if not support:
        raise _Unchecked(f"the backend says: {support.reason}")
    for seq_len, causal, case in _cases(subject):
        inputs = _each(_inputs(subject, seq_len), Tensor.float)
        masks: list[Tensor | None] = [None]
        if _supports(subject, torch.float32, causal=causal, padding=True):
            masks.append(torch.arange(seq_len, device=subject.device).expand(2, seq_len) < max(1, seq_len - 1))
        for mask in masks:
            with torch.autocast(subject.device.type, torch.bfloat16):
                out, grads = _outcome(subject.backend, inputs, torch.ones_like(inputs[0]), causal, mask)
            exact = subject.backend(*_each(inputs, partial(Tensor.to, dtype=subject.dtype)), causal, mask)
            _expect_close(out, exact, WITHIN[torch.bfloat16], f"{case}: the output")
            if any(grad.dtype != torch.float32 for grad in grads):
                raise _Broken(f"{case}: gradients of float32 inputs are {[str(grad.dtype) for grad in grads]}")


_CLAIMS = (
    _shape_and_dtype,
    _values_and_gradients,
    _large_scores,
    _gradients_are_derivatives,
    _no_future,
    _weights_sum_to_one,
    _padding_is_unseen,
    _right_padding_is_shorter,
    _batch_rows_are_independent,
    _heads_by_index,
    _shards,
    _memory_layout,
    _deterministic,
    _other_dtypes,
    _autocast,
)
