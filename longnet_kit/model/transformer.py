"""The Transformer of the LongNet paper: MAGNETO blocks (arXiv 2210.06423) around any attention backend.

A block is x + W_o LN(attention(LN x)), then x + W_2 LN(GELU(W_1 LN x)): a layer norm before each sublayer and another
before its last projection (sub-LN). The embedding is also the head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from longnet_kit import attention as backends
from longnet_kit.attention import AttentionBackend, Cache
from longnet_kit.attention.sharding import SequenceShard
from longnet_kit.model import positions as position_embeddings
from longnet_kit.model.cache import StreamCache
from longnet_kit.model.dropout import Dropout
from longnet_kit.model.positions import Kind, rotate

Tables = tuple[Tensor, Tensor]
Checkpointing = Literal["none", "blocks", "blocks_on_cpu"]


class Transformer(nn.Module):
    """Tokens in, logits out.

    Args:
        vocab_size: V, how many tokens there are.
        dim: width of the residual stream.
        layers: number of blocks.
        heads: attention heads per block; `dim` is a multiple of it.
        ffn_dim: width of the feed-forward layers.
        dropout: probability of dropping an element of the embedding and of each sublayer's output.
        positions: `rope`, `xpos` (causal only) or `none`.
        causal: a token sees none after it.
        seq_len: the length that the model is for; others work too. xPos is centred on it.
        attention: `backend` and its own keys, as in a recipe; each layer has a backend of its own.
        activation_checkpointing: `blocks` keeps only the input of each block and computes the rest again in the
            backward pass; `blocks_on_cpu` keeps those inputs in the CPU's memory; `none` keeps everything.
        ffn_chunk: tokens that go through the feed-forward layers at a time; their inner states are computed again in
            the backward pass. None: all at once, and nothing twice.
        loss_chunk: tokens whose logits the loss holds at a time; None: see `model.loss`.
        compute_dtype: the dtype in which matrix products will run, for xPos's range check.

    Raises:
        ValueError: sizes or settings that do not go together, or an attention mapping that is wrong.
    """

    save_on_cpu: Callable[..., AbstractContextManager] = save_on_cpu
    """Under it, what is saved for the backward pass goes to the CPU's memory."""

    shard: SequenceShard | None = None
    """Which part of longer sequences the tokens are; None when they are whole. A sequence-parallel strategy sets it."""

    def __init__(
        self,
        vocab_size: int,
        *,
        dim: int,
        layers: int,
        heads: int,
        ffn_dim: int,
        dropout: float = 0.0,
        positions: Kind = "rope",
        causal: bool = True,
        seq_len: int,
        attention: Mapping[str, Any],
        activation_checkpointing: Checkpointing = "none",
        ffn_chunk: int | None = None,
        loss_chunk: int | None = None,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        sizes = {"vocab_size": vocab_size, "dim": dim, "layers": layers, "heads": heads}
        sizes |= {"ffn_dim": ffn_dim, "seq_len": seq_len}
        chunks = {"ffn_chunk": ffn_chunk, "loss_chunk": loss_chunk}
        for name, size in {**sizes, **chunks}.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} is {size}, expected at least 1")
        if dim % heads:
            raise ValueError(f"dim is {dim} and heads is {heads}; dim must be a multiple of heads")
        self.config: dict[str, Any] = sizes | {
            "dropout": dropout,
            "positions": positions,
            "causal": causal,
            "attention": dict(attention),
            "activation_checkpointing": activation_checkpointing,
            **chunks,
        }
        if activation_checkpointing not in get_args(Checkpointing):
            raise ValueError(
                f"activation_checkpointing is {activation_checkpointing!r}, expected one of "
                f"{', '.join(map(repr, get_args(Checkpointing)))}"
            )
        self.causal = causal
        self.seq_len = seq_len
        self.activation_checkpointing = activation_checkpointing
        self.loss_chunk = loss_chunk
        self.positions = position_embeddings.build(
            positions, head_dim=dim // heads, seq_len=seq_len, causal=causal, dtype=compute_dtype
        )
        self.embedding = nn.Embedding(vocab_size, dim)
        self.dropout = Dropout(dropout)
        blocks = nn.ModuleList(Block(dim, heads, ffn_dim, dropout, causal, attention, ffn_chunk) for _ in range(layers))
        self.blocks = cast(Sequence[Block], blocks)
        self.norm = nn.LayerNorm(dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, after MAGNETO (table 2): gain sqrt(log 2M), M the number of layers."""
        nn.init.normal_(self.embedding.weight, std=self.embedding.embedding_dim**-0.5)
        self.norm.reset_parameters()
        gain = math.sqrt(math.log(2 * len(self.blocks)))
        for block in self.blocks:
            block.reset_parameters(gain)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cache: StreamCache | None = None,
    ) -> Tensor:
        """Logits of the next token, (B, N, V); the arguments are those of `hidden`."""
        hidden = self.hidden(tokens, positions=positions, key_padding_mask=key_padding_mask, cache=cache)
        return F.linear(hidden, self.embedding.weight)

    def hidden(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cache: StreamCache | None = None,
    ) -> Tensor:
        """The states before the head.

        Args:
            tokens: (B, N) integers below V.
            positions: (N,) or (B, N) integers for the position embedding, by default 0 to N - 1, a shard's place in its
                sequence, or what comes after the cache's past. They never decide which keys a query sees.
            key_padding_mask: (B, N) bool, True where the token is real; pad on the right.
            cache: the past of B streams whose next tokens these are, from `new_cache`; it moves on. Chunks of any size
                give what the whole sequence gives. It runs without autograd.

        Returns:
            (B, N, dim).

        Raises:
            ValueError: malformed arguments, more tokens than xPos can represent, or a cache that does not go with them.
        """
        if cache is not None:
            return self._next(tokens, positions, key_padding_mask, cache)
        tables = self._tables(tokens, positions)
        x = self.dropout(self.embedding(tokens))
        for block in self.blocks:
            if self.activation_checkpointing == "none" or not torch.is_grad_enabled():
                x = block(x, tables, key_padding_mask)
            else:
                with self._keeping(x):
                    x = checkpoint(block, x, tables, key_padding_mask, use_reentrant=False)
        return self.norm(x)

    def new_cache(self, batch_size: int, *, max_tokens: int | None = None) -> StreamCache:
        """An empty past for streams that are to come in chunks, `model(tokens, cache=cache)`.

        Of dilated attention it is of fixed size, allocated here: ceil(w / r) keys and values per branch, head and
        layer. Other backends keep every token. It holds what the model computes in now, autocast considered.

        Args:
            batch_size: streams that advance together.
            max_tokens: up to where a cache grows that keeps every token; by default 65,536.

        Raises:
            ValueError: the model is not causal, its attention has no cache, or batch_size is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        if not self.causal:
            raise ValueError("the model is not causal: what comes later changes its past, so it has no cache")
        weight = self.embedding.weight
        dtype = weight.dtype
        if torch.is_autocast_enabled(weight.device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(weight.device.type)
        factory = {"dtype": dtype, "device": weight.device, "max_tokens": max_tokens}
        layers = [block.attention.new_cache(batch_size, **factory) for block in self.blocks]
        return StreamCache(self, layers, batch_size)

    @torch.no_grad()
    def _next(
        self, tokens: Tensor, positions: Tensor | None, key_padding_mask: Tensor | None, cache: StreamCache
    ) -> Tensor:
        """`hidden` of the next tokens of streams."""
        if key_padding_mask is not None:
            raise ValueError("with a cache there is no padding: all streams advance together; leave out the mask")
        if self.training and self.dropout.p:
            raise ValueError("a cache is for evaluation, and the model is in training with dropout; call eval() first")
        tables = self._tables(tokens, positions, cache.position)
        cache.check(self, tokens)
        if not tokens.numel():
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}; give at least one token")
        self._check_vocabulary(tokens)
        with cache.advancing(tokens.shape[1]):
            x = self.embedding(tokens)
            for block, layer in zip(self.blocks, cache.layers, strict=True):
                x = block(x, tables, None, layer)
        return self.norm(x)

    def _check_vocabulary(self, tokens: Tensor) -> None:
        smallest, largest = (int(x) for x in tokens.aminmax())
        if smallest < 0 or largest >= self.embedding.num_embeddings:
            raise ValueError(
                f"tokens holds {smallest if smallest < 0 else largest}, and the model's vocabulary is 0 to "
                f"{self.embedding.num_embeddings - 1}; was the text encoded with another tokenizer?"
            )

    def _keeping(self, x: Tensor) -> AbstractContextManager:
        """Where checkpointing keeps the input of a block."""
        return (
            self.save_on_cpu(pin_memory=x.is_cuda)
            if self.activation_checkpointing == "blocks_on_cpu"
            else nullcontext()
        )

    def flops(self, seq_len: int) -> int | None:
        """Matrix-multiplication FLOPs of one forward over one sequence, head included; None if the backend cannot say.

        Training costs three times as many.
        """
        flops = 0
        for block in self.blocks:
            own = block.flops(seq_len)
            if own is None:
                return None
            flops += own
        return flops + 2 * seq_len * self.embedding.weight.numel()

    @property
    def attention_backends(self) -> list[AttentionBackend]:
        """The backend of each layer, first to last."""
        return [block.attention.backend for block in self.blocks]

    def _tables(self, tokens: Tensor, positions: Tensor | None, past: int = 0) -> Tables | None:
        """Cosines and sines for all layers, at least float32; `past` tokens were there before."""
        if tokens.dim() != 2:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}, expected two dimensions: batch, seq")
        if positions is None:
            if self.positions is None:
                return None
            first, shards = past, 1
            if self.shard is not None:
                first, shards = self.shard.first_position(tokens.shape[1]), self.shard.size
            self.positions.check(past + tokens.shape[1] * shards)
            positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        elif positions.shape not in (tokens.shape, tokens.shape[1:]) or positions.is_floating_point():
            raise ValueError(
                f"positions is {positions.dtype} of shape {tuple(positions.shape)}, expected integers of shape "
                f"{tuple(tokens.shape[1:])} or {tuple(tokens.shape)}"
            )
        if self.positions is None:
            return None
        dtype = torch.promote_types(self.embedding.weight.dtype, torch.float32)
        return self.positions.tables(positions, dtype)


class Block(nn.Module):
    """Attention, then the feed-forward network, each added to the residual stream."""

    def __init__(
        self,
        dim: int,
        heads: int,
        ffn_dim: int,
        dropout: float,
        causal: bool,
        attention: Mapping[str, Any],
        ffn_chunk: int | None,
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(dim, heads, causal, backends.build(attention))
        self.feed_forward = FeedForward(dim, ffn_dim, ffn_chunk)
        self.dropout = Dropout(dropout)

    def forward(
        self, x: Tensor, tables: Tables | None, key_padding_mask: Tensor | None, cache: Cache | None = None
    ) -> Tensor:
        x = x + self.dropout(self.attention(x, tables, key_padding_mask, cache))
        return x + self.dropout(self.feed_forward(x))

    def reset_parameters(self, gain: float) -> None:
        self.attention.reset_parameters(gain)
        self.feed_forward.reset_parameters(gain)

    def flops(self, seq_len: int) -> int | None:
        """Of one forward over one sequence: two per weight of a matrix and token, and the backend's."""
        attention = self.attention
        head_dim = attention.out.in_features // attention.heads
        pairs = attention.backend.flops(seq_len, attention.heads, head_dim, attention.causal)
        if pairs is None:
            return None
        linear = (m for m in self.modules() if isinstance(m, nn.Linear))
        return pairs + sum(2 * seq_len * m.weight.numel() for m in linear)


class SelfAttention(nn.Module):
    """W_o LN(attention(LN x)); (B, N, dim) in and out."""

    def __init__(self, dim: int, heads: int, causal: bool, backend: AttentionBackend) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.backend = backend
        self.inner_norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, tables: Tables | None, key_padding_mask: Tensor | None, cache: Cache | None = None
    ) -> Tensor:
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, H, D)
        qk, v = qkv.split((2, 1), dim=2)
        if tables is not None:
            qk = rotate(qk, tables)
        (q, k), v = qk.unbind(2), v.squeeze(2)
        out = self.backend(q, k, v, causal=self.causal, key_padding_mask=key_padding_mask, cache=cache)
        return self.out(self.inner_norm(out.flatten(2)))

    def new_cache(self, batch_size: int, **factory: Any) -> Cache:
        """The backend's, see `Transformer.new_cache`."""
        return self.backend.new_cache(batch_size, self.heads, self.out.in_features // self.heads, **factory)

    def reset_parameters(self, gain: float) -> None:
        """Xavier normal, q, k and v as matrices of their own; q and k keep gain 1."""
        for part, part_gain in zip(self.qkv.weight.chunk(3), (1.0, 1.0, gain), strict=True):
            nn.init.xavier_normal_(part, part_gain)
        nn.init.zeros_(self.qkv.bias)
        _reset_linear(self.out, gain)
        self.norm.reset_parameters()
        self.inner_norm.reset_parameters()


class FeedForward(nn.Module):
    """W_2 LN(GELU(W_1 LN x)); (B, N, dim) in and out.

    Args:
        chunk: tokens that are taken at a time, so that of the wide states between the layers no more are ever in
            memory: the backward pass computes them again. None: all, and nothing twice.
    """

    def __init__(self, dim: int, ffn_dim: int, chunk: int | None = None) -> None:
        super().__init__()
        self.chunk = chunk
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, ffn_dim)
        self.inner_norm = nn.LayerNorm(ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        if self.chunk is None or len(tokens) <= self.chunk:
            return self._layers(x)
        parts = tokens.split(self.chunk)
        if torch.is_grad_enabled():
            parts = [checkpoint(self._layers, part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        else:
            parts = [self._layers(part) for part in parts]
        return torch.cat(parts).view(x.shape)

    def _layers(self, x: Tensor) -> Tensor:
        return self.fc2(self.inner_norm(F.gelu(self.fc1(self.norm(x)))))

    def reset_parameters(self, gain: float) -> None:
        _reset_linear(self.fc1, gain)
        _reset_linear(self.fc2, gain)
        self.norm.reset_parameters()
        self.inner_norm.reset_parameters()


def _reset_linear(linear: nn.Linear, gain: float) -> None:
    nn.init.xavier_normal_(linear.weight, gain)
    nn.init.zeros_(linear.bias)
