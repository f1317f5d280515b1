"""Weak scaling of sequence-parallel dilated attention: the same tokens on each rank, more ranks, a longer sequence.

    .venv/bin/python tools/bench_parallel.py [--tokens 16384] [--ranks 1 2 4]

For each number of ranks P the sequence is P times as long, and its longest branch reaches over all of it with as many
kept tokens as ever. Each rank is a process with one thread, on gloo. The table gives forward and backward of one layer:
seconds of CPU time of the slowest rank (wall time too, which says little where ranks share cores), and the elements
that the rank received, counted, beside the formula and beside what trading heads for the sequence (Ulysses) would
receive. Elements for more ranks than can be timed are counted on ranks that are threads, with fewer tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

import measure
import torch
import torch.distributed as dist

from longnet_kit import attention
from longnet_kit.attention.sharding import bind
from longnet_kit.parallel import threads
from longnet_kit.parallel.group import ProcessShard

HEADS, HEAD_DIM = 8, 64


def backend(tokens: int, ranks: int) -> attention.AttentionBackend:
    """Two local branches and one over the whole sequence, with tokens / 8 kept per segment and head in each."""
    kept, whole = tokens // 8, tokens * ranks
    lengths = [kept, 4 * kept, whole]
    return attention.build(
        {"backend": "dilated", "segment_lengths": lengths, "dilation_rates": [w // kept for w in lengths]}
    )


def formula(tokens: int, ranks: int) -> float:
    """Elements received in a forward pass: 2 n H D (w / n - 1) / r for the one branch that spans ranks."""
    return 2 * tokens * HEADS * HEAD_DIM * (ranks - 1) / (8 * ranks)


def ulysses(tokens: int, ranks: int) -> float:
    """Elements received by the all-to-alls of q, k, v and the output."""
    return 4 * tokens * HEADS * HEAD_DIM * (ranks - 1) / ranks


def work(tokens: int, ranks: int, rank: int, rounds: int) -> dict[str, Any]:
    """What one rank measures."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    shard = ProcessShard(range(ranks), dist.group.WORLD)
    layer = backend(tokens, ranks)
    bind(layer, shard)
    torch.manual_seed(rank)
    qkv = torch.randn(1, tokens, 3, HEADS, HEAD_DIM, requires_grad=True)
    cpu, wall = [], []
    for _ in range(rounds + 1):
        dist.barrier()
        shard.received = dict.fromkeys(shard.received, 0)
        began = time.process_time(), time.perf_counter()
        layer(*qkv.unbind(2)).sum().backward()
        cpu.append(time.process_time() - began[0])
        wall.append(time.perf_counter() - began[1])
    # The first round connects the processes.
    return {"cpu": statistics.median(cpu[1:]), "wall": statistics.median(wall[1:]), "received": shard.received}


def on_ranks(tokens: int, ranks: int, rounds: int) -> dict[str, Any]:
    """Start the ranks and take the slowest."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--tokens", str(tokens), "--rounds", str(rounds), "--worker", str(ranks)]
    started = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    found = [json.loads(process.communicate()[0]) for process in started]
    assert all(one["received"] == found[0]["received"] for one in found), "ranks of one segment receive equally much"
    return {
        "ranks": ranks,
        "tokens": tokens * ranks,
        "cpu_seconds": max(one["cpu"] for one in found),
        "wall_seconds": max(one["wall"] for one in found),
        "forward": found[0]["received"]["all_gather"],
        "backward": found[0]["received"]["reduce_scatter"],
    }


def counted(tokens: int, ranks: int) -> dict[str, Any]:
    """What ranks that are threads receive."""

    def rank(shard: threads.ThreadShard) -> tuple[int, int]:
        layer = backend(tokens, ranks)
        bind(layer, shard)
        qkv = torch.randn(1, tokens, 3, HEADS, HEAD_DIM, requires_grad=True)
        out = layer(*qkv.unbind(2))
        forward = shard.received
        out.sum().backward()
        return forward, shard.received - forward

    (once,) = set(threads.run(ranks, rank))
    return {"ranks": ranks, "tokens": tokens * ranks, "forward": once[0], "backward": once[1]}


def line(row: dict[str, Any], times: str, expected: float) -> str:
    """A row of the table."""
    return f"{row['ranks']:5} {row['tokens']:10,} {times} {row['forward']:13,} {row['backward']:13,} {expected:13,.0f}"


def main() -> None:
    parser = measure.bare_parser(__doc__, "parallel")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens on each rank, a power of two from 4096")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    options = measure.options(parser)
    if options.worker:
        ranks, rank = options.worker
        print(json.dumps(work(options.tokens, ranks, rank, options.rounds)))
        return
    rows = [on_ranks(options.tokens, ranks, options.rounds) for ranks in options.ranks]
    print(f"{measure.machine(torch.device('cpu'))}, gloo")
    print(f"{options.tokens:,} tokens per rank, {HEADS} heads of {HEAD_DIM}, float32, one thread per rank, medians\n")
    print("ranks     tokens   CPU s   ratio  wall s  received fwd  received bwd       formula       Ulysses")
    for row in rows:
        expected = formula(options.tokens, row["ranks"])
        ratio = row["cpu_seconds"] / rows[0]["cpu_seconds"]
        times = f"{row['cpu_seconds']:7.3f} {ratio:7.2f} {row['wall_seconds']:7.3f}"
        print(line(row, times, expected), f"{ulysses(options.tokens, row['ranks']):13,.0f}")
        assert row["forward"] == row["backward"] == expected
    small = max(256, options.tokens // 64)  # from there on 32 ranks hold whole strides
    print(f"\ncounted on threads, {small:,} tokens per rank")
    for ranks in (1, 2, 4, 8, 16, 32):
        row = counted(small, ranks)
        print(line(row, " " * 23, formula(small, ranks)))
        assert row["forward"] == row["backward"] == formula(small, ranks)
        rows.append(row)
    timed = [row for row in rows if "cpu_seconds" in row]
    counts = [row["ranks"] for row in timed]
    traded = [ulysses(options.tokens, count) for count in counts]
    series = {
        "dilated": (counts, {"elements received": [row["forward"] for row in timed]}),
        "head all-to-alls": (counts, {"elements received": traded}),
        "slowest rank": (counts, {"CPU seconds": [row["cpu_seconds"] for row in timed]}),
    }
    measure.draw_lines(series, options.plot, "ranks")
    measure.write(options.json, torch.device("cpu"), timed=timed, counted=rows[len(timed) :])


if __name__ == "__main__":
    main()
