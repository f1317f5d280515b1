"""Which attention kernel is fastest on this GPU: measures all that run, and writes their order into the kit's table.

    .venv/bin/python tools/bench_routes.py [--length 16384] [--heads 16] [--head-dim 64] [--write]

Forward and backward of dense causal attention, on contiguous tensors, for half precision and for float32. `--write`
puts the orders and the rates into longnet_kit/attention/cuda_routes.json, for this GPU's compute capability. On a CPU
its two kernels are compared, and nothing is written.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from typing import Any

import measure
import torch

from longnet_kit.attention import flash, routes


def rates(device: torch.device, dtype: torch.dtype, given: Any) -> list[dict[str, Any]]:
    """A row for each kernel that runs, the fastest first."""
    shape = 1, given.heads, given.length, given.head_dim
    q, k, v, grad = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    scale, rows = given.head_dim**-0.5, []
    for name, route in _runnable(device, dtype, given.head_dim, given.length).items():
        out, lse = route.forward(q, k, v, True, scale)
        cases = {
            "forward": lambda route=route: route.forward(q, k, v, True, scale),
            "backward": lambda route=route, out=out, lse=lse: route.backward(grad, q, k, v, out, lse, True, scale),
        }
        times = {way: statistics.median(t) for way, t in measure.in_turns(cases, given.rounds, device).items()}
        pairs = 2 * given.heads * given.head_dim * given.length * (given.length + 1)  # 4 D per pair
        rows.append(
            {
                "dtype": routes.kind(dtype),
                "kernel": name,
                "forward TFLOP/s": pairs / times["forward"] / 1e12,
                "backward TFLOP/s": 2.5 * pairs / times["backward"] / 1e12,
                "both TFLOP/s": 3.5 * pairs / sum(times.values()) / 1e12,
            }
        )
    return sorted(rows, key=lambda row: -row["both TFLOP/s"])


def _runnable(device: torch.device, dtype: torch.dtype, head_dim: int, length: int) -> dict[str, flash.Route]:
    if device.type != "cuda":
        return {"cpu": flash.CPU, "math": flash.MATH}
    has_fa3 = routes.use_flash_attention_3(device)  # then it is what the flash ops run
    major = torch.cuda.get_device_capability(device)[0]
    names = [name for name in flash.CUDA if routes.runs(name, major, dtype, head_dim, length, length)]
    return {name: flash.CUDA[name] for name in names if not (name == "flash" and has_fa3)}


def with_orders(
    table: Mapping[str, Any], major: int, rows: list[dict[str, Any]], source: str
) -> dict[str, Any]:  # fmt: skip
    """The table with the orders measured for this capability; a kernel that was not measured keeps its place."""
    entries, known = list(table["orders"]), routes.orders(table)
    for kind in dict.fromkeys(row["dtype"] for row in rows):
        own = [row for row in rows if row["dtype"] == kind]
        measured = iter(row["kernel"] for row in sorted(own, key=lambda row: -row["both TFLOP/s"]))
        names = {row["kernel"] for row in own}
        before = known.get((major, kind)) or known.get((None, kind)) or []
        order = [next(measured) if name in names else name for name in [*before, *(names - set(before))]]
        numbers = ", ".join(f"{row['kernel']} {row['both TFLOP/s']:.0f}" for row in own)
        entry = {"major": major, "kind": kind, "order": order, "source": f"TFLOP/s, {numbers}; {source}"}
        entries = [entry, *(e for e in entries if (e["major"], e["kind"]) != (major, kind))]
    return {**table, "orders": entries}


def main() -> None:
    parser = measure.parser(__doc__, "routes")
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--write", action="store_true")
    given = measure.options(parser)
    where = f"{measure.machine(given.device)}; {given.heads} heads of {given.head_dim}, {given.length:,} tokens, causal"
    print(f"{where}\n")
    kinds = [torch.bfloat16, torch.float32] if given.device.type == "cuda" else [torch.float32]
    rows = [row for dtype in kinds for row in rates(given.device, dtype, given)]
    measure.show(rows)
    measure.write(given.json, given.device, kernels=rows)
    measure.draw_bars({f"{row['kernel']}, {row['dtype']}": row["both TFLOP/s"] for row in rows}, given.plot, "TFLOP/s")
    if given.write and given.device.type == "cuda":
        major = torch.cuda.get_device_capability(given.device)[0]
        table = with_orders(json.loads(routes.TABLE.read_text()), major, rows, where)
        routes.TABLE.write_text(json.dumps(table, indent=2) + "\n")
        print(f"\nwritten to {routes.TABLE}")


if __name__ == "__main__":
    main()
