"""Which dtypes a Trainer precision computes in and trains."""

from __future__ import annotations

import torch


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype of matrix products under a `lightning.Trainer` precision such as `bf16-mixed` or `64-true`."""
    if precision.startswith("16") or precision.endswith("float16"):
        return torch.float16
    if precision.startswith(("bf16", "transformer-engine")):
        return torch.bfloat16
    return torch.float64 if precision.startswith("64") else torch.float32


def weight_dtype(precision: str) -> torch.dtype:
    """The dtype of the weights that are trained under a `lightning.Trainer` precision."""
    is_mixed = precision.endswith("mixed")
    return torch.float32 if is_mixed else compute_dtype(precision)
