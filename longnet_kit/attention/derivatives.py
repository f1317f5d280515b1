"""Derivatives that a kernel does not have: asking for one raises; it is never zero in silence.

The kernels have first derivatives in reverse mode. They have no forward mode (`torch.autograd.forward_ad`,
`torch.func.jvp`) and no second derivatives.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import make_autograd_impl
from torch.autograd import forward_ad
from torch.library import CustomOpDef  # pyright: ignore[reportPrivateImportUsage] what custom_op gives, not in __all__

from longnet_kit.errors import UserError

_CURE = "use torch.autograd.grad once, or for short sequences the backend naive, which has every derivative"


def refuse_forward_mode(what: str, *inputs: Any) -> None:
    """Raise a UserError if one of the inputs carries a tangent of forward-mode differentiation."""
    if torch.compiler.is_dynamo_compiling():
        return  # the operations are asked again when their graph is made
    level = 0 if torch.compiler.is_compiling() else None  # graphs enter levels without forward_ad's knowledge
    for x in inputs:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x, level=level).tangent is not None:
            raise UserError(
                f"{what} has no forward-mode derivatives, which torch.func.jvp, jacfwd, hessian and "
                f"torch.autograd.forward_ad ask for; {_CURE}"
            )


def refuse_transforms(what: str) -> None:
    """Raise a UserError inside a transform of `torch.func`: `grad`, `vjp`, `jacrev`, `vmap`."""
    if not torch.compiler.is_dynamo_compiling() and torch._C._are_functorch_transforms_active():
        raise UserError(f"{what} does not run inside this transform of torch.func; {_CURE}")


def refuse_second(what: str) -> None:
    """Raise a UserError that says that there are no second derivatives."""
    raise UserError(f"{what} has no second derivatives, which create_graph=True asks for; {_CURE}")


def once(what: str, gradients: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Compute gradients from tensors; differentiating them again raises.

    torch's `once_differentiable` gives zero where the incoming gradient is a constant.
    """
    refuse_forward_mode(what, *inputs)
    return _Once.apply(what, gradients, *inputs)  # type: ignore[return-value]


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, what: str, gradients: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> Any:
        ctx.what = what
        return gradients(*inputs)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        refuse_second(ctx.what)


def without_gradient(what: str, x: Tensor, *origins: Tensor) -> Tensor:
    """Mark a tensor that was computed without autograd from others: differentiating it raises; it is not constant."""
    return _WithoutGradient.apply(what, x, *origins)  # type: ignore[return-value]


class _WithoutGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(what: str, x: Tensor, *origins: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.what = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise UserError(f"{ctx.what} have no gradients; detach them, or differentiate the output alone")


def guard(op: CustomOpDef, what: str) -> None:
    """Make an operation raise under forward mode, where torch's kernel drops tangents, and inside `torch.func.grad`.

    The check is part of the operation's autograd kernel, so it holds in compiled graphs too.
    """
    differentiate = make_autograd_impl(op._opoverload, op)  # as `register_autograd` does

    def autograd(keyset: Any, *args: Any) -> Any:
        refuse_forward_mode(what, *args)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            refuse_transforms(what)
        return differentiate(keyset, *args)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)  # about replacing it
        _LIBRARY.impl(op._opoverload._opname, autograd, "Autograd", with_keyset=True)


_LIBRARY = torch.library.Library("longnet_kit", "FRAGMENT")
