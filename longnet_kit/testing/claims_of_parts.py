"""Claims about sequences that do not come as a whole: in shards on several ranks, in chunks on a cache."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor

from longnet_kit.attention.backend import AttentionBackend
from longnet_kit.attention.sharding import SequenceShard, bind
from longnet_kit.testing.subject import (
    Inputs,
    Subject,
    Unchecked,
    cases,
    draw,
    expect_close,
    outcome,
    supports,
)


def shards(subject: Subject) -> None:
    """Ranks that hold a shard of the sequence each give what one gives for the whole, gradients too"""
    from longnet_kit.parallel import threads

    refusal, checked = "no length divides among the ranks", False
    for seq_len, causal, case in cases(subject):
        for ranks in (2, 4):
            if seq_len % ranks:
                continue
            support = subject.backend.supports_shards(seq_len=seq_len, shards=ranks, heads=4)
            refusal = refusal if support else support.reason
            if not support:
                continue
            checked = True
            inputs = draw(subject, seq_len, heads=4)
            grad_out = torch.randn_like(inputs[0])
            out, grads = outcome(subject.backend, inputs, grad_out, causal)
            parts = threads.run(ranks, partial(_from_shard, subject.backend, inputs, grad_out, causal))
            where = f"{case} on {ranks} ranks"
            expect_close(torch.cat([part for part, _ in parts], 1), out, subject.within, f"{where}: the output")
            for i, name in enumerate("qkv"):
                joined = torch.cat([part_grads[i] for _, part_grads in parts], 1)
                expect_close(joined, grads[i], subject.within, f"{where}: the gradient of {name}")
    if not checked:
        raise Unchecked(refusal)


def _from_shard(
    backend: AttentionBackend, inputs: Inputs, grad_out: Tensor, causal: bool, shard: SequenceShard
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and gradients of this rank's part; each rank has a module of its own, as in a job."""
    own = copy.deepcopy(backend)
    bind(own, shard)
    *parts, grad_part = (x.chunk(shard.size, 1)[shard.rank] for x in (*inputs, grad_out))
    return outcome(own, tuple(parts), grad_part, causal)  # type: ignore[arg-type]


def streams(subject: Subject) -> None:
    """On a cache, chunks of any size give what the whole sequence gives"""
    support = supports(subject, causal=True)
    if not support:
        raise Unchecked(f"a cache is for causal attention, and the backend says: {support.reason}")
    for seq_len, causal, case in cases(subject):
        if not causal:
            continue
        q, k, v = draw(subject, seq_len)
        whole = subject.backend(q, k, v)
        for sizes in ([1], [seq_len], [max(1, seq_len // 3), 1, 2]):
            try:
                cache = subject.backend.new_cache(*q.shape[:1], *q.shape[2:], dtype=q.dtype, device=q.device)
            except ValueError as reason:
                raise Unchecked(str(reason)) from reason
            parts, done = [], 0
            while done < seq_len:
                step = min(sizes[len(parts) % len(sizes)], seq_len - done)
                chunk = (x[:, done : done + step] for x in (q, k, v))
                parts.append(subject.backend(*chunk, causal=True, cache=cache))
                done += step
            expect_close(torch.cat(parts, 1), whole, subject.within, f"{case}, chunks of {sizes}: the output")
