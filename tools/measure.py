"""What the benchmarks share: options, timing in turns, peaks of memory, and where results go."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def parser(text: str | None, name: str) -> argparse.ArgumentParser:
    """A command line with what every benchmark takes; results go to runs/benchmarks/`name` unless it says otherwise."""
    made = bare_parser(text, name)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 elsewhere")
    return made


def bare_parser(text: str | None, name: str) -> argparse.ArgumentParser:
    """The same for benchmarks that choose the device and the dtype themselves."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = Path("runs/benchmarks")
    made.add_argument("--rounds", type=int, default=5, help="each case once in every round; medians are shown")
    made.add_argument("--json", type=Path, default=folder / f"{name}.json")
    made.add_argument("--plot", type=Path, default=folder / f"{name}.png")
    return made


def options(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The parsed command line, `device` and `dtype` as torch has them."""
    given = made.parse_args()
    if hasattr(given, "device"):
        given.device = torch.device(given.device)
        given.dtype = DTYPES[given.dtype or ("float32" if given.device.type == "cpu" else "bfloat16")]
    for path in (given.json, given.plot):
        path.parent.mkdir(parents=True, exist_ok=True)
    return given


def machine(device: torch.device) -> str:
    """The machine in a line."""
    where = f"{os.cpu_count()} cores of {_cpu()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}, {where}"
    return f"{where}, torch {torch.__version__}, {date.today().isoformat()}"


def _cpu() -> str:
    """What the CPU calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def draw(*shape: int, device: torch.device, dtype: torch.dtype, count: int = 3) -> list[Tensor]:
    """Leaves that want gradients, normally distributed."""
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(count)]


def in_turns(cases: Mapping[Any, Callable[[], object]], rounds: int, device: torch.device) -> dict[Any, list[float]]:
    """Seconds of each case in each round, after one that does not count."""
    found: dict[Any, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name, case in cases.items():
            taken = seconds(case, device)
            if turn:
                found[name].append(taken)
    return found


def seconds(case: Callable[[], object], device: torch.device) -> float:
    """How long one call takes."""
    began = now(device)
    case()
    return now(device) - began


def now(device: torch.device) -> float:
    """The time once the device has done what it was given."""
    _wait(device)
    return time.perf_counter()


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the rounds' ratios: what disturbs a round disturbs both of its times."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def peak(case: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call needs at its peak, beyond what is in use before it.

    On a CPU it is the growth of the process's resident memory, which the kernel counts (Linux), over what is left once
    the allocator has given back what it keeps.
    """
    gc.collect()
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        case()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size starts anew
    before = _resident("VmRSS")
    case()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(times: Sequence[float]) -> float:
    """The median in milliseconds."""
    return statistics.median(times) * 1e3


def show(rows: Iterable[Mapping[str, Any]], header: bool = True) -> None:
    """Print rows of numbers under their names; row by row where the first call alone asks for a header."""
    for number, row in enumerate(rows):
        widths = [max(len(name), 31 if isinstance(row[name], str) else 9) for name in row]
        if header and number == 0:
            print("  ".join(name.rjust(width) for name, width in zip(row, widths, strict=True)))
        cells = (_text(value).rjust(width) for value, width in zip(row.values(), widths, strict=True))
        print("  ".join(cells), flush=True)


def draw_lines(series: Mapping[str, tuple[Sequence[float], Mapping[str, Sequence[float]]]], path: Path, x: str) -> None:
    """A panel for each quantity, a line for each series; logarithmic where values differ much."""
    from matplotlib.figure import Figure

    quantities = list(dict.fromkeys(name for _, values in series.values() for name in values))
    figure = Figure(figsize=(5.5 * len(quantities), 4), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, len(quantities), squeeze=False)[0], quantities, strict=True):
        for name, (places, values) in series.items():
            if quantity in values:
                axes.plot(places, values[quantity], marker="o", markersize=3, label=name)
        axes.set(xlabel=x, ylabel=quantity)
        axes.set_xscale("log", base=2)
        drawn = [y for _, values in series.values() for y in values.get(quantity, ())]
        if max(drawn) > 5 * min(drawn):
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def draw_bars(values: Mapping[str, float], path: Path, x: str) -> None:
    """A bar for each value, the first on top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 1 + 0.35 * len(values)), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(values)[::-1], list(values.values())[::-1])
    axes.set_xlabel(x)
    figure.savefig(path, dpi=120)


def write(path: Path, device: torch.device, **results: Any) -> None:
    """The machine and all results as JSON."""
    path.write_text(json.dumps({"machine": machine(device), **results}, indent=1) + "\n")


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
