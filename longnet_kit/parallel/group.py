"""A shard of a sequence whose other ranks are processes of torch.distributed."""

from __future__ import annotations

import atexit
import ctypes
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longnet_kit.attention.sharding import Pending, SequenceShard

# torch 2.13 renames them; the old names warn.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


LAST_MOMENT = 0.1
"""Seconds that the threads of transfers get at the end of a process."""


def keep_groups_at_exit() -> None:
    """See to it that no process group is closed while the interpreter ends, nor still at work.

    A thread of gloo's holds the tensors of its last transfer until its group is closed, and needs the interpreter to
    let go of them then. Where that is ending, the thread aborts the process, after all its work is done; where the
    garbage collector closes the group, the two wait for each other. Groups that nobody closes do neither.
    """
    atexit.unregister(_keep_groups)
    atexit.register(_keep_groups)


def _keep_groups() -> None:
    if dist.is_initialized():
        time.sleep(LAST_MOMENT)  # for threads to let go, while they can
        for group in dist.distributed_c10d._world.pg_map:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


class ProcessShard(SequenceShard):
    """This process among those that hold one sequence.

    Subgroups are made when they are first asked for, by their members alone: which sizes are needed depends on the
    branches and on the length of the sequence.

    Args:
        ranks: the global ranks of the group, in the order of the sequence; this process is one of them.
        group: their process group; None where there is just one.
        timeout: how long a transfer in a subgroup may take.

    Attributes:
        received: elements that came from other ranks so far, subgroups included, by kind of transfer.
    """

    def __init__(self, ranks: Sequence[int], group: dist.ProcessGroup | None, timeout: timedelta | None = None) -> None:
        self.ranks = list(ranks)
        self.rank = self.ranks.index(dist.get_rank()) if dist.is_initialized() else 0
        self.size = len(self.ranks)
        self.received = {"all_gather": 0, "reduce_scatter": 0, "all_to_all": 0}
        self._group = group
        self._timeout = timeout
        self._subgroups: dict[tuple[int, ...], ProcessShard] = {tuple(self.ranks): self}

    def all_gather(self, x: Tensor) -> Pending:
        x = x.contiguous()
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        return self._transfer("all_gather", _all_gather, out, x, (self.size - 1) * x.numel())

    def reduce_scatter(self, x: Tensor) -> Pending:
        x = x.contiguous()
        out = x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        return self._transfer("reduce_scatter", _reduce_scatter, out, x, (self.size - 1) * out.numel())

    def all_to_all(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        received = x.numel() // self.size * (self.size - 1)
        return self._transfer("all_to_all", dist.all_to_all_single, torch.empty_like(x), x, received)()

    def subgroup(self, size: int) -> ProcessShard:
        first = self.rank // size * size
        ranks = tuple(self.ranks[first : first + size])
        if ranks not in self._subgroups:
            group = None
            if len(ranks) > 1:
                made_group = dist.new_group(list(ranks), timeout=self._timeout, use_local_synchronization=True)
                assert isinstance(made_group, dist.ProcessGroup)
                group = made_group
            made = ProcessShard(ranks, group, self._timeout)
            made.received = self.received
            self._subgroups[ranks] = made
        return self._subgroups[ranks]

    def _transfer(self, name: str, start: Any, out: Tensor, x: Tensor, received: int) -> Pending:
        if self.size == 1:
            return lambda: x
        self.received[name] += received
        # As bytes where nothing is added up: gloo does not send every dtype.
        raw = name != "reduce_scatter" and x.device.type == "cpu"
        sent = [t.view(torch.uint8) if raw and t.numel() else t for t in (out, x)]
        work = start(*sent, group=self._group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return out

        return wait
