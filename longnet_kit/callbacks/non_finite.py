"""A loss or a gradient that is not finite, caught before the update and traced to where it arose."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longnet_kit.callbacks.generators import Generators
from longnet_kit.parallel.agreement import gathered, greatest
from longnet_kit.parallel.batches import tensors
from longnet_kit.tasks.optimization import gradient_norm


class NonFiniteError(Exception):
    """A training step whose loss or gradient is not finite; its update was not made."""


class Finding(NamedTuple):
    """Where one rank sees the first value that is not finite."""

    order: int
    """Of the place among those that the ranks pass in the same order; the lowest is the first."""
    place: str
    """The layer, in words."""
    samples: list[int]
    """The `index` of the samples of the batch; of all batches of the step where the gradient alone is at fault."""


NOWHERE = 1 << 40
"""The order of a rank that sees nothing wrong."""


class NonFinite(Callback):
    """Checks the loss and the gradients of every optimizer step before the update, on all ranks.

    Where one is not finite, the step's batches go through the network again, with the random numbers that they had, to
    find the layer where it begins. Then the run ends by a `NonFiniteError`; or, up to `allowed` times in all, the
    update is left out and training goes on.

    Gradients that overflow under a loss scale (`16-mixed`) are that scale's business as long as it is above 1: it
    leaves the update out itself, and gets smaller.

    Args:
        generators: the callback that knows the random numbers of a step; it must be called before this one.
        allowed: how many updates may be left out before the run ends.
    """

    def __init__(self, generators: Generators, allowed: int = 0) -> None:
        self.skipped = 0
        self._generators = generators
        self._allowed = allowed
        self._batches: list[tuple[Any, int]] = []
        self._losses: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batches.append((batch, batch_idx))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        norm = gradient_norm(pl_module)
        sums = torch.stack([*(x.float().sum() for x in self._losses), norm.float().to(pl_module.device)])
        is_wrong = not _is_finite(sums)
        if is_wrong and _is_finite(sums[:-1]):  # a norm overflows where no gradient does
            is_wrong = bool(_wrong_gradients(pl_module)) and (scaler is None or scaler.get_scale() <= 1)
        if any(greatest(trainer, int(is_wrong))):
            self._handle(trainer, pl_module, optimizer)
        self._batches, self._losses = [], []

    def _handle(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        told = f"step {trainer.global_step + 1}: {self._found(trainer, module)}; the update was not made"
        if self.skipped >= self._allowed:
            after = f" and {self.skipped} were left out before" if self.skipped else ""
            raise NonFiniteError(
                f"{told}{after}. Look at these samples, lower optimizer.lr or set trainer.gradient_clip_val; or leave "
                "out some such steps with optimizer.max_skipped_steps"
            )
        self.skipped += 1
        rank_zero_warn(f"{told}: left out, {self.skipped} of at most {self._allowed}")
        optimizer.zero_grad()  # not the module's parameters: FSDP may have put whole ones in their place

    def _found(self, trainer: Trainer, module: LightningModule) -> str:
        """What the ranks have found together, in words."""
        findings = gathered(trainer, self._look(trainer, module))
        first = min(findings, key=lambda finding: finding.order)
        samples = sorted({i for finding in findings if finding.order == first.order for i in finding.samples})
        shown = ", ".join(map(str, samples[:16])) + (", ..." if len(samples) > 16 else "")
        return f"{first.place} (samples {shown or 'without an index'})"

    def _look(self, trainer: Trainer, module: LightningModule) -> Finding:
        """Find the first value that is not finite: in the weights, the batches, a forward pass, the gradients.

        All batches go through whatever is found, since ranks that share a sequence do that together.
        """
        places = [name for name, _ in module.named_modules()]
        wrong = _wrong_gradients(module)  # before the passes: FSDP puts whole parameters in the place of these
        found = [Finding(-1, f"{name} is not finite since the update before", []) for name in wrong_weights(module)[:1]]
        self._generators.rewind()
        for number, (batch, batch_idx) in enumerate(self._batches):
            first_of_batch, samples = number * (len(places) + 2), _samples(batch)
            layer, again = _first_layer(trainer, module, batch, batch_idx)
            if any(x.is_floating_point() and not _is_finite(x) for x in tensors(batch)):
                found.append(Finding(first_of_batch, "the input is not finite", samples))
            elif layer is not None:
                name, word = layer
                found.append(
                    Finding(first_of_batch + 1 + places.index(name), f"the output of {name} is {word}", samples)
                )
            elif not _is_finite(self._losses[number]):
                where = "every layer's output is finite" + (" when the step is repeated" if _is_finite(again) else "")
                told = f"the loss is {_word(self._losses[number])}, but {where}"
                found.append(Finding(first_of_batch + 1 + len(places), told, samples))
        samples = sorted({i for batch, _ in self._batches for i in _samples(batch)})
        if wrong:
            last = max(wrong, key=lambda name: places.index(name.rpartition(".")[0]))
            order = NOWHERE - 1 - places.index(last.rpartition(".")[0])  # a backward pass meets the last layer first
            found.append(Finding(order, f"the loss is finite, but the gradient of {last} is not", samples))
        found.append(Finding(NOWHERE, "a value is not finite, but not when the step is repeated", samples))
        return found[0]


def wrong_weights(module: nn.Module) -> list[str]:
    """The parameters of which this rank's part is not finite."""
    return [name for name, p in module.named_parameters() if not _is_finite(_local(p))]


def _wrong_gradients(module: nn.Module) -> list[str]:
    """The parameters of whose gradient this rank's part is not finite."""
    return [name for name, p in module.named_parameters() if p.grad is not None and not _is_finite(_local(p.grad))]


def _first_layer(
    trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
) -> tuple[tuple[str, str] | None, Tensor]:
    """The first layer whose output is not finite when a batch goes through, and what it is instead; and the loss.

    What has overflowed inside a layer shows in its parts first, as they are done first.
    """
    found: list[tuple[str, str]] = []

    def look(name: str, output: Any) -> None:
        if not found:
            wrong = [x for x in tensors(output) if x.is_floating_point() and not _is_finite(x)]
            found.extend([(name, _word(wrong[0]))] if wrong else [])

    handles = [
        layer.register_forward_hook(lambda _, __, output, name=name: look(name, output))
        for name, layer in module.named_modules()
        if layer is not module
    ]
    try:
        with torch.no_grad(), trainer.precision_plugin.train_step_context():
            output: Any = module.training_step(batch, batch_idx)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None, output["loss"] if isinstance(output, dict) else output


def _samples(batch: Any) -> list[int]:
    index = batch.get("index") if isinstance(batch, dict) else None
    return [] if index is None else index.flatten().tolist()


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _is_finite(x: Tensor) -> bool:
    return bool(x.isfinite().all())


def _word(x: Tensor) -> str:
    return "nan" if bool(x.isnan().any()) else "infinite"
