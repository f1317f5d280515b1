"""xformers' memory-efficient kernels (fmha) for block-sparse attention, and whether they run right here."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from longnet_kit.attention import block_sparse_tensor
from longnet_kit.attention.block_sparse_merged import Kernel, attend
from longnet_kit.attention.patterns import BlockSparse

DTYPES = (torch.float16, torch.bfloat16)
"""What both flash kernels take; the older ones that take float32 keep lse in a layout of their own."""


class Fmha:
    """A forward and a backward operator of xformers that share one layout of lse: (1, H, tokens)."""

    name = "the attention backend xformers"

    def __init__(self, module: str) -> None:
        self._fmha = importlib.import_module("xformers.ops.fmha")
        operators = importlib.import_module(f"xformers.ops.fmha.{module}")
        self._ops = operators.FwOp, operators.BwOp

    @staticmethod
    def bias(queries: list[int], keys: list[int], causal: bool, device: torch.device) -> Any:
        from xformers.ops.fmha import attn_bias

        kind = attn_bias.BlockDiagonalCausalFromBottomRightMask if causal else attn_bias.BlockDiagonalMask
        return kind.from_seqlens(queries, keys, device=device)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Any, scale: float) -> tuple[Tensor, Tensor]:
        return self._fmha.memory_efficient_attention_forward_requires_grad(q, k, v, bias, 0.0, scale, op=self._ops[0])

    def backward(
        self, grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Any, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._fmha.memory_efficient_attention_backward(
            grad, out, lse, q, k, v, bias, 0.0, scale, op=self._ops[1]
        )


def probe(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[Kernel | None, str]:
    """The kernel that runs right on this device, or None and why each was refused.

    A small batch is run forward and backward and compared with BlockSparseTensor. The answer is kept for each
    (device, dtype, width) and for whether torch asks for deterministic algorithms, which rules kernels out.
    """
    if device.type != "cuda":
        return None, f"fmha has no kernels for {device.type}, only for cuda"
    if dtype not in DTYPES:
        return None, f"fmha runs in {' or '.join(map(str, DTYPES))}, not in {dtype}"
    return _probe(device, dtype, head_dim, torch.are_deterministic_algorithms_enabled())


@functools.cache
def _probe(device: torch.device, dtype: torch.dtype, head_dim: int, deterministic: bool) -> tuple[Kernel | None, str]:
    refusals = []
    for module in ("flash3", "flash"):
        try:
            kernel = Fmha(module)
            disagreement = check(kernel, device, dtype, head_dim)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # what an operator cannot run it refuses in many ways
            refusals.append(f"{module}: {' '.join(str(error).split())}")
        else:
            if not disagreement:
                return kernel, ""
            refusals.append(f"{module}: {disagreement}")
    return None, "; ".join(refusals)


def check(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Compare a kernel with BlockSparseTensor, forward and backward, with and without causality and padding.

    Returns:
        What disagrees by more than rounding; empty when nothing does.
    """
    generator = torch.Generator().manual_seed(0)
    pattern = BlockSparse("fixed", 16, 2, 1)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        drawn = torch.randn(4, 2, 75, 2, head_dim, generator=generator).to(device, dtype)
        q, k, v, grad = drawn.unbind()
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        right = torch.arange(75, device=device) < torch.tensor([[75], [41]], device=device)
        for causal, mask in ((True, None), (False, None), (True, right), (False, right)):
            results = [
                (out, *torch.autograd.grad(out, (q, k, v), grad))
                for out in (
                    attend(q, k, v, pattern, causal, mask, kernel),
                    block_sparse_tensor.attend(q, k, v, pattern, causal, mask),
                )
            ]
            for name, given, expected in zip(("out", "dq", "dk", "dv"), *results, strict=True):
                error = (given - expected).abs().max() / expected.abs().max()
                if not error < 0.05:  # NaN included
                    return f"{name} is off by {error:.0%} (causal={causal}, padding={mask is not None})"
    return ""
