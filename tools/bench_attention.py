"""How fast attention runs: dilated attention against its own kernel and a peer, and every backend over lengths.

    .venv/bin/python tools/bench_attention.py [--only branches|backends] [--lengths 1024 2048 ...] [--heads 12]

`branches`: forward and backward of `dilated` beside two yardsticks of the same kernel. `contiguous`: each branch's
kernel calls on tensors that are already as the kernel likes them, (segments, heads, kept, head_dim), summed: no views
and no merging. `peer`: tools/peer.py, which gathers, scatters and mixes whole tensors. Above 1 in `of contiguous` or
`of peer` means faster than that. GFLOP/s counts the pairs that the branches show, 4 D each forward, 10 D backward.

`backends`: each backend at each length, with the memory that forward and backward need beyond q, k, v and the gradient
given (the output and the gradients of q, k, v are in it). `sdpa` is dense attention by torch's flash kernel.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import measure
import peer
import torch
from torch import Tensor

from longnet_kit import attention
from longnet_kit.attention import flash

EVEN = [(2048, 1), (4096, 2), (8192, 4), (16384, 8)]
SETS = {
    "four even branches": (16384, EVEN),
    "the paper's branches": (32768, [(2048, 1), (4096, 2), (8192, 4), (16384, 6), (32768, 12)]),
    "five even branches": (32768, [*EVEN, (32768, 16)]),
    "(16384, 6) beside a dense one": (16384, [(2048, 1), (16384, 6)]),
    "(16384, 8) beside a dense one": (16384, [(2048, 1), (16384, 8)]),
    "(16384, 4) beside a dense one": (16384, [(2048, 1), (16384, 4)]),
    "(32768, 12) beside a dense one": (32768, [(2048, 1), (32768, 12)]),
    "(32768, 16) beside a dense one": (32768, [(2048, 1), (32768, 16)]),
    "(32768, 8) beside a dense one": (32768, [(2048, 1), (32768, 8)]),
}
"""Branches, and the length that they are measured at."""

Tensors = list[Tensor]


def dilated(branches: list[tuple[int, int]]) -> attention.AttentionBackend:
    lengths, rates = (list(numbers) for numbers in zip(*branches, strict=True))
    return attention.build({"backend": "dilated", "segment_lengths": lengths, "dilation_rates": rates})


def contiguous(n: int, heads: int, width: int, branches: list[tuple[int, int]], **factory: Any) -> list[Tensors]:
    """q, k, v, the output's gradient, the output and lse of each branch's kernel call, each in one piece."""
    made = []
    for w, r in branches:
        q, k, v, grad = (torch.randn(n // w, heads, w // r, width, **factory) for _ in range(4))
        made.append([q, k, v, grad, *flash.forward(q, k, v, True, width**-0.5)])
    return made


def by_branches(name: str, heads: int, width: int, rounds: int, **factory: Any) -> dict[str, Any]:
    """The row of one of `SETS`."""
    n, branches = SETS[name]
    scale = width**-0.5
    qkv = measure.draw(1, n, heads, width, **factory)
    grad = torch.randn(1, n, heads, width, **factory)
    ready = contiguous(n, heads, width, branches, **factory)
    backend = dilated(branches)
    ways: dict[str, Callable[..., Tensor]] = {"dilated": backend, "peer": lambda *x: peer.attend(*x, branches)}
    outs = {way: run(*qkv) for way, run in ways.items()}
    assert torch.allclose(outs["dilated"], outs["peer"], atol=1e-5 if qkv[0].dtype == torch.float32 else 2e-2)
    cases: dict[Any, Callable[[], object]] = {
        ("contiguous", "forward"): lambda: [flash.forward(*c[:3], True, scale) for c in ready],
        ("contiguous", "backward"): lambda: [flash.backward(c[3], *c[:3], *c[4:], True, scale) for c in ready],
    }
    for way, run in ways.items():
        cases[way, "forward"] = partial(run, *qkv)
        cases[way, "backward"] = partial(torch.autograd.grad, outs[way], qkv, grad, retain_graph=True)
    times = measure.in_turns(cases, rounds, qkv[0].device)
    both = {
        way: [f + b for f, b in zip(times[way, "forward"], times[way, "backward"], strict=True)]
        for way in ("contiguous", *ways)
    }
    flops = backend.flops(n, heads, width)
    assert flops is not None
    return {
        "branches": name,
        "N": n,
        "forward ms": measure.median_ms(times["dilated", "forward"]),
        "backward ms": measure.median_ms(times["dilated", "backward"]),
        "GFLOP/s": 3.5 * flops / statistics.median(both["dilated"]) / 1e9,
        "contiguous ms": measure.median_ms(both["contiguous"]),
        "of contiguous": measure.ratio(both["contiguous"], both["dilated"]),
        "peer ms": measure.median_ms(both["peer"]),
        "of peer": measure.ratio(both["peer"], both["dilated"]),
    }


def by_backends(lengths: list[int], heads: int, width: int, rounds: int, **factory: Any) -> list[dict[str, Any]]:
    """A row for each backend and length; a backend that cannot run one says why and is left out from there on."""
    rows: list[dict[str, Any]] = []
    stopped: set[str] = set()
    for n in lengths:
        branches = [(w, r) for w, r in EVEN if w <= n] or [(n, 1)]
        lean = dilated(branches)
        ways: dict[str, Callable[..., Tensor]] = {
            "sdpa": attention.build({"backend": "sdpa"}),
            "dilated": lean,
            "xformers": attention.build({"backend": "xformers"}),
            "naive": attention.build({"backend": "naive"}),
            "peer": partial(peer.attend, branches=branches),
        }
        for name in [name for name in ways if name not in stopped]:
            counted = (lean if name == "peer" else ways[name]).flops(n, heads, width)
            try:
                row = {"backend": name, "N": n, **one_backend(ways[name], counted, n, heads, width, rounds, **factory)}
            except ValueError as error:
                print(f"{name} at {n:,} tokens: {error}")
                stopped.add(name)
                continue
            rows.append(row)
            measure.show([row], header=len(rows) == 1)
    return rows


def one_backend(
    run: Callable[..., Tensor], flops: int | None, n: int, heads: int, width: int, rounds: int, **factory: Any
) -> dict[str, Any]:
    """Time, rate and memory of one backend at one length; ValueError where it cannot run it."""
    qkv = measure.draw(1, n, heads, width, **factory)
    grad = torch.randn(1, n, heads, width, **factory)
    device = grad.device
    # What libraries set up on first use is not the backend's.
    torch.autograd.grad(run(*(x[:, :64] for x in qkv)).sum(), qkv)
    beyond = measure.peak(lambda: torch.autograd.grad(run(*qkv), qkv, grad), device)
    out = run(*qkv)
    cases: dict[Any, Callable[[], object]] = {
        "forward": partial(run, *qkv),
        "backward": partial(torch.autograd.grad, out, qkv, grad, retain_graph=True),
    }
    times = measure.in_turns(cases, rounds, device)
    seconds = sum(statistics.median(taken) for taken in times.values())
    return {
        "forward ms": measure.median_ms(times["forward"]),
        "backward ms": measure.median_ms(times["backward"]),
        "GFLOP/s": None if flops is None else 3.5 * flops / seconds / 1e9,
        "peak MB": beyond / 1e6,
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Milliseconds and peak memory of each backend against length."""
    series = {}
    for name in dict.fromkeys(row["backend"] for row in rows):
        own = [row for row in rows if row["backend"] == name]
        series[name] = (
            [row["N"] for row in own],
            {
                "forward and backward, ms": [row["forward ms"] + row["backward ms"] for row in own],
                "memory beyond the inputs, MB": [row["peak MB"] for row in own],
            },
        )
    measure.draw_lines(series, path, "tokens")


def main() -> None:
    parser = measure.parser(__doc__, "attention")
    parser.add_argument("--only", choices=["branches", "backends"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**i for i in range(10, 14)])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    given = measure.options(parser)
    print(f"{measure.machine(given.device)}; {given.heads} heads of {given.head_dim}, {given.dtype}, causal\n")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"heads": given.heads, "width": given.head_dim, "rounds": given.rounds}
    sizes |= {"device": given.device, "dtype": given.dtype}
    results: dict[str, Any] = {}
    if given.only != "backends":
        results["branches"] = []
        for name in SETS:
            results["branches"].append(by_branches(name, **sizes))
            measure.show(results["branches"][-1:], header=len(results["branches"]) == 1)
        print()
    if given.only != "branches":
        results["backends"] = by_backends(given.lengths, **sizes)
        plot(results["backends"], given.plot)
    measure.write(given.json, given.device, **results)


if __name__ == "__main__":
    main()
