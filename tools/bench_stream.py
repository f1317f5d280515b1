"""What a token costs far into a stream beside one near its beginning.

    .venv/bin/python tools/bench_stream.py
    .venv/bin/python tools/bench_stream.py --run RUN --stream DIRECTORY --text FILE

Without a run: one token at a time through a network of the paper's branches, from a prompt that has just filled the
caches, and from the same state at position 100,000,000 (advanced, not replayed; the same phase in every segment), in
turns. With one: the chunks of a text through the run's network, at the beginning of a stream and behind the saved state
of DIRECTORY, where `longnet stream` has left it, in turns; and the curve of that stream is drawn.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from pathlib import Path
from typing import Any

import measure
import torch

from longnet_kit import host_memory
from longnet_kit.inference import network
from longnet_kit.model import Transformer
from longnet_kit.model.cache import StreamCache
from longnet_kit.model.loss import token_losses

BRANCHES = {"segment_lengths": [2048, 4096, 8192, 16384, 32768], "dilation_rates": [1, 2, 4, 6, 12]}
FAR = 100_000_000


def main() -> None:
    parser = measure.bare_parser(__doc__, "stream")
    parser.add_argument("--tokens", type=int, default=64, help="drawn one at a time in each round")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--longest", type=int, default=32_768, help="leave out longer branches")
    parser.add_argument("--run", help="a run or an exported file")
    parser.add_argument("--stream", type=Path, help="the folder of one of its streams")
    parser.add_argument("--text", type=Path, help="what both read")
    parser.add_argument("--chunk", type=int, default=16_384)
    given = measure.options(parser)
    if given.run is None:
        rows = one_token(given)
    else:
        rows = both_ends(given)
        draw(given.stream / "curve.csv", given.plot)
    measure.show(rows)
    measure.write(given.json, torch.device("cpu"), rows=rows)


def one_token(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds and bytes of a token behind 32,768 and behind 100,000,000."""
    kept = [(w, r) for w, r in zip(*BRANCHES.values(), strict=True) if w <= given.longest]
    lengths, rates = (list(numbers) for numbers in zip(*kept, strict=True))
    torch.manual_seed(0)
    model = Transformer(
        257, dim=given.dim, layers=given.layers, heads=given.heads, ffn_dim=4 * given.dim, seq_len=given.longest,
        attention={"backend": "dilated", "segment_lengths": lengths, "dilation_rates": rates},
    ).eval()  # fmt: skip
    period = max(lengths)
    near = period - 2 * given.tokens  # nearly all entries are there, and no segment ends while tokens are drawn
    prompt = torch.randint(257, (1, near))
    caches = {"just filled": model.new_cache(1), "far": model.new_cache(1)}
    for part in prompt.split(8192, 1):
        model.hidden(part, cache=caches["just filled"])
    state = caches["just filled"].state_dict()
    caches["far"].load_state_dict(state)
    positions = {"just filled": near, "far": near + -(-(FAR - near) // period) * period}
    tokens = torch.randint(257, (given.tokens, 1, 1))

    def draw_from(name: str) -> None:
        move(caches[name], positions[name])
        for token in tokens:
            model(token, cache=caches[name])

    times = measure.in_turns({name: lambda n=name: draw_from(n) for name in caches}, given.rounds, torch.device("cpu"))
    peaks = {name: measure.peak(lambda n=name: draw_from(n), torch.device("cpu")) for name in caches}
    first = times["just filled"]
    return [
        {
            "behind": name,
            "position": positions[name],
            "ms a token": statistics.median(times[name]) * 1e3 / given.tokens,
            "of first": measure.ratio(times[name], first),
            "cache MB": cache.nbytes / 1e6,
            "peak beyond MB": peaks[name] / 1e6,
        }
        for name, cache in caches.items()
    ]


def both_ends(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens per second at the beginning of a stream and behind a saved state."""
    state = torch.load(given.stream / "state.pt", weights_only=True)["cache"]
    trained = network.load(given.run, reach=max(state["config"]["attention"]["segment_lengths"]))
    ids = torch.from_numpy(trained.tokenizer.encode(given.text.read_bytes()).astype("int64"))
    chunks = ids[: len(ids) // given.chunk * given.chunk].view(-1, 1, given.chunk)
    with trained.computing():
        caches = {"the beginning": trained.network.new_cache(1), "the end": trained.network.new_cache(1)}
        caches["the end"].load_state_dict(state)

        def read(name: str) -> None:
            for chunk in chunks:
                token_losses(trained.network.hidden(chunk, cache=caches[name]), trained.network.embedding.weight, chunk)

        positions = {name: cache.position for name, cache in caches.items()}
        times = measure.in_turns({name: lambda n=name: read(n) for name in caches}, given.rounds, torch.device("cpu"))
    return [
        {
            "at": name,
            "from position": positions[name],
            "tokens a second": chunks.numel() / statistics.median(times[name]),
            "of first": measure.ratio(times["the beginning"], times[name]),
            "anonymous MB": (host_memory.anonymous() or 0) / 1e6,
        }
        for name in caches
    ]


def move(cache: StreamCache, position: int) -> None:
    """Put a cache to another position of the same phase: what it holds stays."""
    cache.position = position
    for layer in cache.layers:
        layer.position = position


def draw(curve: Path, path: Path) -> None:
    """What a stream measured, over its position."""
    with curve.open() as file:
        rows = [row for row in csv.DictReader(file) if row["bits_per_byte"]]
    quantities = ("bits_per_byte_overall", "bits_per_byte", "tokens_per_second", "memory")
    values = {quantity: [float(row[quantity]) for row in rows] for quantity in quantities if quantity in rows[0]}
    measure.draw_lines({"stream": ([int(row["step"]) for row in rows], values)}, path, "tokens")


if __name__ == "__main__":
    main()
