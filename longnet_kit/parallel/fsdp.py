"""Sequence parallelism on FSDP2: parameters, gradients and optimizer state sharded over all ranks.

Checkpoints are single files laid out as one device writes them, so that any strategy reads those of any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from longnet_kit.attention.sharding import bind
from longnet_kit.parallel.strategies import TIMEOUT, SequenceParallel, checked_size


class SequenceParallelFSDPStrategy(SequenceParallel, ModelParallelStrategy):
    """Sequence parallelism with parameters, gradients and optimizer state sharded over all ranks by FSDP2.

    The entries of every `nn.ModuleList` are sharded one by one, and the rest as one, unless the LightningModule writes
    `configure_model` to do it otherwise (on `self.device_mesh`, flattened). Checkpoints are single files, the same as
    those of one device.

    Args:
        sequence_parallel_size: ranks that share one sequence; the others are data-parallel. `auto`: all.
        timeout: how long a transfer may take before the job is brought down.

    Raises:
        UserError: when training starts, if the size does not divide the devices.
    """

    strategy_name = "sequence_parallel_fsdp"

    def __init__(
        self,
        sequence_parallel_size: int | Literal["auto"] = "auto",
        timeout: timedelta | None = timedelta(seconds=TIMEOUT),
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=False, process_group_backend=process_group_backend, timeout=timeout
        )
        self._sequence_parallel_size = checked_size(sequence_parallel_size)

    def join(self) -> None:
        self._setup_distributed()

    def _connect(self, size: int) -> None:
        super()._connect(size)
        self._device_mesh = self._mesh
        if self.lightning_module is not None:
            self.lightning_module._device_mesh = self._mesh

    def setup(self, trainer: Trainer) -> None:
        """Cast, shard, move, and make the optimizers, whose parameters are then the sharded ones."""
        module = self._module
        module._device_mesh = self._mesh
        bind(module, self.shard)
        assert self.accelerator is not None and self.model is not None
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        if not any(isinstance(part, FSDPModule) for part in module.modules()):
            shard_parameters(module, DeviceMesh.from_group(dist.group.WORLD, self.root_device.type))  # type: ignore[arg-type]
        self.model_to_device()
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole weights on rank 0, nothing elsewhere."""
        return self._whole(self._module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole optimizer state on rank 0, laid out as on one device; nothing elsewhere."""
        return self._whole(getattr(optimizer, "_optimizer", optimizer).state_dict())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        torch.cuda.empty_cache()
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        own = self._module.state_dict()
        sharded = {key: _like(own[key], x) if key in own else x for key, x in checkpoint["state_dict"].items()}
        self._module.load_state_dict(sharded, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            owner = dict(zip(numbers, parameters, strict=True))
            state = {
                number: {name: _like(owner[number], value) for name, value in values.items()}
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})

    def _whole(self, state: Any) -> Any:
        """A nested state in CPU memory on rank 0, empty on the others; one tensor at a time is whole on the devices."""

        def gathered(x: Tensor) -> Tensor | None:
            whole = x.full_tensor() if isinstance(x, DTensor) else x
            return whole.detach().cpu() if self.is_global_zero else None

        found = apply_to_collection(state, Tensor, gathered)
        return found if self.is_global_zero else {}


def fsdp_units(module: nn.Module) -> list[nn.Module]:
    """What FSDP gathers one by one: the entries of every ModuleList that have something to train."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    return [unit for part in lists for unit in part if any(p.requires_grad for p in unit.parameters())]


def shard_parameters(module: nn.Module, mesh: DeviceMesh) -> None:
    """Apply FSDP2: a unit for each entry of a ModuleList, and one for all that is left."""
    for unit in fsdp_units(module):
        fully_shard(unit, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for name in ("training_step", "validation_step", "test_step", "predict_step"):
        register_fsdp_forward_method(module, name)


def _like(own: Any, value: Any) -> Any:
    """The part of a whole tensor that belongs beside a sharded one; anything else as it is."""
    if isinstance(own, DTensor) and isinstance(value, Tensor) and value.shape == own.shape:
        placed = value.to(own.device)
        return distribute_tensor(placed, own.device_mesh, own.placements, src_data_rank=None)
    return value
