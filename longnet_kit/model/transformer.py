"""The Transformer of the LongNet paper: blocks, on whole sequences or on a stream. The embedding is also the head."""

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

from longnet_kit.attention import AttentionBackend
from longnet_kit.attention.sharding import SequenceShard
from longnet_kit.errors import UserError
from longnet_kit.model import positions as position_embeddings
from longnet_kit.model.blocks import Block, Tables
from longnet_kit.model.cache import StreamCache, computing_dtype
from longnet_kit.model.dropout import Dropout
from longnet_kit.model.positions import Kind

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
        UserError: sizes or settings that do not go together, or an attention mapping that is wrong.
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
                raise UserError(f"{name} is {size}, expected at least 1")
        if dim % heads:
            raise UserError(f"dim is {dim} and heads is {heads}; dim must be a multiple of heads")
        self.config: dict[str, Any] = sizes | {
            "dropout": dropout,
            "positions": positions,
            "causal": causal,
            "attention": dict(attention),
            "activation_checkpointing": activation_checkpointing,
            **chunks,
        }
        if activation_checkpointing not in get_args(Checkpointing):
            raise UserError(
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
        with nullcontext() if cache is None else torch.no_grad():
            return F.linear(hidden, self.head_weight)

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
            UserError: malformed arguments, more tokens than xPos can represent, or a cache that does not go with them.
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

    @property
    def head_weight(self) -> Tensor:
        """The head, (V, dim): the vectors that the embedding gives to the tokens.

        A module that replaces the embedding, such as LoRA's, may add to its weight; then each token is looked up.
        """
        weight = self.embedding.weight
        if type(self.embedding).forward is nn.Embedding.forward:
            return weight
        return self.embedding(torch.arange(len(weight), device=weight.device))

    def new_cache(self, batch_size: int, *, max_tokens: int | None = None) -> StreamCache:
        """An empty past for streams that are to come in chunks, `model(tokens, cache=cache)`.

        Of dilated attention it is of fixed size, allocated here: ceil(w / r) keys and values per branch, head and
        layer. Other backends keep every token. It holds what the model computes in now, autocast considered.

        Args:
            batch_size: streams that advance together.
            max_tokens: up to where a cache grows that keeps every token; by default 65,536.

        Raises:
            UserError: the model is not causal, its attention has no cache, or batch_size is below 1.
        """
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}, expected at least 1")
        if not self.causal:
            raise UserError("the model is not causal: what comes later changes its past, so it has no cache")
        weight = self.embedding.weight
        factory = {"dtype": computing_dtype(weight), "device": weight.device, "max_tokens": max_tokens}
        layers = [block.attention.new_cache(batch_size, **factory) for block in self.blocks]
        return StreamCache(self, layers, batch_size)

    @torch.no_grad()
    def _next(
        self, tokens: Tensor, positions: Tensor | None, key_padding_mask: Tensor | None, cache: StreamCache
    ) -> Tensor:
        """`hidden` of the next tokens of streams."""
        if key_padding_mask is not None:
            raise UserError("with a cache there is no padding: all streams advance together; leave out the mask")
        if self.training and self.dropout.p:
            raise UserError("a cache is for evaluation, and the model is in training with dropout; call eval() first")
        tables = self._tables(tokens, positions, cache.position)
        cache.check(self, tokens)
        self._check_tokens(tokens)
        with cache.advancing(tokens.shape[1]):
            x = self.embedding(tokens)
            for block, layer in zip(self.blocks, cache.layers, strict=True):
                x = block(x, tables, None, layer)
        return self.norm(x)

    def _check_tokens(self, tokens: Tensor) -> None:
        """Raise a UserError for what an embedding would answer with an error of its own, half-way."""
        weight = self.embedding.weight
        if not tokens.numel():
            raise UserError(f"tokens has shape {tuple(tokens.shape)}; give at least one token")
        if tokens.dtype not in (torch.int32, torch.int64) or tokens.device != weight.device:
            raise UserError(
                f"tokens is {tokens.dtype} on {tokens.device}, expected torch.int64 or int32 on {weight.device}"
            )
        smallest, largest = (int(x) for x in tokens.aminmax())
        if smallest < 0 or largest >= len(weight):
            raise UserError(
                f"tokens holds {smallest if smallest < 0 else largest}, and the model's vocabulary is 0 to "
                f"{len(weight) - 1}; was the text encoded with another tokenizer?"
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
            raise UserError(f"tokens has shape {tuple(tokens.shape)}, expected two dimensions: batch, seq")
        if positions is not None and (
            positions.shape not in (tokens.shape, tokens.shape[1:]) or positions.is_floating_point()
        ):
            raise UserError(
                f"positions is {positions.dtype} of shape {tuple(positions.shape)}, expected integers of shape "
                f"{tuple(tokens.shape[1:])} or {tuple(tokens.shape)}"
            )
        if self.positions is None:
            return None
        weight = self.embedding.weight
        if positions is None:
            first, shards = past, 1
            if self.shard is not None:
                first, shards = self.shard.first_position(tokens.shape[1]), self.shard.size
            self.positions.check(past + tokens.shape[1] * shards, computing_dtype(weight))
            positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        else:
            self.positions.check_given(positions, computing_dtype(weight))
        return self.positions.tables(positions, torch.promote_types(weight.dtype, torch.float32))
