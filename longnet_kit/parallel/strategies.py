"""Lightning strategies that divide each sequence among the ranks of a group, and batches among the groups: the
common part, and the one on DDP.

Ranks form a mesh ("data", "sequence"), the sequence axis innermost. Data is sampled by the data axis alone; each batch
is moved to the device, then cut along its sequence. Gradients are averaged over all ranks, so a loss must be this
rank's sum over tokens times the world size, over the number of tokens of all ranks.
"""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.strategies.strategy import Strategy
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from longnet_kit import terminal
from longnet_kit.attention.inputs import divisors
from longnet_kit.attention.sharding import bind
from longnet_kit.errors import UserError
from longnet_kit.parallel import batches, group
from longnet_kit.parallel.group import ProcessShard

TIMEOUT = 600.0
"""Seconds that a transfer may take by default before the job is brought down."""

_GRACE = 5.0
"""Seconds that other ranks of a failed job have to end by themselves."""

_REFUSED = 2
"""The exit code of a rank that refuses its recipe or data; the first rank has reported why."""

_LAUNCHER = "LONGNET_LAUNCHER"
"""The environment variable by which ranks know the process that started them, itself the first rank."""


class SequenceParallel(Strategy):
    """What both strategies share."""

    _sequence_parallel_size: int | Literal["auto"]
    _timeout: timedelta | None
    _shard: ProcessShard | None = None
    _mesh: DeviceMesh | None = None
    told_elsewhere: tuple[type[Exception], ...] = ()
    """Errors that end all ranks alike, and of which somebody else tells the user."""
    explain: Callable[[BaseException], str] = staticmethod(lambda _: "")
    """More to tell of an error that ends this rank; asked before the others are ended."""
    control: dist.ProcessGroup | None = None
    """All ranks, for numbers in CPU memory; None before processes are connected."""

    @property
    def shard(self) -> ProcessShard:
        """This rank among those that hold one sequence, once processes are connected."""
        if self._shard is None:
            raise RuntimeError("the processes are not connected yet: the shard is known from setup_environment on")
        return self._shard

    @property
    def sequence_parallel_size(self) -> int:
        """Ranks that share one sequence.

        Raises:
            UserError: it does not divide the devices.
        """
        world = self.world_size  # type: ignore[attr-defined]
        size = world if self._sequence_parallel_size == "auto" else self._sequence_parallel_size
        if world % size:
            raise UserError(indivisible_world(size, world))
        return size

    def join(self) -> None:
        """Connect this process with the others; nothing happens the second time."""
        raise NotImplementedError

    def setup_environment(self) -> None:
        size = self.sequence_parallel_size  # before any process waits for another
        self.join()
        if self._shard is None:
            self._connect(size)
            group.keep_groups_at_exit()

    def _connect(self, size: int) -> None:
        """Make the mesh and this rank's group, in the same order on all ranks."""
        world = dist.get_world_size()
        places = torch.arange(world).view(-1, size)  # (data, sequence)
        mine: list[dist.ProcessGroup] = []
        for ranks_of_all in (places.T.tolist(), places.tolist()):
            for ranks in ranks_of_all:
                whole = len(ranks) == world
                made = dist.group.WORLD if whole else dist.new_group(ranks, timeout=self._timeout)
                if dist.get_rank() in ranks:
                    mine.append(made)  # type: ignore[arg-type]
        device = self.root_device.type
        self._mesh = DeviceMesh.from_group(mine, device, places, mesh_dim_names=("data", "sequence"))
        self._shard = ProcessShard(places[dist.get_rank() // size].tolist(), mine[1], self._timeout)
        on_cpu = dist.get_backend() == "gloo"
        self.control = dist.group.WORLD if on_cpu else dist.new_group(backend="gloo", timeout=self._timeout)  # type: ignore[assignment]

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """The data axis alone: the ranks of a sequence are one replica."""
        size = self.sequence_parallel_size
        return {"num_replicas": self.world_size // size, "rank": self.global_rank // size}  # type: ignore[attr-defined]

    def process_dataloader(self, dataloader: object) -> object:
        """Seed workers by the data rank, so that the ranks of a sequence draw alike."""
        loader = super().process_dataloader(dataloader)
        seeded = os.environ.get("PL_SEED_WORKERS") == "1"
        if isinstance(loader, DataLoader) and loader.worker_init_fn is None and seeded:
            loader.worker_init_fn = partial(pl_worker_init_function, rank=self.distributed_sampler_kwargs["rank"])
        return loader

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Check that the group holds one batch, move it, and cut out this rank's part of each sequence.

        A LightningModule that has `shard_batch(batch, shard)` cuts for itself.
        """
        batches.check_same(batch, self.shard, self.root_device)
        batch = super().batch_to_device(batch, device, dataloader_idx)
        own = getattr(self.lightning_module, "shard_batch", None)
        return batches.cut(batch, self.shard) if own is None else own(batch, self.shard)

    def setup(self, trainer: Trainer) -> None:
        bind(self._module, self.shard)
        super().setup(trainer)

    def teardown(self) -> None:
        if self.lightning_module is not None:
            bind(self.lightning_module, None)
        super().teardown()

    def _configure_launcher(self) -> None:
        environment: Any = self.cluster_environment  # type: ignore[attr-defined]
        if not environment.creates_processes_externally:
            self._launcher = Launcher(environment, self.num_processes, self.num_nodes)  # type: ignore[attr-defined]
            os.environ[_LAUNCHER] = str(os.getpid())

    def on_exception(self, exception: BaseException) -> None:
        """Say which rank ends, and see to it that none of those that this job started stays behind."""
        super().on_exception(exception)
        if isinstance(exception, Exception) and not isinstance(exception, (UserError, *self.told_elsewhere)):
            terminal.tell(self._last_words(exception))
        deadline = time.monotonic() + _GRACE
        for process in getattr(self.launcher, "procs", ()):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        if is_about_transfers(exception) and was_started_by_a_rank():
            _end_launcher(os.getppid())

    def _last_words(self, exception: BaseException) -> str:
        rank, world = self.global_rank, self.world_size  # type: ignore[attr-defined]
        seconds = f"{self._timeout.total_seconds():g} s" if self._timeout else "the backend's timeout"
        what = f"{type(exception).__name__}: {str(exception).strip().splitlines()[0] if str(exception) else ''}"
        if is_about_transfers(exception):
            what = f"another rank died, or did not answer within {seconds} ({what})"
        told = f"longnet_kit: rank {rank} of {world} ends: {what}. The job comes down with it"
        return "\n".join(filter(None, (told, self.explain(exception))))

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module


class Launcher(_SubprocessScriptLauncher):
    """Starts the other ranks of this machine, and ends this one with exit code 1 where one of them is lost.

    Lightning's own kills this process by SIGKILL instead, also while it reports what has happened.
    """

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            threading.Thread(target=_watch, args=(self.procs,), daemon=True, name="ranks").start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)


def _watch(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End this process if one of the others fails, unless it ends by itself: a transfer may wait for long."""
    while not (failed := [process for process in processes if process.poll()]):
        if all(process.returncode == 0 for process in processes):
            return
        time.sleep(0.5)
    time.sleep(2 * _GRACE)
    code = failed[0].returncode
    terminal.tell(f"longnet_kit: another rank (process {failed[0].pid}) has ended with code {code}: ends too")
    for process in processes:
        process.kill()
    os._exit(code if code == _REFUSED else 1)


class SequenceParallelStrategy(SequenceParallel, DDPStrategy):
    """Sequence parallelism with the whole model on every rank, gradients averaged by DDP.

    Args:
        sequence_parallel_size: ranks that share one sequence; the others are data-parallel. `auto`: all.
        timeout: how long a transfer may take before the job is brought down.
        kwargs: those of DDPStrategy.

    Raises:
        UserError: when training starts, if the size does not divide the devices.
    """

    strategy_name = "sequence_parallel"

    def __init__(
        self,
        sequence_parallel_size: int | Literal["auto"] = "auto",
        timeout: timedelta | None = timedelta(seconds=TIMEOUT),
        **kwargs: Any,
    ) -> None:
        if not {"broadcast_buffers", "forward_sync_buffers"} & kwargs.keys():  # a buffer may belong to the shard
            named = inspect.signature(DistributedDataParallel).parameters
            kwargs["forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers"] = False
        super().__init__(timeout=timeout, **kwargs)
        self._sequence_parallel_size = checked_size(sequence_parallel_size)

    def join(self) -> None:
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self.setup_distributed()


def is_started_by_others(trainer: Trainer) -> bool:
    """Whether this process is one of several that somebody else has started, a rank or a scheduler."""
    strategy: Any = trainer.strategy
    return isinstance(strategy, SequenceParallel) and strategy.cluster_environment.creates_processes_externally  # type: ignore[attr-defined]


def was_started_by_a_rank() -> bool:
    """Whether the first rank has started this process as another one."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and str(os.getppid()) == os.environ.get(_LAUNCHER)


def indivisible_world(size: int, world: int) -> str:
    """What is wrong with groups of `size` ranks in a world that they do not divide, and which sizes do."""
    fitting = ", ".join(map(str, divisors(world)))
    more = -(-world // size) * size
    return f"got {size}, which does not divide the {world} devices; use one of {fitting}, or {more} devices"


def checked_size(size: int | Literal["auto"]) -> int | Literal["auto"]:
    if size != "auto" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise UserError(f"sequence_parallel_size is {size!r}, expected a whole number of at least 1, or 'auto'")
    return size


def _end_launcher(pid: int) -> None:
    """Kill the rank that started this one, unless it ends by itself: a rank that hangs cannot."""
    deadline = time.monotonic() + _GRACE
    while os.getppid() == pid and time.monotonic() < deadline:
        time.sleep(0.1)
    if os.getppid() == pid:
        terminal.tell(f"longnet_kit: the first rank (process {pid}) does not end by itself: killed")
        os.kill(pid, signal.SIGKILL)


def is_about_transfers(exception: BaseException) -> bool:
    """Whether an error came out of torch.distributed's transport, because another rank is gone or silent."""
    if "EADDRINUSE" in str(exception):
        return False  # nobody was lost: another job has the port
    if isinstance(exception, dist.DistError):
        return True
    words = ("gloo", "NCCL", "closed by peer", "Connection reset", "Timed out", "Broken pipe", "pair closure")
    trace = exception.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    within = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    told = any(word in str(exception) for word in words) or within.startswith(("torch.distributed.", group.__name__))
    return isinstance(exception, RuntimeError) and told
