"""Dense attention by torch's fused kernel: the baseline that a user would pick instead of LongNet."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longnet_kit.attention import derivatives, padding, patterns, register
from longnet_kit.attention.backend import AttentionBackend
from longnet_kit.attention.cache import KeyValueCache
from longnet_kit.attention.mixture import causal_after, unit_stride


@register("sdpa")
class SDPA(AttentionBackend):
    """Every query sees every key (up to its own, if causal), through `scaled_dot_product_attention`."""

    @property
    def pattern(self) -> patterns.Pattern:
        return patterns.Dense()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool = True, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        derivatives.refuse_forward_mode("the attention backend sdpa", q, k, v)
        scale = q.shape[-1] ** -0.5
        if key_padding_mask is None:
            return _dense(q, k, v, causal, scale)
        # A mask argument would rule the flash kernels out, or hold N x N of it when causal.
        return padding.reveal(_dense(*padding.hide(q, k, v, key_padding_mask), causal, scale), key_padding_mask)

    def new_cache(self, batch_size: int, heads: int, head_dim: int, **factory: Any) -> KeyValueCache:
        """A cache of every key, up to `max_tokens`."""
        return KeyValueCache(batch_size, heads, head_dim, **factory)

    def forward_cached(self, q: Tensor, k: Tensor, v: Tensor, cache: KeyValueCache) -> Tensor:
        """See `AttentionBackend.forward_cached`."""
        past = cache.position
        keys, values = cache.append(k, v)
        parts = (unit_stride(x).transpose(1, 2) for x in (q, k, v, keys[:, :past], values[:, :past]))
        return causal_after(*parts, scale=q.shape[-1] ** -0.5).transpose(1, 2)


def _dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, N, D)
    return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale).transpose(1, 2)
