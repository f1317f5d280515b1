"""The past of a stream, for a whole network: a cache of each layer, and what they belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longnet_kit.errors import UserError

if TYPE_CHECKING:
    from longnet_kit.attention import Cache
    from longnet_kit.model.transformer import Transformer

_WITHOUT_EFFECT = {"dropout", "activation_checkpointing", "ffn_chunk", "loss_chunk"}
"""Settings of a network that change nothing of what it gives in evaluation."""


class StreamCache:
    """What a network keeps of the past of `batch_size` streams that advance together; `Transformer.new_cache` makes it.

    It belongs to that network with the weights that it has: with others the past would be another. `state_dict` and
    `load_state_dict` carry it into another process.
    """

    layers: Sequence[Cache]
    """The cache of each layer's attention."""
    batch_size: int
    position: int
    """Tokens of each stream that were seen."""

    def __init__(self, network: Transformer, layers: Sequence[Cache], batch_size: int) -> None:
        self._network = network
        self.layers = layers
        self.batch_size = batch_size
        self.position = 0
        self._is_whole = True

    @property
    def nbytes(self) -> int:
        """Bytes that all layers hold now."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def max_tokens(self) -> int | None:
        """How many tokens it takes at most; None: any number, without growing."""
        limits = [layer.max_tokens for layer in self.layers if layer.max_tokens is not None]
        return min(limits, default=None)

    def check(self, network: Transformer, tokens: Tensor) -> None:
        """Raise a UserError unless the network may go on with it through the next tokens, (B, n)."""
        if self._network is not network:
            raise UserError("the cache is of another model; make one with this model's new_cache")
        if not self._is_whole:
            raise UserError(
                "the cache was left half-way by an error, so its past is lost; make a new one, or load a saved one"
            )
        if tokens.shape[0] != self.batch_size:
            raise UserError(
                f"the cache is for {self.batch_size} streams, and tokens has a batch of {tokens.shape[0]}; make one "
                f"with new_cache({tokens.shape[0]})"
            )
        dtype = computing_dtype(network.embedding.weight)
        if any(layer.dtype != dtype for layer in self.layers):
            raise UserError(
                f"the cache holds {self.layers[0].dtype} and the model computes in {dtype} now; make one with "
                "new_cache under the same autocast"
            )
        self.check_room(tokens.shape[1])

    def check_room(self, tokens: int) -> None:
        """Raise a UserError where so many more tokens are beyond the cache or the model's position embedding."""
        for layer in self.layers:
            layer.check_room(tokens)
        embedding = self._network.positions
        if embedding is not None:
            embedding.check(self.position + tokens, computing_dtype(self._network.embedding.weight))

    @contextmanager
    def advancing(self, tokens: int) -> Iterator[None]:
        """While the layers take so many tokens: an error in it leaves them at different places."""
        self._is_whole = False
        yield
        self._is_whole = True
        self.position += tokens

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, for `torch.save`; `torch.load(..., weights_only=True)` reads them."""
        if not self._is_whole:
            raise UserError("the cache was left half-way by an error, so there is nothing to save")
        return {
            "position": self.position,
            "batch_size": self.batch_size,
            "config": _config(self._network),
            "weights": fingerprint(self._network),
            "layers": [layer.state_dict() for layer in self.layers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, in this or another process.

        Raises:
            UserError: it is no such state, or of another model or batch.
        """
        missing = {"position", "batch_size", "config", "weights", "layers"} - {*state}
        if missing:
            raise UserError(f"this is no state of a cache: it has no {', '.join(sorted(missing))}")
        own, saved = _config(self._network), state["config"]
        keys = [key for key in {**own, **saved} if own.get(key) != saved.get(key)]
        if keys:
            differing = "; ".join(f"{key} is {saved.get(key)} there and {own.get(key)} here" for key in keys)
            raise UserError(f"the saved cache is of another model: {differing}")
        if state["batch_size"] != self.batch_size:
            raise UserError(
                f"the saved cache is for {state['batch_size']} streams and this one for {self.batch_size}; load it "
                f"into new_cache({state['batch_size']})"
            )
        if state["weights"] != fingerprint(self._network):
            raise UserError("the saved cache is of a model like this one with other weights; load those weights first")
        layers, position = state["layers"], state["position"]
        fits = isinstance(layers, Sequence) and len(layers) == len(self.layers)
        if not fits or any(not isinstance(x, Mapping) or x.get("position") != position for x in layers):
            raise UserError("this is no state of a cache: its layers are not all there, or at different positions")
        self._is_whole = False
        for layer, layer_state in zip(self.layers, layers, strict=True):
            layer.load_state_dict(layer_state)
        self.position, self._is_whole = int(position), True


def computing_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of a layer's output for such weights, autocast considered."""
    if torch.is_autocast_enabled(weight.device.type) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def fingerprint(network: Transformer) -> str:
    """A digest of a network's weights: equal on every device, and after any change of a weight almost surely another.

    Sums over bit patterns: integers, so that the order in which they are added does not matter. One of them tells
    places apart, the other the high bits, which an even place would lose.
    """
    digest = hashlib.blake2b(digest_size=16)
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, x in network.state_dict().items():
        bits = x.detach().contiguous().flatten().view(integers[x.element_size()])
        place = torch.arange(1, len(bits) + 1, device=bits.device)
        sums = int(bits.sum(dtype=torch.int64)), int((bits * place).sum(dtype=torch.int64))
        digest.update(repr((name, tuple(x.shape), str(x.dtype), sums)).encode())
    return digest.hexdigest()


def _config(network: Transformer) -> dict[str, Any]:
    return {key: value for key, value in network.config.items() if key not in _WITHOUT_EFFECT}
