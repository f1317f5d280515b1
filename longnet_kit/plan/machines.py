"""What a device can do, from its vendor's data sheet: memory, matrix products, links."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from longnet_kit import host_memory
from longnet_kit.callbacks.throughput import measured_flops


@dataclass(frozen=True)
class Machine:
    """A kind of device."""

    name: str
    memory: float
    """Bytes."""
    flops: dict[torch.dtype, float]
    """Dense matrix products, per second."""
    within_node: float | None
    """Bytes per second that a device receives from others of its node; None where unknown."""
    between_nodes: float | None
    """The same from other nodes."""
    is_cuda: bool = True


def _gpu(name: str, memory: float, half: float, single: float, double: float, nvlink: float, network: float) -> Machine:
    flops = {torch.bfloat16: half, torch.float16: half, torch.float32: single, torch.float64: double}
    return Machine(name, memory, flops, nvlink, network)


# NVIDIA's data sheets: A100 80GB SXM (2021), H100 SXM (2023), H200 SXM (2024), rates without sparsity; float32 without
# TF32, which torch leaves off. NVLink is half of the bidirectional figure. The network is that of the DGX systems: one
# port of 200 Gb/s (A100) or 400 Gb/s (H100, H200) for each device.
GPUS = {
    "a100": _gpu("A100 80 GB SXM", 80e9, 312e12, 19.5e12, 19.5e12, 300e9, 25e9),
    "h100": _gpu("H100 80 GB SXM", 80e9, 989e12, 67e12, 67e12, 450e9, 50e9),
    "h200": _gpu("H200 141 GB SXM", 141e9, 989e12, 67e12, 67e12, 450e9, 50e9),
}


def here(dtype: torch.dtype, devices: int) -> Machine:
    """This machine's CPU, which `devices` processes share; its rate is measured for a moment."""
    rate = measured_flops(torch.device("cpu"), dtype) / devices
    return dataclasses.replace(cpu(devices), flops={dtype: rate})


def cpu(devices: int) -> Machine:
    """The same, its rate unknown."""
    name = f"this CPU's share for one of {devices} processes" if devices > 1 else "this CPU"
    return Machine(name, host_memory.total(devices), {}, None, None, is_cuda=False)
