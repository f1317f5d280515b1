"""How attention grows with the length: one ever longer sequence, and the paper's runtime figure.

    .venv/bin/python tools/bench_scaling.py [--only doubling|figure] [--longest 1048576] [--total 262144] [--limit 60]

`doubling`: forward and backward of dilated attention on one sequence of N tokens, branches (2048, 1), (4096, 2), ... up
to (N, N / 2048), so that each doubling adds a branch; 12 heads up to 256K tokens and 2 beyond, as memory demands.
`of half` is the time over that of half the length, in the same round; `beyond` the memory at the peak beside q, k, v,
the output, its gradient and the gradients of q, k, v, as a share of those.

`figure`: forward passes over the same number of tokens in all, in batches of ever longer sequences, dense and dilated
with at most three branches, (2048, 1), one of the middle and (N, N / 2048), as in the paper's runtime figure. A series
ends where its next step would take longer than the limit.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import measure
import torch
from bench_attention import dilated

from longnet_kit import attention

KEPT = 2048
FEW_HEADS = 2
MANY_HEADS_UP_TO = 2**18


def geometric(n: int) -> list[tuple[int, int]]:
    """(2048, 1), (4096, 2), ... up to n."""
    return [(KEPT * r, r) for r in (2**i for i in range(n.bit_length())) if KEPT * r <= n] or [(n, 1)]


def three(n: int) -> list[tuple[int, int]]:
    """The first, the middle and the last of `geometric`."""
    every = geometric(n)
    return sorted({every[0], every[len(every) // 2], every[-1]})


def doubling(longest: int, heads: int, width: int, rounds: int, **factory: Any) -> list[dict[str, Any]]:
    """A row for each length from 16K."""
    rows = []
    for few in (False, True):
        count = FEW_HEADS if few else heads
        first = MANY_HEADS_UP_TO if few else 2**14
        last = longest if few else min(longest, MANY_HEADS_UP_TO)
        lengths = [2**i for i in range(first.bit_length() - 1, last.bit_length())]
        if few and longest <= MANY_HEADS_UP_TO:
            break
        times: dict[int, list[float]] = {n: [] for n in lengths}
        beyond: dict[int, float] = {}
        for turn in range(rounds + 1):
            for n in lengths:
                taken, more = once(n, count, width, peak=turn == 0, **factory)
                if turn == 0:
                    beyond[n] = more
                else:
                    times[n].append(taken)
        for n in lengths:
            flops = dilated(geometric(n)).flops(n, count, width)
            assert flops is not None
            row = {
                "N": n,
                "heads": count,
                "branches": len(geometric(n)),
                "seconds": statistics.median(times[n]),
                "of half": measure.ratio(times[n], times[n // 2]) if n // 2 in times else None,
                "GFLOP/s": 3.5 * flops / statistics.median(times[n]) / 1e9,
                "beyond": beyond[n],
            }
            rows.append(row)
            measure.show([row], header=len(rows) == 1)
    return rows


def once(n: int, heads: int, width: int, *, peak: bool, **factory: Any) -> tuple[float, float]:
    """Seconds of a forward and backward pass; or, for `peak`, the share of memory beyond what goes in and comes out."""
    qkv = measure.draw(1, n, heads, width, **factory)
    grad = torch.randn(1, n, heads, width, **factory)
    backend = dilated(geometric(n))
    kept: list[Any] = []

    def both_ways() -> None:
        out = backend(*qkv)
        kept.extend([out, *torch.autograd.grad(out, qkv, grad)])  # alive, as in a model

    if peak:
        measure.seconds(lambda: torch.autograd.grad(backend(*(x[:, :KEPT] for x in qkv)).sum(), qkv), grad.device)
        results, all_of_them = 4 * grad.nbytes, 8 * grad.nbytes
        return 0.0, (measure.peak(both_ways, grad.device) - results) / all_of_them
    return measure.seconds(both_ways, grad.device), 0.0


def figure(total: int, heads: int, width: int, rounds: int, limit: float, **factory: Any) -> list[dict[str, Any]]:
    """A row for each backend and length."""
    rows: list[dict[str, Any]] = []
    for name in ("dense", "dilated"):
        expected = 0.0
        for n in (2**i for i in range(13, total.bit_length())):
            if expected > limit:
                print(f"{name} at {n:,} tokens would take about {expected:.0f} s")
                break
            backend = attention.build({"backend": "sdpa"}) if name == "dense" else dilated(three(n))
            q, k, v = (torch.randn(total // n, n, heads, width, **factory) for _ in range(3))
            with torch.no_grad():
                forward = partial(backend, q, k, v)
                beyond = measure.peak(forward, q.device)
                times = [measure.seconds(forward, q.device) for _ in range(rounds)]
            expected = statistics.median(times) * (2 if name == "dense" else 1)
            row = {"attention": name, "N": n, "batch": total // n, "seconds": statistics.median(times)}
            rows.append(row | {"peak MB": beyond / 1e6})
            measure.show(rows[-1:], header=len(rows) == 1)
    return rows


def main() -> None:
    parser = measure.parser(__doc__, "scaling")
    parser.set_defaults(rounds=3)
    parser.add_argument("--only", choices=["doubling", "figure"])
    parser.add_argument("--longest", type=int, default=2**20, help="tokens, a power of two from 2^14")
    parser.add_argument("--total", type=int, default=2**18, help="tokens in a batch of the figure, a power of two")
    parser.add_argument("--limit", type=float, default=60, help="seconds that a step of the figure may take")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    given = measure.options(parser)
    print(f"{measure.machine(given.device)}; heads of {given.head_dim}, {given.dtype}, causal\n")
    torch.manual_seed(0)
    sizes = {"width": given.head_dim, "rounds": given.rounds, "device": given.device, "dtype": given.dtype}
    results = {}
    if given.only != "figure":
        results["doubling"] = doubling(given.longest, given.heads, **sizes)
        print()
    if given.only != "doubling":
        rows = figure(given.total, FEW_HEADS, limit=given.limit, **sizes)
        series = {}
        for name in ("dense", "dilated"):
            own = [row for row in rows if row["attention"] == name]
            values = {f"seconds for {given.total:,} tokens": [row["seconds"] for row in own]}
            values["memory beyond the inputs, MB"] = [row["peak MB"] for row in own]
            series[name] = ([row["N"] for row in own], values)
        measure.draw_lines(series, given.plot, "tokens in a sequence")
        results["figure"] = rows
    measure.write(given.json, given.device, **results)


if __name__ == "__main__":
    main()
