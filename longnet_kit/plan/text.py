"""A plan as text."""

from __future__ import annotations

from longnet_kit.plan import estimate
from longnet_kit.plan.estimate import Plan
from longnet_kit.report.table import size

_ORDER = ("parameters", "gradients", "gradients in DDP's buckets", "gathered by FSDP", "optimizer state", "metrics",
          "batch", "activations", "temporary")  # fmt: skip


def render(plan: Plan) -> str:
    """The report that `longnet plan` prints."""
    r, s, e, step = plan.recipe, plan.spread, plan.exchange, plan.step
    heads = f"{s.devices} x {plan.machine.name}" if plan.machine.is_cuda else plan.machine.name
    lines = [
        f"{r.name}: {r.data.seq_len:,} tokens, {r.model.layers} layers of width {r.model.dim}, "
        f"{r.model.attention['backend']}, {r.trainer.get('precision', '32-true')}",
        f"on        {heads}; {_ranks(plan)}",
        *([f"assumed   {plan.assumed}"] if plan.assumed else []),
        *([f"unknown   {plan.unknown}"] if plan.unknown else []),
        "",
        "memory of a device, when most is allocated",
    ]
    lines += memory_rows(plan)
    usable = estimate.USABLE_MEMORY * plan.machine.memory
    verdict = "fits" if plan.fits else "does not fit"
    lines += [
        f"{memory_row('peak', plan.peak)}  {verdict}: {size(usable)} usable of {size(plan.machine.memory)}",
        memory_row("(activations kept, in all)", step.saved),
        "",
        "work of a device in an optimizer step",
        f"  parameters of the model      {step.parameters:>10,}",
        f"  FLOPs, forward and backward  {_si((step.flops['forward'] + step.flops['backward']) * plan.batches):>10}",
    ]
    if step.flops["recomputed"]:
        lines.append(f"  FLOPs, computed again        {_si(step.flops['recomputed'] * plan.batches):>10}")
    if s.shards > 1 and plan.imbalance is not None:
        lines.append(
            f"  this rank over the mean      {plan.imbalance:>10.2f}  in the forward pass; the last has most to do"
        )
    if s.devices > 1:
        lines += ["", "bytes that a device receives"]
    if s.shards > 1:
        per_layer = f"{e.elements_per_layer:,} elements"
        lines += [
            f"  a layer's forward pass       {size(e.forward_per_layer):>10}  {per_layer}",
            f"  attention, a whole step      {size(e.attention * plan.batches):>10}",
            f"    by Ulysses instead         {_or_not(e.ulysses, plan):>10}",
            f"    by a ring instead          {size(e.ring * plan.batches):>10}",
        ]
    if s.devices > 1:
        kind = "FSDP's gathers and scatters" if s.is_fsdp else "gradients, by DDP"
        lines.append(f"  {kind:<28} {size(e.weights):>10}  a step")
    lines += ["", *_time(plan)]
    for words, changed in plan.changes:
        lines.append(f"{'fits with' if changed.fits else 'less with'}   {words}: {size(changed.peak)}")
    if not plan.fits and not any(changed.fits for _, changed in plan.changes):
        lines.append("nothing that was tried fits: use a smaller model or a shorter sequence")
    return "\n".join(lines)


def memory_rows(plan: Plan) -> list[str]:
    """What memory holds when most is allocated, a line each; without what hardly counts."""
    rows = sorted(plan.memory.items(), key=lambda row: _ORDER.index(row[0]) if row[0] in _ORDER else len(_ORDER))
    return [memory_row(name, held) for name, held in rows if held >= 0.001 * plan.peak]


def memory_row(name: str, held: int) -> str:
    return f"  {name:<28} {size(held):>10}"


def _ranks(plan: Plan) -> str:
    s = plan.spread
    if s.devices == 1:
        return "whole sequences"
    shared = f"each sequence on {s.shards} devices" if s.shards > 1 else "whole sequences"
    return f"{plan.recipe.strategy.name}: {shared}, {s.data_ranks} data-parallel"


def _time(plan: Plan) -> list[str]:
    exchange = plan.exchange_seconds
    total = plan.step_seconds * plan.recipe.trainer["max_steps"]
    rate = plan.tokens_per_step / plan.step_seconds
    compute = f"{estimate.COMPUTE_EFFICIENCY:.0%} of the device's peak rate"
    links = f", links at {estimate.LINK_EFFICIENCY:.0%} of theirs" if exchange is not None else ""
    unknown = "" if exchange is not None or plan.spread.devices == 1 else "; links unknown, exchange left out"
    beside = f", exchange {_seconds(exchange)} beside it" if exchange and plan.spread.devices > 1 else ""
    return [
        f"a step    about {_seconds(plan.step_seconds)}: computing {_seconds(plan.compute_seconds)}{beside}",
        f"          {_si(rate)} tokens/s; {plan.recipe.trainer['max_steps']:,} steps in {_seconds(total)}",
        f"          assumed: {compute}{links}{unknown}",
    ]


def _or_not(received: int | None, plan: Plan) -> str:
    if received is None:
        return f"impossible: {plan.recipe.model.heads} heads"
    return size(received * plan.batches)


def _si(number: float) -> str:
    for unit, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.4g} {letter}"
    return f"{number:.4g}"


def _seconds(seconds: float) -> str:
    for unit, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} s"
