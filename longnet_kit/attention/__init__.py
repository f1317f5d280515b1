"""Attention backends: q, k, v in, out out. Nothing here knows of Lightning or of recipes.

`build` makes a backend from a mapping, `register` enters a new one, `names` lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longnet_kit.attention.backend import AttentionBackend, Support
from longnet_kit.attention.cache import Cache, KeyValueCache
from longnet_kit.registry import Registry

registry: Registry[AttentionBackend] = Registry("attention backend", "backend", group="longnet_kit.attention")
register = registry.register
names = registry.names


def build(config: Mapping[str, Any]) -> AttentionBackend:
    """Make the backend that `config["backend"]` names; the other items are its constructor's keyword arguments.

    Raises:
        UserError: an unknown backend, or arguments that it does not take, all named at once.
    """
    return registry.build(config)


from longnet_kit.attention import (  # noqa: E402, F401  (they register)
    block_sparse,
    block_sparse_torch,
    dilated,
    naive,
    padding,
    sdpa,
)
from longnet_kit.attention.multihead import MultiheadDilatedAttention  # noqa: E402

__all__ = [
    "AttentionBackend", "Cache", "KeyValueCache", "MultiheadDilatedAttention", "Support", "build", "names",
    "padding", "register", "registry",
]  # fmt: skip
