"""The Transformer as a classifier of whole sequences: its states averaged over the real tokens, then a linear head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from longnet_kit.attention import derivatives
from longnet_kit.attention.sharding import SequenceShard
from longnet_kit.errors import UserError
from longnet_kit.model.transformer import Transformer


class Classifier(Transformer):
    """Tokens in, one row of logits for each sequence out.

    Args:
        vocab_size: V, how many tokens there are.
        classes: C, how many classes there are.
        options: those of `Transformer`; with `causal=False` every token sees all others that the attention lets it see.

    Raises:
        UserError: as of `Transformer`; fewer than two classes, or a `loss_chunk`, which only losses of tokens have.
    """

    own_head = "head.weight", "head.bias"
    """Parameters that the weights of a language model lack."""

    def __init__(self, vocab_size: int, *, classes: int, **options: Any) -> None:
        if classes < 2:
            raise UserError(f"classes is {classes}, expected at least 2")
        if options.get("loss_chunk") is not None:
            raise UserError(
                f"loss_chunk is {options['loss_chunk']}, but a classifier has one row of logits for a whole sequence; "
                "leave it out"
            )
        super().__init__(vocab_size, **options)
        self.config["classes"] = classes
        self.head = nn.Linear(self.embedding.embedding_dim, classes)

    def forward(  # type: ignore[override]
        self, tokens: Tensor, *, positions: Tensor | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Logits of the classes.

        Args:
            tokens: (B, N) integers below V; a shard of the sequences where `shard` is set.
            positions: see `Transformer.hidden`.
            key_padding_mask: (B, N) bool, True where the token is real, at least once in each sequence; pad on the
                right. None: all are.

        Returns:
            (B, C); the same on all ranks that share the sequences.

        Raises:
            UserError: malformed arguments.
        """
        states = self.hidden(tokens, positions=positions, key_padding_mask=key_padding_mask)
        return self.head(mean_of_real(states, key_padding_mask, self.shard))

    def flops(self, seq_len: int) -> int | None:
        """Matrix-multiplication FLOPs of one forward over one sequence, head included; None if the backend cannot say.

        Training costs three times as many.
        """
        blocks = [block.flops(seq_len) for block in self.blocks]
        if None in blocks:
            return None
        return sum(own for own in blocks if own is not None) + 2 * self.head.weight.numel()


def mean_of_real(states: Tensor, key_padding_mask: Tensor | None, shard: SequenceShard | None = None) -> Tensor:
    """The mean over the real tokens of each whole sequence.

    Args:
        states: (B, N, dim), of this rank's part of the sequences.
        key_padding_mask: (B, N) bool, True where the token is real; None: all are.
        shard: this rank among those that hold the sequences; None if they are whole.

    Returns:
        (B, dim); NaN where a sequence has no real token.
    """
    if key_padding_mask is None:
        key_padding_mask = states.new_ones(states.shape[:2], dtype=torch.bool)
    # Summed in at least float32: in half precision a long sequence's sum would leave the numbers' range.
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    total = wide.masked_fill(~key_padding_mask[..., None], 0).sum(1)
    count = key_padding_mask.sum(1, keepdim=True).to(wide.dtype)  # (B, 1)
    if shard is not None and shard.size > 1:
        derivatives.refuse_forward_mode("a sequence on several ranks", total)
        derivatives.refuse_transforms("a sequence on several ranks")
        total, count = _OverShards.apply(torch.cat((total, count), 1), shard).tensor_split((total.shape[1],), 1)
    return (total / count).to(states.dtype)


class _OverShards(torch.autograd.Function):
    """The sum over the ranks of a sequence, on each of them; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: SequenceShard) -> Tensor:
        ctx.shard = shard
        return shard.all_gather(x[None])().sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _OverShards.apply(grad.contiguous(), ctx.shard), None  # type: ignore[return-value]
