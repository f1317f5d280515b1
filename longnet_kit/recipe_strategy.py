"""What is wrong with how a recipe spreads its work: devices, sequence length, attention and windows that do not divide.

A part of recipe_together.
"""

from __future__ import annotations

import warnings
from typing import Any

from longnet_kit import recipe_schema as schema
from longnet_kit import typed
from longnet_kit.errors import UserError
from longnet_kit.typed import Problem

Values = dict[str, Any]
Involving = tuple[tuple[str, ...], Problem]
"""A problem, after the keys that it is about."""

LARGEST = 1 << 40
"""Nothing is said of how larger numbers divide: to find those that do would take too long."""
_TRANSFORMER_ENGINE = ("transformer-engine", "transformer-engine-float16")


def problems(values: Values) -> list[Involving]:
    """Everything wrong with the strategy and what it must divide."""
    from longnet_kit.parallel.batches import indivisible
    from longnet_kit.parallel.strategies import indivisible_world

    strategy, trainer, data = (mapping_at(values, name) for name in ("strategy", "trainer", "data"))
    name, size = strategy.get("name"), whole_number(strategy.get("sequence_parallel_size"))
    if isinstance(name, str) and name not in schema.STRATEGIES:
        hint = typed.suggestion(name, schema.STRATEGIES)
        return [(("strategy.name",), Problem("strategy.name", f"got {name!r}; {hint}"))]
    precision = trainer.get("precision")
    if isinstance(name, str) and name.endswith("fsdp") and precision in ("16-mixed", *_TRANSFORMER_ENGINE):
        message = f"got {precision!r}, which strategy.name: {name} does not take; use bf16-mixed, bf16-true or 32-true"
        return [(("trainer.precision", "strategy.name"), Problem("trainer.precision", message))]
    key = "strategy.sequence_parallel_size"
    if not isinstance(name, str) or size <= 1:
        return []
    if not name.startswith("sequence_parallel"):
        able = " or ".join(s for s in schema.STRATEGIES if s.startswith("sequence_parallel"))
        message = f"got {size} with strategy.name: {name}, which does not divide sequences; set it to 1"
        return [((key, "strategy.name"), Problem(key, f"{message}, or strategy.name to {able}"))]
    found: list[Involving] = []
    world = _devices(trainer)
    if world and world % size:
        found.append(((key, "trainer.devices", "trainer.num_nodes"), Problem(key, indivisible_world(size, world))))
    seq_len = whole_number(data.get("seq_len"))
    if seq_len:
        if message := indivisible(seq_len, size):
            found.append((("data.seq_len", key), Problem("data.seq_len", message)))
        else:
            found += _shard_problems(values, seq_len, size)
    return found


def _devices(trainer: Values) -> int:
    """How many devices the run has in all; 0 where that is only known on the machine."""
    devices = trainer.get("devices")
    per_node = len(devices) if isinstance(devices, list) else whole_number(devices)
    return whole_number(per_node * whole_number(trainer.get("num_nodes", 1)))


def _shard_problems(values: Values, seq_len: int, size: int) -> list[Involving]:
    """Of an attention backend, or of evaluation windows, that do not fit shards of the sequence."""
    from longnet_kit import attention
    from longnet_kit.tasks import windows

    model, data = mapping_at(values, "model"), mapping_at(values, "data")
    heads, config = whole_number(model.get("heads")), mapping_at(model, "attention")
    involved = ("model.attention", "model.heads", "data.seq_len", "strategy.sequence_parallel_size")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            backend = attention.build(config)
    except UserError:
        return []  # told of by itself
    if not heads:
        return []
    support = backend.supports_shards(seq_len=seq_len, shards=size, heads=heads)
    if not support:
        return [(involved, Problem("model.attention", support.reason))]
    n = seq_len // size
    for context in data.get("eval_contexts") or []:
        message = windows.supports(context, seq_len, size) if whole_number(context) else ""
        if whole_number(context) and not message and n < context < seq_len:
            support = backend.supports_shards(seq_len=context, shards=context // n, heads=heads)
            message = "" if support else f"in windows of {context:,} tokens, {support.reason}"
        if message:
            return [(("data.eval_contexts", *involved), Problem("data.eval_contexts", message))]
    return []


def whole_number(value: Any) -> int:
    """The value where it is a whole number from 1 to `LARGEST`, else 0."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST else 0


def mapping_at(values: Values, name: str) -> Values:
    """The mapping under a name; empty where there is none."""
    found = values.get(name)
    return found if isinstance(found, dict) else {}
