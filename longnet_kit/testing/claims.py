"""The claims themselves, each a function of the backend under test; the first line of its docstring is the claim.

It raises `Broken` where the claim does not hold, and `Unchecked` where that cannot be said; it may return words on what
that it holds means here.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from longnet_kit.testing import claims_of_parts
from longnet_kit.testing.subject import (
    WITHIN,
    Broken,
    Subject,
    Unchecked,
    cases,
    draw,
    each,
    expect_close,
    expected,
    outcome,
    paddings,
    supports,
)


def _shape_and_dtype(subject: Subject) -> None:
    """The output has the shape and dtype of q, for any length, batch and number of heads"""
    for seq_len, causal, case in cases(subject):
        for batch, heads in ((1, 1), (3, 5)):
            q, k, v = draw(subject, seq_len, batch, heads)
            out = subject.backend(q, k, v, causal=causal)
            if out.shape != q.shape or out.dtype != q.dtype or out.device != q.device:
                given = f"{tuple(out.shape)} {out.dtype} on {out.device}"
                raise Broken(f"{case}: got {given}, expected {tuple(q.shape)} {q.dtype} on {q.device}")


def _values_and_gradients(subject: Subject) -> str:
    """Values and gradients are those of the softmax over the pattern's keys, scores scaled by 1/sqrt(D)"""
    if subject.backend.pattern is None:
        raise Unchecked("the backend has no pattern, so there is nothing to compare with")
    for seq_len, causal, case in cases(subject):
        masks: list[Tensor | None] = [None]
        if supports(subject, causal=causal, padding=True):
            masks += paddings(2, seq_len, subject.device)
        for head_dim in subject.head_dims:
            inputs = draw(subject, seq_len, head_dim=head_dim)
            grad_out = torch.randn_like(inputs[0])
            for mask in masks:
                got, grads = outcome(subject.backend, inputs, grad_out, causal, mask)
                wanted, wanted_grads = expected(subject.backend, inputs, grad_out, causal, mask)
                where = f"{case}, heads {head_dim} wide" + ("" if mask is None else ", padded")
                expect_close(got, wanted, subject.within, f"{where}: the output")
                for name, grad, wanted_grad in zip("qkv", grads, wanted_grads, strict=True):
                    expect_close(grad, wanted_grad, subject.within, f"{where}: the gradient of {name}")
    if subject.backend.branch_logits is None:
        return ""
    return "of one for each branch, that is, mixed by the backend's own weights"


def _large_scores(subject: Subject) -> None:
    """Scores far beyond what exp can take leave values and gradients finite, and are a softmax still"""
    for seq_len, causal, case in cases(subject):
        q, k, v = draw(subject, seq_len)
        inputs, grad_out = (30 * q, 30 * k, v), torch.randn_like(q)
        out, grads = outcome(subject.backend, inputs, grad_out, causal)
        if not all(x.isfinite().all() for x in (out, *grads)):
            raise Broken(f"{case}, q and k times 30: the output or a gradient is not finite")
        # In narrow dtypes the rounding of such scores decides which key wins.
        within = {torch.float64: WITHIN[torch.float64], torch.float32: 1e-2}.get(subject.dtype)
        if subject.backend.pattern is not None and within is not None:
            wanted, _ = expected(subject.backend, inputs, grad_out, causal)
            expect_close(out, wanted, within, f"{case}, q and k times 30: the output")


def _gradients_are_derivatives(subject: Subject) -> None:
    """Gradients are the derivatives of the output, by finite differences"""
    if subject.dtype != torch.float64:
        support = supports(subject, torch.float64)
        raise Unchecked(f"that takes float64, and the backend says: {support.reason}")
    step = 1e-5
    for seq_len, causal, case in cases(subject):
        inputs = draw(subject, seq_len)
        grad_out = torch.randn_like(inputs[0])
        _, grads = outcome(subject.backend, inputs, grad_out, causal)
        for i, name in enumerate("qkv"):
            direction = torch.randn_like(inputs[i])
            ends = []
            for sign in (1, -1):
                moved = list(inputs)
                moved[i] = inputs[i] + sign * step * direction
                ends.append((subject.backend(*moved, causal=causal) * grad_out).sum())
            slope = (ends[0] - ends[1]) / (2 * step)
            scale = 1 + slope.abs().item()
            expect_close((grads[i] * direction).sum() / scale, slope / scale, 1e-6, f"{case}: the slope along {name}")


def _no_future(subject: Subject) -> None:
    """A causal query sees nothing after its own position"""
    for seq_len, causal, case in cases(subject):
        if not causal or seq_len < 2:
            continue
        inputs = draw(subject, seq_len)
        before = subject.backend(*inputs)
        for cut in {1, seq_len // 2, seq_len - 1}:
            after = subject.backend(*each(inputs, partial(_other_after, cut)))
            expect_close(after[:, :cut], before[:, :cut], subject.within, f"{case}: the output before position {cut}")


def _other_after(cut: int, x: Tensor) -> Tensor:
    return torch.cat([x[:, :cut], 10 * torch.randn_like(x[:, cut:])], 1)


def _weights_sum_to_one(subject: Subject) -> None:
    """Every query mixes values with weights that sum to one, or outputs zero"""
    for seq_len, causal, case in cases(subject):
        q, k, v = draw(subject, seq_len)
        out = subject.backend(q, k, torch.ones_like(v), causal=causal)
        expect_close(out, (out > 0.5).to(out), subject.within, f"{case}: the sum of the weights")


def _padding_is_unseen(subject: Subject) -> None:
    """Padded tokens take no weight, get no gradient and output zero; NaN in them does no harm"""
    for seq_len, causal, case in cases(subject, padding=True):
        inputs = draw(subject, seq_len)
        for mask in paddings(2, seq_len, subject.device):
            grad_out = torch.randn_like(inputs[0])
            padded = ~mask[:, :, None, None]
            results = []
            for filling in (float("nan"), 7.0):
                filled = each(inputs, partial(Tensor.masked_fill, mask=padded, value=filling))
                results.append(outcome(subject.backend, filled, grad_out, causal, mask))
            (out, grads), (other_out, other_grads) = results
            expect_close(out * padded, torch.zeros_like(out), 0.0, f"{case}: the output of padding")
            expect_close(out, other_out, subject.within, f"{case}: the output, under another padding,")
            for name, grad, other in zip("qkv", grads, other_grads, strict=True):
                expect_close(grad * padded, torch.zeros_like(grad), 0.0, f"{case}: the gradient of padding in {name}")
                expect_close(grad, other, subject.within, f"{case}: the gradient of {name}, under another padding,")


def _right_padding_is_shorter(subject: Subject) -> None:
    """Padding on the right gives what the shorter sequence gives"""
    for seq_len, causal, case in cases(subject, padding=True):
        length = max(1, seq_len * 2 // 3)
        inputs = draw(subject, seq_len)
        mask = torch.arange(seq_len, device=subject.device).expand(2, seq_len) < length
        padded = subject.backend(*inputs, causal, mask)[:, :length]
        cut = subject.backend(*each(inputs, partial(Tensor.narrow, dim=1, start=0, length=length)), causal)
        expect_close(padded, cut, subject.within, f"{case}, {length} of them real: the output")


def _batch_rows_are_independent(subject: Subject) -> None:
    """A row of a batch gives what it gives alone"""
    for seq_len, causal, case in cases(subject):
        inputs = draw(subject, seq_len, batch=3)
        whole = subject.backend(*inputs, causal)
        for row in range(3):
            alone = subject.backend(*each(inputs, partial(Tensor.narrow, dim=0, start=row, length=1)), causal)
            expect_close(alone, whole[row : row + 1], subject.within, f"{case}: row {row} alone")


def _heads_by_index(subject: Subject) -> None:
    """Some of the heads, given their index, output what they output among all"""
    for seq_len, causal, case in cases(subject):
        inputs = draw(subject, seq_len, heads=5)
        whole = subject.backend(*inputs, causal)
        for first, last in ((0, 2), (2, 5), (3, 4)):
            given = each(inputs, partial(Tensor.narrow, dim=2, start=first, length=last - first))
            some = subject.backend(*given, causal, first_head=first, total_heads=5)
            expect_close(some, whole[:, :, first:last], subject.within, f"{case}: heads {first} to {last - 1}")


def _memory_layout(subject: Subject) -> None:
    """Slices of a fused projection give what contiguous tensors give"""
    for seq_len, causal, case in cases(subject):
        sliced = draw(subject, seq_len)
        grad_out = torch.randn_like(sliced[0])
        out, grads = outcome(subject.backend, sliced, grad_out, causal)
        contiguous = each(sliced, Tensor.contiguous)
        other, other_grads = outcome(subject.backend, contiguous, grad_out, causal)
        expect_close(out, other, subject.within, f"{case}: the output")
        for name, grad, other_grad in zip("qkv", grads, other_grads, strict=True):
            expect_close(grad, other_grad, subject.within, f"{case}: the gradient of {name}")


def _deterministic(subject: Subject) -> None:
    """In eval mode the same inputs give the same output, to the bit"""
    for seq_len, causal, case in cases(subject):
        inputs = draw(subject, seq_len)
        first, second = (subject.backend(*inputs, causal) for _ in range(2))
        if not torch.equal(first, second):
            raise Broken(f"{case}: two runs differ by {(first - second).abs().max().item():.1e}")


def _other_dtypes(subject: Subject) -> None:
    """float32, bfloat16 and float16 give the result of the widest dtype to their precision, gradients too"""
    checked = False
    for seq_len, causal, case in cases(subject):
        widest_inputs = draw(subject, seq_len)
        for dtype, within in WITHIN.items():
            if dtype == subject.dtype or not supports(subject, dtype, causal=causal):
                continue
            checked = True
            inputs = each(widest_inputs, partial(Tensor.to, dtype=dtype))
            grad_out = torch.randn_like(inputs[0])
            out, grads = outcome(subject.backend, inputs, grad_out, causal)
            if out.dtype != dtype:
                raise Broken(f"{case}: {dtype} in, {out.dtype} out")
            widened = each(inputs, partial(Tensor.to, dtype=subject.dtype))
            wanted, wanted_grads = outcome(subject.backend, widened, grad_out.to(subject.dtype), causal)
            expect_close(out, wanted, within, f"{case}, {dtype}: the output")
            for name, grad, wanted_grad in zip("qkv", grads, wanted_grads, strict=True):
                expect_close(grad, wanted_grad, within, f"{case}, {dtype}: the gradient of {name}")
    if not checked:
        raise Unchecked(f"the backend runs in {subject.dtype} alone")


def _autocast(subject: Subject) -> None:
    """Runs under autocast, forward and backward"""
    support = supports(subject, torch.float32)
    if not support:
        raise Unchecked(f"the backend says: {support.reason}")
    for seq_len, causal, case in cases(subject):
        inputs = each(draw(subject, seq_len), Tensor.float)
        masks: list[Tensor | None] = [None]
        if supports(subject, torch.float32, causal=causal, padding=True):
            masks.append(torch.arange(seq_len, device=subject.device).expand(2, seq_len) < max(1, seq_len - 1))
        for mask in masks:
            with torch.autocast(subject.device.type, torch.bfloat16):
                out, grads = outcome(subject.backend, inputs, torch.ones_like(inputs[0]), causal, mask)
            exact = subject.backend(*each(inputs, partial(Tensor.to, dtype=subject.dtype)), causal, mask)
            expect_close(out, exact, WITHIN[torch.bfloat16], f"{case}: the output")
            if any(grad.dtype != torch.float32 for grad in grads):
                raise Broken(f"{case}: gradients of float32 inputs are {[str(grad.dtype) for grad in grads]}")


ALL = (
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
    claims_of_parts.shards,
    claims_of_parts.streams,
    _memory_layout,
    _deterministic,
    _other_dtypes,
    _autocast,
)
