"""A ledger of everything that tensor code allocates and computes, kept while it runs on tensors without data.

What runs under it is the code itself, on torch's fake tensors: shapes, views, autograd and checkpointing are real, and
nothing is allocated. Storages are booked from their making to their end, so that the peak is known and what it is made
of. All private parts of torch that planning needs are named here.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.autograd.graph import _engine_run_backward, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from longnet_kit.attention import dilated_compact
from longnet_kit.attention.patterns import square

aten = torch.ops.aten

_SMALL = 2**20
"""Whole numbers up to so many in a tensor, and single numbers, are computed for real: code branches on them."""

_KERNELS = {
    aten._scaled_dot_product_flash_attention_for_cpu: 2,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: 5,
}
"""Attention kernels, and how many matrix products each of them does."""


@contextmanager
def without_data(cuda: bool = False) -> Iterator[Ledger]:
    """Run what follows without data and book it; new tensors belong to the CPU and are fake. See `Ledger`."""
    state, deepcopy = torch.get_rng_state(), Tensor.__deepcopy__
    ledger = Ledger(cuda)
    # Torch's own copies storages, behind the back of dispatch modes: it would read and write memory that is not there.
    Tensor.__deepcopy__ = lambda x, memo: x.detach().clone()  # type: ignore[method-assign]
    try:
        way = dilated_compact.without_kernels() if cuda else nullcontext()
        with warnings.catch_warnings(), way, FakeTensorMode(allow_non_fake_inputs=True), ledger:
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            yield ledger
    finally:
        Tensor.__deepcopy__ = deepcopy  # type: ignore[method-assign]
        torch.set_rng_state(state)


class Ledger(TorchDispatchMode):
    """Books storages and FLOPs of the operations that run while it is active.

    Args:
        cuda: count what CUDA's attention kernels need beside their results; the CPU's need nothing.

    Attributes:
        phase: what is going on; the user sets it.
        flops: matrix-multiplication FLOPs by phase. What the backward pass computes again is under `recomputed`.
    """

    def __init__(self, cuda: bool = False) -> None:
        super().__init__()
        self.phase = ""
        self.flops: Counter[str] = Counter()
        self._cuda = cuda
        self._on_host = False
        self._serials: dict[int, int] = {}  # of the storages that are alive, by address
        self._sizes: dict[int, int] = {}  # bytes, by serial number
        self._labels: dict[int, str] = {}
        self._events: list[tuple[str, int, int]] = []  # phase, serial number, bytes more
        self._made = 0

    def alive_as(self, name: str) -> int:
        """Bytes that are allocated now under a label."""
        return sum(self._sizes[serial] for serial in self._serials.values() if self._labels.get(serial) == name)

    def label(self, name: str, tensors: Iterable[Tensor] | None = None) -> None:
        """Name what tensors are held for; without `tensors`, everything alive that has no name yet."""
        if tensors is None:
            serials = [serial for serial in self._serials.values() if serial not in self._labels]
        else:
            serials = [self._serials[x.untyped_storage()._cdata] for x in tensors]
        self._labels.update(dict.fromkeys(serials, name))

    def peaks(self) -> dict[str, Counter[str]]:
        """For each phase, bytes by name when most was allocated; what has no name is `temporary`."""
        alive: Counter[str] = Counter()
        total, highest, peaks = 0, dict[str, int](), dict[str, Counter[str]]()
        for phase, serial, more in self._events:
            alive[self._labels.get(serial, "temporary")] += more
            total += more
            if total > highest.get(phase, -1):
                highest[phase] = total
                peaks[phase] = Counter({name: size for name, size in alive.items() if size})
        return peaks

    @contextmanager
    def keeping_on_host(self, **_: Any) -> Iterator[None]:
        """As `save_on_cpu`: what is saved for the backward pass leaves the device, and comes back as a copy."""

        def pack(x: Tensor) -> Tensor:
            self._on_host = True
            try:
                return torch.empty_like(x)
            finally:
                self._on_host = False

        with saved_tensors_hooks(pack, torch.clone):
            yield

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        out = self._run(func, FakeTensor in types, args, kwargs)
        self._book_flops(func, args, kwargs, out)
        self._book_results(out)
        return out

    def _run(self, func: Any, fake: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation without data; where it is about a few numbers that are known, with them."""
        definition = OPDEFS.get(func._schema.name)
        if definition is not None:
            with self:  # the steps of a custom operation, which torch would skip
                return definition._init_fn(*args, **kwargs)
        if fake:
            return func(*args, **kwargs)
        try:
            known = any(isinstance(x, torch.UntypedStorage) for x in args)  # torch's message would print all of it
            out = None if known else func(*args, **kwargs)
            known = all(_is_small(x) for x in _tensors(out))
        except (RuntimeError, AssertionError):  # its result depends on the numbers
            known = True
        if known:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return out

    def _book_results(self, out: Any) -> None:
        if self._on_host:
            return
        for x in _tensors(out):
            storage = x.untyped_storage()
            address = storage._cdata
            if address not in self._serials:
                self._made += 1
                self._serials[address], self._sizes[self._made] = self._made, storage.nbytes()
                self._events.append((self.phase, self._made, storage.nbytes()))
                weakref.finalize(storage, self._end, address).atexit = False

    def _end(self, address: int) -> None:
        serial = self._serials.pop(address)
        self._events.append((self.phase, serial, -self._sizes[serial]))

    def _book_flops(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        packet = func.overloadpacket
        if packet in _KERNELS:
            backward = packet.__name__.endswith("backward")
            q, k, *rest = args[1:] if backward else args
            place = 4 if backward else 2  # of `is_causal`, which is left out where it is False
            causal = rest[place] if len(rest) > place else kwargs.get("is_causal", False)
            self.flops[self.work] += _KERNELS[packet] * kernel_flops(q, k, causal)
            if backward and self._cuda and q.element_size() == 2:
                self._book_results(q.new_empty(q.shape, dtype=torch.float32))  # dq is added up in float32
        elif packet in flop_registry and func.namespace == "aten":
            self.flops[self.work] += flop_registry[packet](*args, **kwargs, out_val=out)

    @property
    def work(self) -> str:
        """The phase; in the backward pass, checkpointing is told from it by the hook it recomputes under."""
        hooks: Any = torch._C._autograd  # type: ignore[attr-defined]
        hooked = hooks._top_saved_tensors_default_hooks(False) is not None
        return "recomputed" if self.phase == "backward" and hooked else self.phase


def run_backward(loss: Tensor, grad: Tensor | None = None) -> None:
    """As `loss.backward(grad)`, which would suspend function modes for what checkpointing recomputes."""
    _engine_run_backward(
        (loss,),
        (torch.ones_like(loss) if grad is None else grad,),
        False,
        False,
        (),
        allow_unreachable=True,
        accumulate_grad=True,
    )


def kernel_flops(q: Tensor, k: Tensor, causal: bool) -> int:
    """FLOPs of one matrix product of an attention kernel: 2 D per query-key pair, for q and k (B, H, n or m, D)."""
    batch, heads, n, head_dim = q.shape
    pairs = square(n, True) if causal else n * k.shape[2]
    return 2 * batch * heads * head_dim * pairs


def _tensors(out: Any) -> Iterable[Tensor]:
    if isinstance(out, Tensor):
        return (out,)
    return [x for x in out if isinstance(x, Tensor)] if isinstance(out, (tuple, list)) else ()


def _is_small(x: Tensor) -> bool:
    return x.numel() <= (1 if x.is_floating_point() else _SMALL)
