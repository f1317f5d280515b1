"""When memory runs out: telling that from other errors, and saying what the recipe needs and what would need less.

The numbers are those of `longnet plan`, for the device that has most to do; nothing is allocated to find them.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch

from longnet_kit import placement, recipe, runs
from longnet_kit.recipe import Recipe
from longnet_kit.report import table

if TYPE_CHECKING:
    from longnet_kit.plan import Plan
    from longnet_kit.plan.machines import Machine

Result = TypeVar("Result")

HELPS = 0.95
"""What needs more than so much of the memory that was needed before is not advised."""

FFN_CHUNK = 16_384
"""Tokens that are advised to go through the feed-forward layers at a time, where there are more."""

NOTHING = "use a smaller model, smaller batches, shorter sequences or more devices"
"""What is advised where nothing else can be."""

_TEXTS = re.compile("DefaultCPUAllocator: (can't allocate|not enough) memory|std::bad_alloc|CUDA error: out of memory")
_ASKED = re.compile(r"(?:tried|unable) to allocate ([\d.]+) (\w+)", re.IGNORECASE)
_CAPACITY = re.compile(r"(GPU \d+) has a total capacity of ([\d.]+) (\w+)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


class Change(NamedTuple):
    """Something to change in a recipe, as items for the command line, and what else it changes, in words."""

    items: tuple[str, ...]
    remark: str


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _TEXTS.search(str(error)) is not None


def ffn_chunk_is_worth_it(r: Recipe) -> bool:
    """Whether more tokens than `FFN_CHUNK` go through the feed-forward layers at once."""
    return r.model.ffn_chunk is None and r.data.seq_len * r.data.batch_size > FFN_CHUNK


def advice(r: Recipe, error: BaseException, step: int) -> str:
    """What to tell the user of a run that ran out of memory. Raises nothing: what cannot be planned is left out.

    Args:
        error: one for which `is_out_of_memory` holds.
        step: the optimizer step that was under way, counted from 1.
    """
    on_gpu = isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error)
    lines = [_headline(r, error, step, on_gpu)]
    if not on_gpu and placement.on_accelerator(r):
        words = "it holds data and checkpoints, not the model"
        fewer = f"; lower data.num_workers, {r.data.num_workers} now" if r.data.num_workers else ""
        return "\n".join([*lines, f"that is the machine's own memory, beside the GPU's: {words}{fewer}"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        needed = _tried(lambda: _plan(r, _machine(r, error, on_gpu)))
        if needed is not None:
            lines += _tried(lambda: _needs(needed)) or []
        lines += _tried(lambda: _ways_out(r, needed, on_gpu)) or [NOTHING]
    return "\n".join(lines)


def _headline(r: Recipe, error: BaseException, step: int, on_gpu: bool) -> str:
    max_steps = r.trainer["max_steps"]
    when = f"in step {step} of {max_steps}" if step <= max_steps else "after the last step"
    asked = _ASKED.search(str(error))
    more = f"{table.size(_bytes(*asked.groups()))} more" if asked else "more memory"
    gpu = _CAPACITY.search(str(error))
    where = gpu[1] if gpu else "the GPU" if on_gpu else "the CPU"
    return f"out of memory {when}: {more} could not be had on {where}"


def _needs(needed: Plan) -> list[str]:
    """The plan's table, beside what the device has."""
    from longnet_kit.plan import text

    machine = needed.machine
    known = f"  of {table.size(machine.memory)} on {machine.name}" if math.isfinite(machine.memory) else ""
    lines = [
        "what the recipe needs on each device, by `longnet plan`, when most is allocated:",
        *text.memory_rows(needed),
        f"{text.memory_row('in all', needed.peak)}{known}",
        *([needed.unknown] if needed.unknown else []),
    ]
    if known and needed.fits:
        lines.append("that should fit: something else takes memory there too, or what is free is in pieces")
    return lines


def _ways_out(r: Recipe, needed: Plan | None, on_gpu: bool) -> list[str]:
    """The changes that help, the one that needs least first; without a plan, all that are possible."""
    found: list[tuple[float, str, str]] = []
    for change in _changes(r, on_gpu):
        changed = _tried(lambda items=change.items: _changed(r, items))
        if changed is None:
            continue
        if needed is None:
            found.append((0, " ".join(change.items), change.remark))
            continue
        planned = _tried(lambda changed=changed: _plan(changed, needed.machine))
        if planned is not None and planned.peak <= HELPS * needed.peak:
            size = f"{table.size(planned.peak):>9}{'' if planned.fits else ', still too much'}; "
            found.append((planned.peak, " ".join(change.items), size + change.remark))
    if not found:
        return []
    width = max(len(items) for _, items, _ in found)
    rows = [f"  {items:<{width}}  {words}" for _, items, words in sorted(found, key=lambda row: row[0])]
    return ["what needs less:", *rows]


def _changes(r: Recipe, on_gpu: bool) -> Iterator[Change]:
    """What could be tried; whether a recipe allows it is not looked at here."""
    batch, batches = r.data.batch_size, r.trainer.get("accumulate_grad_batches", 1)
    part = next((n for n in range(2, batch + 1) if batch % n == 0), 1)
    if part > 1:
        items = f"data.batch_size={batch // part}", f"trainer.accumulate_grad_batches={batches * part}"
        yield Change(items, "the global batch stays")
    if r.model.activation_checkpointing == "none":
        yield Change(("model.activation_checkpointing=blocks",), "each block is computed twice")
    if on_gpu and r.model.activation_checkpointing == "blocks":
        yield Change(("model.activation_checkpointing=blocks_on_cpu",), "each block's input goes to the CPU and back")
    if ffn_chunk_is_worth_it(r):
        yield Change((f"model.ffn_chunk={FFN_CHUNK}",), "feed-forward layers are computed once more")
    if r.data.seq_len > 1:
        yield Change((f"data.seq_len={r.data.seq_len // 2}",), "shorter contexts")
    if on_gpu:
        yield from _spreads(r)


def _spreads(r: Recipe) -> Iterator[Change]:
    """Other strategies: on the same devices, and on twice as many."""
    from longnet_kit.plan import spread

    devices, name, shards = placement.devices(r), r.strategy.name, r.strategy.sequence_parallel_size
    fsdp = name.endswith("fsdp")
    divides = name.startswith("sequence_parallel")
    if devices > 1 and not fsdp:
        size = (f"strategy.sequence_parallel_size={shards}",) if divides else ()
        yield Change((f"strategy.name={'sequence_parallel_' if divides else ''}fsdp", *size), "weights are divided too")
    one_node = "" if "num_nodes" in r.trainer else "trainer.num_nodes=1"
    twice = tuple(item for item in spread.on_nodes(2 * devices) if item != one_node)
    divided = f"strategy.name=sequence_parallel{'_fsdp' if fsdp else ''}"
    size = f"strategy.sequence_parallel_size={2 * shards}"
    yield Change((*twice, divided, size), "each sequence on more devices")
    if not divides and r.data.batch_size % 2 == 0:
        items = (*twice, "strategy.name=fsdp", f"data.batch_size={r.data.batch_size // 2}")
        yield Change(items, "the global batch stays")


def _changed(r: Recipe, items: tuple[str, ...]) -> Recipe:
    """The recipe with some keys set, read and checked as from the command line."""
    with TemporaryDirectory() as folder:
        recipe.save(r, Path(folder) / runs.RECIPE)
        return recipe.load(Path(folder) / runs.RECIPE, ["init_from=null", "resume=null", *items])


def _plan(r: Recipe, machine: Machine) -> Plan:
    from longnet_kit import plan

    return plan.of(r, machine)


def _machine(r: Recipe, error: BaseException, on_gpu: bool) -> Machine:
    """The device whose memory ran out: its name and its memory, as far as known."""
    from longnet_kit.plan import machines, spread

    if not on_gpu:
        return machines.cpu(spread.of(r).per_node)
    told = _CAPACITY.search(str(error))
    name, memory = (told[1], _bytes(told[2], told[3])) if told else ("the GPU", math.inf)
    return machines.Machine(name, memory, {}, None, None)


def _bytes(number: str, unit: str) -> float:
    return float(number) * _UNITS.get(unit, 1)


def _tried(call: Callable[[], Result]) -> Result | None:
    """What a call gives; None where it fails, in whatever way: an error is being told of already."""
    try:
        return call()
    except Exception:
        return None
