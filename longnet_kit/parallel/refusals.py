"""Let ranks that wait to be connected know that another one has refused its recipe, through the store they meet at."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch._C._distributed_c10d import TCPStore

from longnet_kit import terminal
from longnet_kit.parallel.strategies import was_started_by_a_rank

_KEY = "longnet_kit/refused"
_PATIENCE = 15.0
"""Seconds that a rank that refuses its recipe waits for the first one to open the store."""
_INTERVAL = 0.5
_REFUSED = 2
"""The exit code of the ranks that end because of another one's refusal."""


def publish(reason: str) -> None:
    """Hand this rank's refusal to the ranks that wait for it.

    Nothing happens in the first rank, in one that it has started or that is connected, and in a process that nobody
    started as a rank.
    """
    environment = _environment()
    if environment is None or _rank() == "0" or was_started_by_a_rank() or dist.is_initialized():
        return
    deadline = time.monotonic() + _PATIENCE
    while (store := _store(environment)) is None and time.monotonic() < deadline:
        time.sleep(_INTERVAL)
    if store is not None:
        with suppress(RuntimeError):  # the first rank has ended meanwhile
            store.set(_key(), f"rank {_rank()}: {reason}")


@contextmanager
def heeded(environment: ClusterEnvironment) -> Iterator[None]:
    """End this process with 2 as soon as another rank publishes a refusal, for as long as this is entered."""
    done = threading.Event()
    if was_started_by_a_rank():
        done.set()
    threading.Thread(target=_watch, args=(environment, done), daemon=True, name="refusals").start()
    try:
        yield
    finally:
        done.set()


def _watch(environment: ClusterEnvironment, done: threading.Event) -> None:
    store: TCPStore | None = None
    while not done.wait(_INTERVAL):
        try:
            store = store or _store(environment)
            if store is None or not store.check([_key()]):
                continue
            reason = store.get(_key()).decode(errors="replace")
        except RuntimeError:  # the store is closed
            return
        if not done.is_set():
            terminal.tell(f"longnet: {reason}")
            if _rank() == "0":  # the store may close with this process, and the others must read it first
                time.sleep(3 * _INTERVAL)
            os._exit(_REFUSED)


def _environment() -> ClusterEnvironment | None:
    """What started this process as a rank, as the Trainer would find out; None if nothing did."""
    for kind in (TorchElasticEnvironment, SLURMEnvironment):
        if kind.detect():
            return kind()
    return LightningEnvironment() if {"LOCAL_RANK", "MASTER_PORT"} <= os.environ.keys() else None


def _rank() -> str:
    """This rank's number: over all nodes where the environment has it, else on its node."""
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    local = os.environ.get("LOCAL_RANK", "0")
    return os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or (local if node == "0" else f"{node}.{local}")


def _store(environment: ClusterEnvironment) -> TCPStore | None:
    """A client of the store of the first rank or of torchrun; None if it is not open."""
    try:
        address, port = environment.main_address, environment.main_port
        socket.create_connection((address, port), timeout=1).close()  # TCPStore prints a trace where nobody listens
        return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)
    except (OSError, RuntimeError, ValueError, TypeError, OverflowError):  # nobody listens, or the port is no port
        return None


def _key() -> str:
    """The key of this attempt: the store of torchrun outlives its processes."""
    return f"{_KEY}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
