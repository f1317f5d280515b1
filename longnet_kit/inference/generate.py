"""Generating tokens on a cache: the rows of a batch advance together, however long their prompts.

A row whose prompt has ended goes on with what was drawn, while the others are still given theirs; so all stand at the
same position, and nothing is padded on the left, which would shift the segments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from longnet_kit.errors import UserError
from longnet_kit.inference import CHUNK
from longnet_kit.inference.network import Trained
from longnet_kit.inference.sampling import Sampling

Accept = Callable[[int, int], bool]

_SEEDS = 2**63


def generate(
    trained: Trained,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    accept: Accept | None = None,
    read: Callable[[int], None] | None = None,
    chunk: int = CHUNK,
    max_cached: int | None = None,
) -> list[list[int]]:
    """Continue prompts. Row i draws with the seed `seed + i`, whatever other rows there are.

    Args:
        trained: the network, from `network.load`.
        prompts: tokens of each row, at least one.
        max_new_tokens: how many a row is given at most; it also ends with the end-of-text token.
        sampling: how tokens are drawn.
        accept: called with row and token for each that is drawn, in order; False ends the row.
        read: called with the position up to which prompts were read, after each chunk of them.
        chunk: tokens of the prompts that go through the network at a time.
        max_cached: the limit of a cache that keeps every token; by default that of the backend.

    Returns:
        The drawn tokens of each row, the end-of-text token included.

    Raises:
        UserError: a prompt is empty or holds what is no token, a number is below 1, or the text outgrows the cache or
            the position embedding.
    """
    _check(prompts, max_new_tokens, chunk, seed)
    network, eos = trained.network, trained.tokenizer.eos
    sampling = Sampling() if sampling is None else sampling
    rows = [list(prompt) for prompt in prompts]
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(rows))]
    longest = max(map(len, rows))
    with trained.computing():
        cache = network.new_cache(len(rows), max_tokens=max_cached)
        cache.check_room(longest + max_new_tokens - 1)
        going = list(range(len(rows)))
        while going:
            position = cache.position
            step = min(chunk, *(len(rows[i]) - position for i in going))
            tokens = [(row[position : position + step] + [eos] * step)[:step] for row in rows]  # ended rows go along
            hidden = network.hidden(torch.tensor(tokens, device=trained.device), cache=cache)
            if read is not None and position < longest:
                read(min(cache.position, longest))
            drawing = [i for i in going if len(rows[i]) == cache.position]
            if not drawing:
                continue
            logits = F.linear(hidden[drawing, -1], network.head_weight)
            for i, token in zip(drawing, sampling.draw(logits, [generators[i] for i in drawing]), strict=True):
                rows[i].append(token)
                goes_on = (accept is None or accept(i, token)) and token != eos
                if not goes_on or len(rows[i]) == len(prompts[i]) + max_new_tokens:
                    going.remove(i)
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def _check(prompts: Sequence[Sequence[int]], max_new_tokens: int, chunk: int, seed: int) -> None:
    if not prompts:
        raise UserError("there is no prompt; give at least one")
    for number, prompt in enumerate(prompts, start=1):
        if not len(prompt):
            raise UserError(f"prompt {number} is empty; give at least one token")
    for name, value in (("max_new_tokens", max_new_tokens), ("chunk", chunk)):
        if value < 1:
            raise UserError(f"{name} is {value}, expected at least 1")
    if not 0 <= seed < _SEEDS - len(prompts):
        raise UserError(f"seed is {seed}, expected 0 to {_SEEDS - len(prompts) - 1}")
