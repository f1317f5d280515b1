"""Cutting batches into shards of their sequences, and making sure that all ranks of a sequence got the same batch."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from longnet_kit.attention.sharding import SequenceShard
from longnet_kit.errors import UserError


def cut(batch: Any, shard: SequenceShard) -> Any:
    """This rank's part of a batch: every tensor (batch, seq, ...) narrowed along seq.

    Args:
        batch: any nesting of mappings, lists and tuples. Tensors of fewer than two dimensions stay whole.

    Raises:
        UserError: the second dimensions differ, so that it is not clear which is the sequence, or the sequence does
            not divide among the ranks.
    """
    if shard.size == 1:
        return batch
    lengths = sorted({x.shape[1] for x in tensors(batch) if x.dim() >= 2})
    if len(lengths) > 1:
        raise UserError(
            f"the batch holds tensors whose second dimensions are {lengths}, so it is not clear which of them is the "
            "sequence; write shard_batch(batch, shard) in your LightningModule, which returns this rank's part"
        )
    if not lengths:
        return batch
    (seq_len,) = lengths
    if problem := indivisible(seq_len, shard.size):
        raise UserError(problem)
    n = seq_len // shard.size
    start = shard.first_position(n)

    def narrowed(x: Tensor) -> Tensor:
        return x.narrow(1, start, n).clone() if x.dim() >= 2 else x  # a view would keep the whole sequence in memory

    return apply_to_collection(batch, Tensor, narrowed)


def indivisible(seq_len: int, size: int) -> str:
    """What is wrong with cutting sequences of a length into `size` shards, and which lengths are right; or nothing."""
    if seq_len % size == 0:
        return ""
    below = seq_len // size * size
    near = f"{below:,} or {below + size:,}" if below else f"{size:,}"
    return f"a sequence of {seq_len:,} tokens does not divide among {size} ranks; use a length like {near}"


def check_same(batch: Any, shard: SequenceShard, device: torch.device) -> None:
    """Raise a UserError on all ranks of a sequence unless they hold one and the same batch."""
    if shard.size == 1:
        return
    own = torch.tensor([fingerprint(batch)], dtype=torch.int64, device=device)
    found = shard.all_gather(own)().tolist()
    if len(set(found)) > 1:
        others = [rank for rank, other in enumerate(found) if other != found[0]]
        raise UserError(
            f"the {shard.size} ranks that share a sequence were given different batches (of the group's ranks, "
            f"{others} differ from the first). Sample by trainer.distributed_sampler_kwargs, which counts a group as "
            "one replica, and draw anything random from a seed that does not depend on the rank"
        )


def fingerprint(batch: Any) -> int:
    """A number that depends on every byte of the tensors of a batch, their shapes and order."""
    code = 0
    for x in tensors(batch):
        code = zlib.crc32(repr((tuple(x.shape), x.dtype)).encode(), code)
        code = zlib.crc32(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data, code)
    return code


def tensors(batch: Any) -> list[Tensor]:
    """All tensors of a batch, in order."""
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, lambda x: found.append(x) or x)
    return found
