"""What a recipe costs each device, before anything is run: memory, FLOPs, exchange, time, and what to change.

One rank's step is run without data (`step`), so that memory, FLOPs and the attention's exchange are those of the code
itself. What data-parallel strategies add is computed here: FSDP divides parameters, gradients and optimizer state among
all ranks, keeps what is outside the blocks gathered, and two blocks at a time with their gradients. (On CPU, gloo's
threads may hold what they sent for longer: up to another block was seen.)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from longnet_kit import attention, experiment, placement, typed
from longnet_kit.attention.patterns import Dilated
from longnet_kit.errors import UserError
from longnet_kit.model import compute_dtype
from longnet_kit.out_of_memory import FFN_CHUNK, ffn_chunk_is_worth_it, is_out_of_memory
from longnet_kit.plan import machines, spread, step
from longnet_kit.plan.machines import Machine
from longnet_kit.plan.spread import Spread
from longnet_kit.plan.step import Step
from longnet_kit.recipe import Recipe

COMPUTE_EFFICIENCY, LINK_EFFICIENCY, USABLE_MEMORY = 0.4, 0.7, 0.92
"""Assumed: the shares of a device's peak rate, of its links, and of its memory that a run gets."""

MOST_DEVICES = 2**14
"""Further than so many devices no plan looks for one that fits."""


@dataclass(frozen=True)
class Exchange:
    """Bytes that one device receives, in a training batch unless it says otherwise."""

    attention: int
    """For the sequence, all layers, forward and backward; by the recipe's own attention."""
    forward_per_layer: int
    """Of it, a layer's forward pass."""
    elements_per_layer: int
    """The same in elements."""
    ulysses: int | None
    """For trading heads for the sequence instead, all layers; None where the heads do not divide."""
    ring: int
    """For passing all keys and values around instead, all layers."""
    weights: int
    """For weights and gradients, in an optimizer step: DDP's all-reduce, or FSDP's gathers and scatters."""
    attention_between_nodes: int
    """Of `attention`, what may come from another node."""


@dataclass(frozen=True)
class Plan:
    """What one device is asked for: the one of a sequence that has most to do."""

    recipe: Recipe
    spread: Spread
    machine: Machine
    assumed: str
    """How the recipe was spread, in words; empty where it says so itself."""
    step: Step
    memory: Counter[str]
    """Bytes by what they hold when most is allocated."""
    exchange: Exchange
    imbalance: float | None
    """FLOPs of this rank's forward pass over the mean of all ranks; None where the backend does not count them."""
    unknown: str
    """What could not be seen, in words; empty where nothing."""
    changes: list[tuple[str, Plan]] = field(default_factory=list)
    """If it does not fit: overrides that make it fit, and the plan with them."""

    @property
    def peak(self) -> int:
        """Bytes of memory."""
        return self.memory.total()

    @property
    def fits(self) -> bool:
        return self.peak <= USABLE_MEMORY * self.machine.memory

    @property
    def batches(self) -> int:
        """Training batches in an optimizer step."""
        return self.recipe.trainer.get("accumulate_grad_batches", 1)

    @property
    def compute_seconds(self) -> float:
        """Of an optimizer step."""
        rate = self.machine.flops[compute_dtype(placement.precision(self.recipe))]
        return self.step.flops.total() * self.batches / (COMPUTE_EFFICIENCY * rate)

    @property
    def exchange_seconds(self) -> float | None:
        """Of an optimizer step; None where the links are unknown."""
        if self.machine.within_node is None or self.machine.between_nodes is None:
            return None
        attention, weights = self.exchange.attention * self.batches, self.exchange.weights
        slow = self.exchange.attention_between_nodes * self.batches
        slow += weights if self.spread.devices > self.spread.per_node else 0
        fast = attention + weights - slow
        return (fast / self.machine.within_node + slow / self.machine.between_nodes) / LINK_EFFICIENCY

    @property
    def step_seconds(self) -> float:
        """Of an optimizer step, whose exchange runs beside the computation."""
        return max(self.compute_seconds, self.exchange_seconds or 0.0)

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.data.seq_len * self.recipe.data.batch_size * self.spread.data_ranks * self.batches


def plan(
    path: str | Path, overrides: Sequence[str] = (), *, devices: int | None = None, gpu: str | None = None
) -> Plan:
    """Plan a recipe's run.

    Args:
        path, overrides: as of `recipe.load`.
        devices: how many in all; by default the recipe's. See `spread.load` for what it means for the strategy.
        gpu: `a100`, `h100` or `h200`; by default this machine's CPU.

    Raises:
        UserError: the recipe cannot be used, or there is no such device.
    """
    if gpu is not None and gpu not in machines.GPUS:
        raise UserError(f"gpu: {gpu!r} is not known; {typed.suggestion(gpu, machines.GPUS)}")
    if devices is not None and devices < 1:
        raise UserError(f"devices is {devices}, expected a whole number of at least 1")
    r, assumed = spread.load(path, overrides, devices)
    dtype = compute_dtype(placement.precision(r))
    machine = machines.GPUS[gpu] if gpu else machines.here(dtype, spread.of(r).devices)
    made = of(r, machine, assumed)
    if not made.fits:
        made.changes.extend(_changes(path, overrides, made))
    return made


def of(r: Recipe, machine: Machine, assumed: str = "") -> Plan:
    """Plan the run of a recipe on devices of a kind, as the recipe is.

    Args:
        assumed: how it was spread, in words; empty where it says so itself.
    """
    s = spread.of(r)
    rank, unknown = busiest(r, s), ""
    try:
        taken = step.run(r, s, rank, cuda=machine.is_cuda)
    except Exception as error:  # a backend of somebody else's may do anything with numbers that are not there
        if is_out_of_memory(error):
            raise
        taken = step.run(r, s, rank, cuda=machine.is_cuda, opaque=True)
        unknown = (
            f"the attention backend does not run without data ({type(error).__name__}); counted are its inputs and "
            "output, not what it needs inside, computes or exchanges"
        )
    memory = _divided(taken, s, _weight_size(r)) if s.is_fsdp else taken.peak
    return Plan(r, s, machine, assumed, taken, memory, _exchange(r, s, taken), _imbalance(r, s, taken), unknown)


def busiest(r: Recipe, s: Spread) -> int:
    """The rank of a sequence that has most to do: far back in its segments, of which the last may be short."""
    pattern = attention.build(r.model.attention).pattern
    if not isinstance(pattern, Dilated) or s.shards == 1:
        return s.shards - 1
    n = r.data.seq_len // s.shards
    spans = [(min(-(-w // n), s.shards), rate) for w, rate in pattern.branches if w > n]
    return max(range(s.shards), key=lambda rank: (sum((rank % span + 0.5) / rate**2 for span, rate in spans), rank))


def _weight_size(r: Recipe) -> int:
    """Bytes of a parameter, as a run's precision keeps it."""
    precision = placement.precision(r)
    return 4 if precision.endswith("mixed") else compute_dtype(precision).itemsize


DIVIDED = ("parameters", "gradients", "optimizer state")
"""What FSDP divides among all ranks."""


def _divided(taken: Step, s: Spread, weight_size: int) -> Counter[str]:
    """The memory of the phase in which FSDP needs most, by what it holds."""
    gathered = weight_size * (taken.outside_units + 2 * taken.largest_unit)
    best: Counter[str] = Counter()
    for phase, rows in taken.peaks.items():
        divided = Counter({name: -(-size // s.devices) if name in DIVIDED else size for name, size in rows.items()})
        if phase in ("forward", "backward"):
            divided["gathered by FSDP"] = gathered * (2 if phase == "backward" else 1)  # gradients like weights
        if phase == "backward":
            divided["gradients"] = -(-taken.parameters * weight_size // s.devices)
        if divided.total() > best.total():
            best = divided
    return best


def _exchange(r: Recipe, s: Spread, taken: Step) -> Exchange:
    layers, p = r.model.layers, s.shards
    tokens = r.data.seq_len // p * r.data.batch_size
    size = compute_dtype(placement.precision(r)).itemsize
    foreign = (p - 1) * tokens * r.model.dim
    attention = sum(taken.received.values())
    forward = sum(x for kind, x in taken.received.items() if kind.work == "forward")
    elements = sum(x for kind, x in taken.elements.items() if kind.work == "forward")
    weights = _weights(r, s, taken)
    slow = sum(x for kind, x in taken.received.items() if not kind.within_node)
    passes = 2 if r.model.activation_checkpointing == "none" else 3  # what is recomputed is exchanged again
    return Exchange(
        attention=attention,
        forward_per_layer=forward // layers,
        elements_per_layer=elements // layers,
        ulysses=passes * layers * size * 4 * foreign // p if r.model.heads % p == 0 else None,
        ring=layers * size * 2 * foreign * passes,
        weights=weights,
        attention_between_nodes=slow,
    )


def _weights(r: Recipe, s: Spread, taken: Step) -> int:
    """Bytes of weights and gradients that a rank receives in an optimizer step."""
    size = _weight_size(r) * (s.devices - 1) / s.devices
    if s.is_fsdp:  # in every batch: blocks are gathered for both passes, the rest once; gradients are scattered
        batches = r.trainer.get("accumulate_grad_batches", 1)
        return math.ceil(batches * size * (3 * taken.parameters - taken.outside_units))
    return math.ceil(2 * size * taken.parameters)  # once, however many batches are accumulated


def _imbalance(r: Recipe, s: Spread, taken: Step) -> float | None:
    with torch.device("meta"):
        total = experiment.build_task(experiment.without_weights(r)).model.flops(r.data.seq_len)  # type: ignore[union-attr, operator]
    if total is None or not taken.flops["forward"]:
        return None
    return taken.flops["forward"] * s.shards / (total * r.data.batch_size)


def _changes(path: str | Path, overrides: Sequence[str], made: Plan) -> list[tuple[str, Plan]]:
    """Changes to a plan that does not fit, each on top of those before it, until it does; tried, not guessed."""
    r, s = made.recipe, made.spread
    own = ["trainer.devices", "trainer.num_nodes", "strategy", "data.batch_size", "model.activation_checkpointing",
           "model.ffn_chunk"]  # fmt: skip
    kept = [item for item in overrides if not any(item.startswith(key) for key in own)]
    settings: dict[str, str] = {
        "trainer.devices": str(s.per_node),
        "trainer.num_nodes": str(s.devices // s.per_node),
        "strategy.name": r.strategy.name,
        "strategy.sequence_parallel_size": str(r.strategy.sequence_parallel_size),
        "data.batch_size": str(r.data.batch_size),
        "model.activation_checkpointing": r.model.activation_checkpointing,
        "model.ffn_chunk": "null" if r.model.ffn_chunk is None else str(r.model.ffn_chunk),
    }
    told: dict[str, str] = {}
    found: list[tuple[str, Plan]] = []

    def tried(**changes: str) -> bool:
        """Whether it fits with these changes too; kept if it needs less than before."""
        named = {key.replace("__", "."): value for key, value in changes.items()}
        total = named.pop("devices", None)
        items = [f"{key}={value}" for key, value in {**settings, **named}.items()]
        try:
            changed = spread.load(path, [*kept, *items], None)[0]
        except UserError:
            return False
        plan_ = of(changed, made.machine)
        if plan_.peak < (found[-1][1] if found else made).peak:
            settings.update(named)
            told.update({"devices": total} if total else {})
            told.update({key: value for key, value in named.items() if not (total and key.startswith("trainer."))})
            found.append((" ".join(f"{key}={value}" for key, value in told.items()), plan_))
        return plan_.fits

    if r.model.activation_checkpointing == "none" and tried(model__activation_checkpointing="blocks"):
        return found
    if ffn_chunk_is_worth_it(r) and tried(model__ffn_chunk=str(FFN_CHUNK)):
        return found
    if r.data.batch_size > 1 and tried(data__batch_size="1"):
        return found
    offloads = made.machine.is_cuda and settings["model.activation_checkpointing"] == "blocks"
    if offloads and tried(model__activation_checkpointing="blocks_on_cpu"):
        return found
    if s.devices > 1 and not s.is_fsdp:
        name = "sequence_parallel_fsdp" if r.strategy.name == "sequence_parallel" else "fsdp"
        if tried(strategy__name=name):
            return found
    devices = s.devices
    while made.machine.is_cuda and devices < MOST_DEVICES:
        devices *= 2
        per_node = min(spread.NODE, devices)
        name = settings["strategy.name"]
        if not name.startswith("sequence_parallel"):
            name = "sequence_parallel_fsdp" if name == "fsdp" else "sequence_parallel"
        if tried(
            trainer__devices=str(per_node), trainer__num_nodes=str(devices // per_node), strategy__name=name,
            strategy__sequence_parallel_size=str(devices), devices=str(devices),
        ):  # fmt: skip
            return found
    return found
