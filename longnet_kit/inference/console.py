"""`longnet generate`: prompts in, their continuations out, while they are drawn.

Standard output holds text alone, or JSON lines; progress and rates go to standard error.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from longnet_kit import durable, terminal
from longnet_kit.data import files
from longnet_kit.data.tokenizers import Tokenizer
from longnet_kit.errors import UserError
from longnet_kit.inference import CHUNK, generate, network, progress
from longnet_kit.inference.sampling import Sampling
from longnet_kit.inference.text import TextStream

LONGEST = 1 << 30
"""The most bytes that a prompt file may have."""


@dataclass
class _Row:
    """A prompt and what came of it."""

    prompt: str
    """As text."""
    ids: list[int]
    stream: TextStream
    tokens: int = 0
    end: str = ""
    """Why it ended: `stop` (a stop string), `end_of_text` or `length`; empty while it goes on."""


def run(
    source: str | Path,
    prompts: Sequence[str] = (),
    prompt_files: Sequence[str | Path] = (),
    *,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    seed: int = 0,
    samples: int = 1,
    stop: Sequence[str] = (),
    chunk: int = CHUNK,
    max_cached: int | None = None,
    echo: bool = False,
    as_json: bool = False,
    device: str | None = None,
) -> list[str]:
    """Continue prompts and print the text as it comes, one row after the other.

    Args:
        source: a run or an exported file, see `network.load`.
        prompts, prompt_files: texts, and files of one text each (`-`: standard input); one batch together.
        samples: continuations of each prompt; those of the first prompt come first.
        stop: strings that end a row.
        echo: print the prompt before its continuation.
        as_json: print an object per row, when it has ended: `prompt`, `text`, `tokens`, `end`.
        max_new_tokens, sampling, seed, chunk, max_cached: see `generate.generate`.

    Returns:
        The text of each row.

    Raises:
        UserError: something of this cannot be used.
    """
    if "" in stop:
        raise UserError("--stop is empty; give the string that ends the text")
    if samples < 1:
        raise UserError(f"--samples {samples}: expected at least 1")
    texts = [(f"--prompt {number}", os.fsencode(text)) for number, text in enumerate(prompts, start=1)]
    texts += [(f"--prompt-file {path}", _content(path)) for path in prompt_files]
    if not texts:
        raise UserError("there is no prompt; give --prompt TEXT or --prompt-file FILE")
    for name, raw in texts:
        if not raw:
            raise UserError(f"{name} is empty; give at least one character")
    trained = network.load(source, device=device)
    rows = [
        _Row(raw.decode(errors="replace"), _encoded(name, raw, trained.tokenizer), TextStream(trained.tokenizer, stop))
        for name, raw in texts
        for _ in range(samples)
    ]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where the terminal has no such character
    longest = max(len(row.ids) for row in rows)
    began = time.monotonic()
    with progress.Reading(longest, file=sys.stderr) as bar:
        printer = _Printer(rows, echo, as_json, bar.close if sys.stdout.isatty() else lambda: None)
        generate.generate(
            trained,
            [row.ids for row in rows],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            accept=lambda i, token: printer.take(i, token, token == trained.tokenizer.eos, max_new_tokens),
            read=lambda position: bar.update(position) if position < longest else bar.close(),
            chunk=chunk,
            max_cached=max_cached,
        )
    tokens, seconds = sum(row.tokens for row in rows), time.monotonic() - began
    read = sum(len(row.ids) for row in rows)
    terminal.tell(f"{tokens:,} tokens after {read:,} of prompts in {seconds:.1f} s")
    return [row.stream.text for row in rows]


class _Printer:
    """Prints the first row that has not ended as it grows, and those after it when its turn comes."""

    def __init__(self, rows: list[_Row], echo: bool, as_json: bool, clear: Callable[[], None]) -> None:
        """`clear` makes room on the terminal before anything is printed."""
        self._rows, self._echo, self._as_json, self._clear = rows, echo, as_json, clear
        self._current, self._shown = 0, 0
        self._has_begun = False

    def take(self, number: int, token: int, is_end: bool, most: int) -> bool:
        """Note a row's next token; whether the row goes on."""
        row = self._rows[number]
        row.tokens += 1
        row.stream.add(token)
        if row.stream.is_stopped:
            row.end = "stop"
        elif is_end or row.tokens == most:
            row.stream.finish()
            row.end = "stop" if row.stream.is_stopped else "end_of_text" if is_end else "length"
        self._print()
        return not row.end

    def _print(self) -> None:
        self._clear()
        while self._current < len(self._rows):
            row = self._rows[self._current]
            if not self._as_json:
                self._show(row)
            if not row.end:
                return
            if self._as_json:
                whole = {"prompt": row.prompt, "text": row.stream.text, "tokens": row.tokens, "end": row.end}
                is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
                terminal.say(json.dumps(whole, ensure_ascii=not is_unicode), is_data=True)
            else:
                print(flush=True)
            self._current, self._shown, self._has_begun = self._current + 1, 0, False

    def _show(self, row: _Row) -> None:
        if not self._has_begun:
            self._has_begun = True
            if len(self._rows) > 1:
                terminal.say(f"--- {self._current + 1} of {len(self._rows)} ---")
            if self._echo:
                terminal.say(row.prompt, end="", is_data=True)
        terminal.say(row.stream.text[self._shown :], end="", is_data=True)
        self._shown = len(row.stream.text)


def _content(path: str | Path) -> bytes:
    try:
        if str(path) == "-":
            raw = sys.stdin.buffer.read(LONGEST + 1)
            if len(raw) > LONGEST:
                raise UserError(f"--prompt-file - has more than {LONGEST:,} bytes; give a shorter text")
        else:
            raw = durable.read(path, LONGEST)
    except OSError as error:
        raise UserError(
            f"--prompt-file {path} cannot be read ({error.strerror}); give a text file, or - for standard input"
        ) from error
    if wrong := files.not_text(Path(path), raw):
        raise UserError(f"--prompt-file {path} {wrong}")
    return raw.removeprefix(codecs.BOM_UTF8)


def _encoded(name: str, raw: bytes, tokenizer: Tokenizer) -> list[int]:
    try:
        ids = tokenizer.encode(raw if tokenizer.takes_bytes else raw.decode())
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name}: byte {error.start} (0x{raw[error.start]:02x}) is not UTF-8, which the tokenizer "
            f"{tokenizer.name} needs; give valid text, or use a model with tokenizer: bytes"
        ) from error
    if not len(ids):
        raise UserError(f"{name} holds nothing that the tokenizer {tokenizer.name} has a token for; give other text")
    return [int(i) for i in ids]
