"""Reading text of any length as one sequence: `longnet stream`.

The network takes chunk after chunk on a cache of its past. What was measured and all that it takes to go on are saved
now and then, at a chunk's end; given the same command again, a stream goes on there, and ends in the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from longnet_kit import host_memory, runs, signals, terminal, weights
from longnet_kit.data import tokenizers
from longnet_kit.errors import UserError
from longnet_kit.inference import CHUNK, network, progress, stream_report
from longnet_kit.inference.corpus import Corpus, Errors, Place, Reader, Tokens, joined
from longnet_kit.inference.network import Trained
from longnet_kit.inference.score import Decade, Score
from longnet_kit.inference.stream_files import StreamFiles
from longnet_kit.model.cache import StreamCache, fingerprint
from longnet_kit.model.loss import IGNORED, token_losses
from longnet_kit.report import table

MOST_TOKENS = 10**15
"""Of a stream: what a branch as long could be counted in still."""
SAVE_EVERY = 60.0
"""Seconds between two saves, more where saving takes long."""
LONGEST_INTERVAL = 2**20
"""Tokens between two points of the curve, at most; near the beginning they are closer."""


class Result(NamedTuple):
    """What came of a stream."""

    directory: Path
    tokens: int
    score: Score
    seconds: float
    """Of reading, over all sessions."""
    signum: int
    """The signal that ended it; 0 for none."""


@terminal.outliving()
def stream(
    source: str | Path,
    files: Sequence[str],
    *,
    tokens: int | None = None,
    repeat: bool = False,
    extend: bool = False,
    chunk: int = CHUNK,
    errors: Errors = "strict",
    max_cached: int | None = None,
    output: str | Path | None = None,
    device: str | None = None,
) -> Result:
    """Read files as one sequence and measure how well each token is predicted from those before.

    Args:
        source: a run or an exported file, see `network.load`.
        files: files or patterns, of text, code or JSON lines.
        tokens: where to end; None: where the files do.
        repeat: read the files again where they end before that.
        extend: add branches to the trained ones until a token sees back to the beginning.
        chunk: tokens that go through the network at a time: memory grows with it, and results differ by rounding.
        errors: what to do with text that is not UTF-8.
        max_cached: the limit of a cache that keeps every token.
        output: the folder for results and state; by default one beside the weights, named by what is read.
        device: see `network.load`.

    Raises:
        UserError: something of this cannot be used, or the stream outgrows its cache or its position embedding.
    """
    for name, value in (("--tokens", tokens), ("--chunk", chunk), ("--max-cached", max_cached)):
        if value is not None and not 1 <= value <= MOST_TOKENS:
            raise UserError(f"{name} {value}: expected 1 to {MOST_TOKENS:,}")
    if repeat and tokens is None:
        raise UserError("--repeat never ends by itself; say where to end with --tokens")
    corpus = Corpus(files, tokenizers.build(network.find(source, lambda _: None)[0].data.tokenizer), errors, repeat)
    if not corpus.size:
        raise UserError(f"{', '.join(corpus.names)}: there is no text in it")
    ends = [n for n in (tokens, None if repeat else corpus.most_tokens) if n is not None]
    trained = network.load(source, reach=min(ends) if extend else None, device=device)
    identity = _identity(trained, corpus)
    directory = _directory(trained, identity, corpus.label) if output is None else Path(output)
    with trained.computing():
        cache = trained.network.new_cache(1, max_tokens=max_cached)
        if max_cached is not None and cache.max_tokens is None:
            terminal.say("note: --max-cached has no effect: the cache of this model does not grow")
        total = min((n for n in (tokens, None if repeat else corpus.tokens) if n is not None), default=None)
        if total is not None and (repeat or corpus.tokens is not None):  # else the files may end before it
            cache.check_room(total)
        with StreamFiles.claim(directory, identity) as kept:
            return _Reading(trained, corpus, cache, chunk, kept).run(tokens, total)


class _Reading:
    """A stream under way."""

    def __init__(self, trained: Trained, corpus: Corpus, cache: StreamCache, chunk: int, kept: StreamFiles) -> None:
        self._trained, self._corpus, self._cache, self._chunk, self._kept = trained, corpus, cache, chunk, kept
        self._score, self._since = Score(), Decade()  # of all, and of what came after the last point of the curve
        self._ahead = Tokens.of()  # the token that was last to be predicted, and is the next to be read
        self._place = Place()
        self._counted = 0  # tokens whose losses are in the score: those in the cache, but after an error
        self._seconds, self._pointed = 0.0, _Point(0, 0.0)
        self._memory = 0
        if kept.state is not None:
            self._go_on(kept.state)

    def run(self, tokens: int | None, total: int | None) -> Result:
        """Read to the end of the files, or until so many tokens were read; `total` is what that will be, if known."""
        cache, listener = self._cache, signals.Listener()
        if tokens is not None and cache.position >= tokens:
            raise UserError(
                f"--tokens {tokens}: {cache.position:,} were read into {self._kept.directory} before; give more, or "
                "another folder with --output"
            )
        self._kept.begin()
        terminal.say(stream_report.opening(self._trained, self._corpus, self._chunk, cache, self._kept.directory))
        reader = self._corpus.reader(self._place)
        saved, next_save = time.monotonic(), SAVE_EVERY
        is_through = False
        with (
            listener.listening(),
            progress.Reading(total, cache.position) as bar,
            self._saving_before_errors(),
        ):
            while not (is_through := self._read_chunk(reader, tokens)):
                bar.update(cache.position, self._words())
                if listener.received:
                    self._save()
                    break
                if time.monotonic() - saved > next_save:
                    next_save, saved = max(SAVE_EVERY, 20 * self._save()), time.monotonic()
        return self._finish(0 if is_through else listener.received, tokens)

    def _read_chunk(self, reader: Reader, tokens: int | None) -> bool:
        """Read the next chunk; whether it was the last."""
        began = time.monotonic()
        left = math.inf if tokens is None else tokens - self._cache.position
        inputs = int(min(self._chunk, left))
        wanted = inputs + (left > inputs)  # one more, for the last one to predict
        taken = joined([self._ahead, reader.take(wanted - self._ahead.count)])
        is_last = taken.count <= inputs
        if is_last:
            self._save()  # with a higher --tokens, or --repeat, it goes on from here, as if it had not ended
        if taken.count:
            self._read(taken, inputs)
            self._place = reader.place
            self._seconds += time.monotonic() - began
            self._point(is_last)
        return is_last

    @contextmanager
    def _saving_before_errors(self) -> Iterator[None]:
        """Where reading ends in an error between two chunks, keep what was read."""
        try:
            yield
        except ValueError:
            if self._cache.position == self._counted > 0:
                self._save()
                terminal.say(f"saved       after {self._counted:,} tokens; the same command goes on from there")
            raise

    def _read(self, taken: Tokens, inputs: int) -> None:
        """Take the first `inputs` tokens through the network; what comes behind them is predicted too."""
        first, model = self._cache.position, self._trained.network
        ids = torch.from_numpy(taken.ids).to(self._trained.device)
        targets = torch.full_like(ids[:inputs], IGNORED)
        targets[: len(ids) - 1] = ids[1:]
        hidden = model.hidden(ids[None, :inputs], cache=self._cache)
        losses = token_losses(hidden, model.head_weight, targets[None], model.loss_chunk)
        nats = losses[0, : len(ids) - 1].double().cpu().numpy()
        if not np.isfinite(nats).all():
            where = first + 1 + int(np.flatnonzero(~np.isfinite(nats))[0])
            raise UserError(f"the loss of the token at position {where:,} is not finite; the weights may be spoilt")
        self._score.add(first + 1, nats, taken.text_bytes[1:])
        self._since.add(nats, taken.text_bytes[1:])
        self._ahead = taken.part(slice(inputs, None))
        self._counted = self._cache.position

    def _point(self, is_last: bool) -> None:
        """Add a point to the curve if one is due.

        The last point comes after any number of tokens. After fewer than half of an interval it has no bits per byte of
        its own, which would be noise that reads like a change.
        """
        position = self._cache.position
        memory = self._memory_now()
        self._memory = max(self._memory, memory or 0)
        passed = position - self._pointed.position
        interval = min(LONGEST_INTERVAL, max(self._chunk, position // 32))
        if passed < interval and not is_last:
            return
        has_own = self._since.text_bytes and (passed >= interval / 2 or position == passed)
        scalars = {"bits_per_byte": self._since.bits_per_byte} if has_own else {}
        scalars |= {
            "bits_per_byte_overall": self._score.total.bits_per_byte,
            "tokens_per_second": passed / (self._seconds - self._pointed.seconds),
            "seconds": self._seconds,
        }
        self._kept.point(position, scalars if memory is None else {**scalars, "memory": memory})
        self._pointed, self._since = _Point(position, self._seconds), Decade()

    def _memory_now(self) -> int | None:
        """Bytes, by torch on CUDA; on a CPU the process's, without files that it has mapped."""
        if self._trained.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._trained.device)
        return host_memory.anonymous()

    def _save(self) -> float:
        return self._kept.save(
            {
                "position": self._cache.position,
                "cache": self._cache.state_dict(),
                "place": list(self._place),
                "ahead": [x.tolist() for x in self._ahead],
                "score": self._score.state_dict(),
                "since": [self._since.nats, self._since.text_bytes, self._since.tokens],
                "pointed": list(self._pointed),
                "seconds": self._seconds,
                "memory": self._memory,
            }
        )

    def _go_on(self, state: dict[str, Any]) -> None:
        """Take over what `_save` saved."""
        self._cache.load_state_dict(state["cache"])
        self._counted = self._cache.position
        self._place = Place(*state["place"])
        self._ahead = Tokens.of(*state["ahead"])
        self._score = Score.of_state(state["score"])
        self._since = Decade(*state["since"])
        self._pointed = _Point(*state["pointed"])
        self._seconds, self._memory = state["seconds"], state["memory"]

    def _words(self) -> str:
        bits, rate = self._score.total.bits_per_byte, self._cache.position / self._seconds
        return f"{bits:.4f} bits per byte  {rate:,.0f} tokens/s  {table.size(self._memory)}"

    def _finish(self, signum: int, tokens: int | None) -> Result:
        """Say what came of it, and write it down."""
        position, place = self._cache.position, self._place
        if not position:
            raise UserError(f"{', '.join(self._corpus.names)}: there is no text in it")
        summary = stream_report.Summary(
            is_stopped=signum > 0,
            tokens=position,
            wanted=tokens,
            readings=place.reading + (place.document > 0 or place.token > 0),
            score=self._score,
            seconds=self._seconds,
            memory=self._memory,
            cache=self._cache.nbytes,
            added=self._trained.added,
        )
        self._kept.finish(summary.as_dict(), summary.decades, table.fenced(summary.text()))
        terminal.say(summary.text())
        return Result(self._kept.directory, position, self._score, self._seconds, signum)


class _Point(NamedTuple):
    """Where the last point of the curve is."""

    position: int
    seconds: float


def _identity(trained: Trained, corpus: Corpus) -> dict[str, Any]:
    """What makes a stream another one: weights, branches, and what is read."""
    described = {
        "weights": fingerprint(trained.network),
        "attention": trained.recipe.model.attention,
        "files": corpus.fingerprint(),
    }
    return {key: hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16] for key, value in described.items()}


def _directory(trained: Trained, identity: dict[str, Any], label: str) -> Path:
    """Where a stream's results go: into the run, or beside the exported file."""
    path = trained.weights
    is_exported = path.suffix == weights.EXPORTED
    parent = path.with_name(f"{path.stem}_streams") if is_exported else runs.of_checkpoint(path) / "streams"
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:8]
    return parent / f"{label}-{key}"
