"""Token ids on disk: flat files of little-endian unsigned integers, written once and read through a memory map.

Every block of 1 MiB has a CRC-32, checked when a process first reads from it. Which files belong together is the
cache's business.
"""

from __future__ import annotations

import bisect
import os
import re
import zlib
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from longnet_kit.data.errors import DataError

BLOCK = 1 << 20
"""Bytes under one checksum."""
SHARD = 64 << 20
"""Tokens in a file; the last one of a split holds fewer."""

Tokens = np.ndarray[Any, np.dtype[Any]]


class Writer:
    """Write one split, a file per `SHARD` tokens. Nothing is kept but one block's checksum.

    Args:
        folder: where the files go.
        split: the first part of their names.
        dtype: of the ids in the files, as numpy writes it: `<u2` or `<u4`.
    """

    def __init__(self, folder: Path, split: str, dtype: str) -> None:
        self.tokens = 0
        self.text_bytes = 0
        self.documents = 0
        self._folder = folder
        self._split = split
        self._dtype = np.dtype(dtype)
        self._shards: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._crc = self._filled = 0

    def append(self, ids: Tokens) -> None:
        """Write token ids, (n,) of any integer type, at the end."""
        while len(ids):
            if self._file is None or self._shards[-1]["tokens"] == SHARD:
                self._next_file()
            shard = self._shards[-1]
            now, ids = np.split(ids, [SHARD - shard["tokens"]])
            self._write(now.astype(self._dtype).tobytes())
            shard["tokens"] += len(now)
            self.tokens += len(now)

    def close(self) -> dict[str, Any]:
        """Flush to disk; returns what the manifest holds of this split."""
        self._end_file()
        return {
            "tokens": self.tokens,
            "bytes": self.text_bytes,
            "documents": self.documents,
            "shards": self._shards,
        }

    def _next_file(self) -> None:
        self._end_file()
        name = f"{self._split}-{len(self._shards):05d}.bin"
        self._shards.append({"file": name, "tokens": 0, "crc32": ""})
        self._file = (self._folder / name).open("wb", buffering=BLOCK)

    def _write(self, raw: bytes) -> None:
        assert self._file is not None
        self._file.write(raw)
        rest = memoryview(raw)
        while rest:
            now, rest = rest[: BLOCK - self._filled], rest[BLOCK - self._filled :]
            self._crc = zlib.crc32(now, self._crc)
            self._filled += len(now)
            if self._filled == BLOCK:
                self._end_block()

    def _end_block(self) -> None:
        if self._filled:
            self._shards[-1]["crc32"] += f"{self._crc:08x}"
        self._crc = self._filled = 0

    def _end_file(self) -> None:
        if self._file is not None:
            self._end_block()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._file = None


class Reader:
    """The tokens of one split, as one long array.

    Args:
        folder: where the files are.
        entry: what the manifest holds of the split.
        dtype: of the ids in the files.

    Raises:
        DataError: a file is missing, or not as long as it was when written.
    """

    def __init__(self, folder: Path, entry: Mapping[str, Any], dtype: str) -> None:
        self.documents: int = entry["documents"]
        self.text_bytes: int = entry["bytes"]
        self._dtype = np.dtype(dtype)
        self._paths = [folder / shard["file"] for shard in entry["shards"]]
        self._lengths: list[int] = [shard["tokens"] for shard in entry["shards"]]
        self._starts = [0, *accumulate(self._lengths)]
        self._maps: dict[int, Tokens] = {}
        self._checked: dict[int, Tokens] = {}
        for shard in range(len(self._paths)):
            self._check_length(shard)
        self._checksums = [self._block_checksums(i, shard["crc32"]) for i, shard in enumerate(entry["shards"])]

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Tokens `start` to `start + count`: (count,) int64.

        Raises:
            IndexError: some of them are beyond the end.
            DataError: a block that holds some of them is damaged.
        """
        if not 0 <= start <= start + count <= len(self):
            raise IndexError(f"tokens {start} to {start + count} of {len(self)}")
        tokens = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            shard = bisect.bisect_right(self._starts, start + done) - 1
            first = start + done - self._starts[shard]
            last = min(first + count - done, self._lengths[shard])
            tokens[done : done + last - first] = self._sound(shard, first, last)
            done += last - first
        return tokens

    def _sound(self, shard: int, first: int, last: int) -> Tokens:
        """Tokens `first` to `last` of one file, their blocks checked where they had not been before."""
        if shard not in self._maps:
            try:
                self._maps[shard] = np.memmap(self._paths[shard], dtype=self._dtype, mode="r")
            except (OSError, ValueError) as error:
                raise self._damage(shard, f"cannot be read ({error})") from error
            self._checked[shard] = np.zeros(len(self._checksums[shard]), dtype=bool)
        tokens, checked = self._maps[shard], self._checked[shard]
        per_block = BLOCK // self._dtype.itemsize
        for block in range(first // per_block, (last - 1) // per_block + 1):
            if not checked[block]:
                self._check_length(shard)  # touching a page beyond the end would kill the process
                content: Any = tokens[block * per_block : (block + 1) * per_block]
                if zlib.crc32(content) != self._checksums[shard][block]:
                    raise self._damage(shard, f"was changed or damaged near byte {block * BLOCK} (checksum)")
                checked[block] = True
        return tokens[first:last]

    def _block_checksums(self, shard: int, digits: str) -> Tokens:
        blocks = -(-self._lengths[shard] * self._dtype.itemsize // BLOCK)
        if not re.fullmatch(r"[0-9a-f]*", digits) or len(digits) != 8 * blocks:
            raise self._damage(shard, f"needs {blocks} checksums, but the manifest has {digits[:60]!r}")
        return np.frombuffer(bytes.fromhex(digits), dtype=">u4")

    def _check_length(self, shard: int) -> None:
        expected = self._lengths[shard] * self._dtype.itemsize
        try:
            actual = self._paths[shard].stat().st_size
        except (OSError, ValueError) as error:  # ValueError: no file can have such a name
            raise self._damage(shard, f"cannot be read ({getattr(error, 'strerror', error)})") from error
        if actual != expected:
            raise self._damage(shard, f"has {actual} bytes, but was written with {expected}")

    def _damage(self, shard: int, what: str) -> DataError:
        path = self._paths[shard]
        return DataError(f"{path} {what}; delete the folder {path.parent}, and the next start builds it anew")

    def __getstate__(self) -> dict[str, Any]:
        """Without the maps, which pickle as whole arrays; the other process opens its own."""
        return {**self.__dict__, "_maps": {}, "_checked": {}}
