"""Precisions and their dtypes."""

from __future__ import annotations

import pytest
import torch

from longnet_kit.model import compute_dtype


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("64-true", torch.float64),
        ("bf16-mixed", torch.bfloat16),
        ("bf16-true", torch.bfloat16),
        ("16-mixed", torch.float16),
        ("16-true", torch.float16),
        ("transformer-engine", torch.bfloat16),
        ("transformer-engine-float16", torch.float16),
    ],
)
def test_each_precision_has_its_dtype(precision: str, dtype: torch.dtype) -> None:
    assert compute_dtype(precision) is dtype
