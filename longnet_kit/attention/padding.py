"""Key padding for kernels that take no mask.

A padded key is hidden by one more column in q and k, whose product lowers its score by 2**30 / sqrt(D): its weight
underflows to an exact zero in every dtype. The columns come in eights, which keeps the alignment that CUDA kernels ask
for. Padded rows are zeroed first, so NaN in them harms neither values nor gradients.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

COLUMNS = 8
_ROOT = 2.0**15  # exact in float16; its square is only ever held in the kernel's float32 accumulator


def hide(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Widen q, k, v so that plain attention at scale 1 / sqrt(D) gives padded keys no weight.

    Args:
        q, k, v: (B, N, H, D).
        key_padding_mask: (B, N) bool, True where the token is real.

    Returns:
        q, k, v: (B, N, H, D + 8). Only the first D columns of the attention's output mean anything.
    """
    padded = ~key_padding_mask[:, :, None, None]  # (B, N, 1, 1)
    wide_q, wide_k, wide_v = (F.pad(x.masked_fill(padded, 0), (0, COLUMNS)) for x in (q, k, v))
    head_dim = q.shape[-1]
    wide_q[..., head_dim] = _ROOT
    wide_k[..., head_dim] = padded[..., 0] * -_ROOT
    return wide_q, wide_k, wide_v


def reveal(out: Tensor, key_padding_mask: Tensor) -> Tensor:
    """The output that belongs to `hide`: (B, N, H, D + 8) to (B, N, H, D), zero where the query is padded."""
    return out[..., :-COLUMNS].masked_fill(~key_padding_mask[:, :, None, None], 0)
