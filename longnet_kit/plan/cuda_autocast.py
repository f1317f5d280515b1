"""CUDA's rules of autocast for what runs on the CPU: which operations widen their inputs to float32.

The two devices differ: a layer norm in half precision is one in float32 on CUDA, and its input is kept for that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

WIDENED = frozenset(
    [
        "acos",
        "asin",
        "binary_cross_entropy_with_logits",
        "cdist",
        "cosh",
        "cosine_embedding_loss",
        "cosine_similarity",
        "cross_entropy",
        "cumprod",
        "cumsum",
        "dist",
        "erfinv",
        "exp",
        "expm1",
        "group_norm",
        "hinge_embedding_loss",
        "kl_div",
        "l1_loss",
        "layer_norm",
        "log",
        "log10",
        "log1p",
        "log2",
        "log_softmax",
        "margin_ranking_loss",
        "mse_loss",
        "multi_margin_loss",
        "multilabel_margin_loss",
        "nll_loss",
        "norm",
        "normalize",
        "pdist",
        "poisson_nll_loss",
        "pow",
        "prod",
        "reciprocal",
        "renorm",
        "rsqrt",
        "sinh",
        "smooth_l1_loss",
        "soft_margin_loss",
        "softmax",
        "softmin",
        "softplus",
        "sum",
        "tan",
        "triplet_margin_loss",
    ]
)
"""`CUDA Ops that can autocast to float32` in torch's documentation of torch.amp."""


class CudaAutocast(TorchFunctionMode):
    """While it is active, autocast on the CPU widens what CUDA's would."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if getattr(func, "__name__", "") in WIDENED and torch.is_autocast_enabled("cpu"):
            args = tree_map_only(Tensor, _widened, args)
            named = {name: tree_map_only(Tensor, _widened, value) for name, value in named.items()}
        return func(*args, **named)


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
