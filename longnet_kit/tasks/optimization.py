"""The optimizer of a recipe and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from longnet_kit.errors import UserError

if TYPE_CHECKING:
    from longnet_kit import recipe


def build(options: recipe.Optimizer, model: nn.Module) -> Optimizer:
    """Make the optimizer of a model.

    Weight decay is for matrices only: biases and layer norms have none. The embedding, which is the head too, is one of
    the matrices. `adam` adds the decay to the gradient, `adamw` decouples it; `sgd` has no momentum and ignores the
    betas and `eps`. None is fused: Lightning refuses to clip the gradients of a fused one under mixed precision.

    Raises:
        UserError: an unknown optimizer, or `eps` is 0 in the dtype of a parameter.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    if options.name == "sgd":
        return torch.optim.SGD(groups, lr=options.lr)
    kinds: dict[str, Callable[..., Optimizer]] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
    if options.name not in kinds:
        raise UserError(f"the optimizer is {options.name!r}, expected 'adamw', 'adam' or 'sgd'")
    for dtype in {p.dtype for p in parameters}:
        if problem := eps_problem(options.name, options.eps, dtype):
            raise UserError(f"optimizer.eps: got {options.eps:g}, {problem}")
    beta1, beta2 = options.betas
    return kinds[options.name](groups, lr=options.lr, betas=(beta1, beta2), eps=options.eps)


def eps_problem(name: str, eps: float, dtype: torch.dtype) -> str:
    """Why an optimizer cannot train weights of a dtype with this `eps`; empty where it can."""
    if name == "sgd" or eps >= torch.finfo(dtype).tiny:
        return ""
    short, is_zero = str(dtype).removeprefix("torch."), torch.tensor(eps, dtype=dtype).item() == 0
    what = "0" if is_zero else "below the normal numbers"
    return f"which is {what} in the weights' {short}, so that {name} would divide by almost 0; use optimizer.eps=1e-4"


def decay_vanishes(options: recipe.Optimizer, dtype: torch.dtype) -> bool:
    """Whether the decay that `adamw` applies to weights of a dtype rounds to none, at the highest learning rate."""
    return options.name == "adamw" and 0 < options.lr * options.weight_decay < torch.finfo(dtype).eps / 4


def schedule(options: recipe.Optimizer, optimizer: Optimizer, max_steps: int) -> LambdaLR:
    """Warm up linearly over `warmup_steps`, then go down to 0 at `max_steps` (`linear`, `cosine`) or stay (`constant`).

    `linear` is the paper's polynomial decay of power 1. The first step has lr / warmup_steps, and step warmup_steps the
    whole lr.

    Raises:
        UserError: an unknown schedule.
    """
    shapes: dict[str, Callable[[float], float]] = {
        "linear": lambda t: 1 - t,
        "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
        "constant": lambda t: 1.0,
    }
    if options.schedule not in shapes:
        raise UserError(f"the schedule is {options.schedule!r}, expected 'linear', 'cosine' or 'constant'")
    shape, warmup = shapes[options.schedule], options.warmup_steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return shape(min(1.0, (step - warmup) / max(1, max_steps - warmup)))

    return LambdaLR(optimizer, factor)


def gradient_norm(model: nn.Module) -> Tensor:
    """The 2-norm of all gradients of a model, a scalar; of all ranks' parts of them, where they are sharded."""
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def as_dict(options: recipe.Optimizer) -> dict[str, Any]:
    """The options as plain containers."""
    return {key: list(value) if isinstance(value, (list, tuple)) else value for key, value in vars(options).items()}
