"""The token cache: it is there whole or not at all, and what is read from it is what was written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longnet_kit.data import DataError, Document, cache, shards, tokenizers
from longnet_kit.data.sources import SPLITS, split_of
from tests.data.corpus import Given, counted

BYTES = tokenizers.build("bytes")


class Wide(tokenizers.Bytes):
    """Bytes under ids that need more than 16 bits."""

    name = fingerprint = "wide"
    vocab_size = 100_300
    eos = 100_256

    def encode(self, text: str | bytes) -> Any:
        return super().encode(text) + 100_000


@given(
    documents=st.lists(
        st.tuples(st.text(max_size=60), st.sampled_from([*SPLITS, None]), st.booleans()), min_size=1, max_size=12
    ),
    shard=st.integers(1, 50),
    block=st.integers(1, 16),
    wide=st.booleans(),
    draw=st.data(),
)
def test_what_is_read_is_what_was_written(
    documents: list[Any], shard: int, block: int, wide: bool, draw: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tokenizer = Wide() if wide else BYTES
    given = [Document(f"{i}", text, split, ends) for i, (text, split, ends) in enumerate(documents)]
    expected: dict[str, list[int]] = {split: [] for split in SPLITS}
    for d in given:
        into = expected[d.split or split_of(d.name)]
        into += tokenizer.encode(d.content).tolist()
        if d.ends and into and into[-1] != tokenizer.eos:  # what is empty is no document
            into.append(tokenizer.eos)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD", shard)
        patch.setattr(shards, "BLOCK", 4 * block)
        opened = cache.TokenCache(cache.build(Given(given), tokenizer, tmp_path_factory.mktemp("cache")))
        for split in SPLITS:
            reader = opened.splits[split]
            assert len(reader) == len(expected[split])
            whole = reader.read(0, len(reader))
            assert whole.tolist() == expected[split] and whole.dtype == np.int64
            start = draw.draw(st.integers(0, len(reader)))
            count = draw.draw(st.integers(0, len(reader) - start))
            assert reader.read(start, count).tolist() == expected[split][start : start + count]
            copy = pickle.loads(pickle.dumps(reader))
            assert copy.read(start, count).tolist() == expected[split][start : start + count]
    for split in SPLITS:
        assert opened.splits[split].text_bytes == sum(
            len(d.content.encode()) for d in given if (d.split or split_of(d.name)) == split
        )
        assert opened.splits[split].documents == expected[split].count(tokenizer.eos)


def test_reading_beyond_the_end_raises(tmp_path: Path) -> None:
    reader = cache.TokenCache(cache.build(counted({"train": 9}), BYTES, tmp_path)).splits["train"]
    assert len(reader) == 10
    for start, count in ((-1, 2), (10, 1), (0, 11), (3, -1)):
        with pytest.raises(IndexError):
            reader.read(start, count)


def test_a_pickled_reader_carries_no_tokens(tmp_path: Path) -> None:
    reader = cache.TokenCache(cache.build(counted({"train": 1_000_000}), BYTES, tmp_path)).splits["train"]
    reader.read(0, 10)
    assert len(pickle.dumps(reader)) < 3000


@pytest.mark.parametrize(("tokenizer", "dtype"), [(BYTES, "<u2"), (Wide(), "<u4")])
def test_ids_take_two_bytes_where_they_fit(tokenizer: tokenizers.Tokenizer, dtype: str, tmp_path: Path) -> None:
    folder = cache.build(counted({"train": 99}), tokenizer, tmp_path)
    assert json.loads((folder / "manifest.json").read_text())["dtype"] == dtype
    assert (folder / "train-00000.bin").stat().st_size == 100 * int(dtype[-1])


def test_a_cache_is_built_once_for_a_source_and_a_tokenizer(tmp_path: Path) -> None:
    source = counted({"train": 100})
    folder = cache.build(source, BYTES, tmp_path)
    assert cache.build(source, BYTES, tmp_path) == folder and source.calls == 1
    others = [cache.build(source, Wide(), tmp_path), cache.build(Given(source.given, version=1), BYTES, tmp_path)]
    assert len({folder, *others}) == 3 and source.calls == 2
    assert folder.name.startswith("given-bytes-")


def test_the_cache_lives_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.setenv("LONGNET_CACHE", "~/elsewhere")
    assert cache.directory() == Path("/home/x/elsewhere")
    monkeypatch.setenv("LONGNET_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.directory() == Path("/xdg/longnet_kit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.directory() == Path("/home/x/.cache/longnet_kit")


class Interrupted(Given):
    """Fails after its documents."""

    error: BaseException = KeyboardInterrupt()

    def documents(self, as_bytes: bool) -> Iterator[Document]:
        yield from super().documents(as_bytes)
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("x"), MemoryError()])
def test_an_interrupted_build_leaves_nothing_behind(error: BaseException, tmp_path: Path) -> None:
    source = Interrupted([Document("a", "text" * 99, "train")])
    source.error = error
    with pytest.raises(type(error)):
        cache.build(source, BYTES, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert not cache.folder_of(source, BYTES, tmp_path).exists()


SLOW = """
    import sys, time
    from pathlib import Path
    from longnet_kit.data import Document, Source, cache, tokenizers

    class Slow(Source):
        def __init__(self, seconds): self.seconds = seconds
        def fingerprint(self): return "slow"
        def documents(self, as_bytes):
            yield Document("a", "text" * 1_000_000, "train")
            print("reading", flush=True)
            time.sleep(self.seconds)
            yield Document("b", "more", "train")

    print(cache.build(Slow(float(sys.argv[2])), tokenizers.build("bytes"), Path(sys.argv[1])).name, flush=True)
"""


def slow_build(folder: Path, seconds: float) -> subprocess.Popen[str]:
    """Another process that builds a cache, and sleeps in the middle of it."""
    command = [sys.executable, "-c", textwrap.dedent(SLOW), str(folder), str(seconds)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.skipif(sys.platform == "win32", reason="processes are not killed that way there")
def test_a_killed_build_is_repaired_by_the_next(tmp_path: Path) -> None:
    killed = slow_build(tmp_path, 60)
    assert killed.stdout is not None and killed.stdout.readline() == "reading\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    left = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(left) == 1 and ".building-" in left[0].name
    output, _ = slow_build(tmp_path, 0).communicate(timeout=60)
    folder = tmp_path / output.split()[-1]
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder]
    assert len(cache.TokenCache(folder).splits["train"]) == 4_000_000 + 1 + 4 + 1


def test_of_two_builds_at_once_one_waits(tmp_path: Path) -> None:
    both = [slow_build(tmp_path, 1), slow_build(tmp_path, 1)]
    outputs = [build.communicate(timeout=60)[0].split() for build in both]
    assert sorted(map(len, outputs)) == [1, 2], "only one of them reads the documents"
    assert outputs[0][-1] == outputs[1][-1] and cache.TokenCache(tmp_path / outputs[0][-1]).identity


def test_without_locks_the_later_build_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)

    class Overtaken(Given):
        def documents(self, as_bytes: bool) -> Iterator[Document]:
            yield from super().documents(as_bytes)
            if self.calls == 1:
                cache.build(self, BYTES, tmp_path)

    source = Overtaken([Document("a", "text", "train")])
    folder = cache.build(source, BYTES, tmp_path)
    assert source.calls == 2
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder]
    assert len(cache.TokenCache(folder).splits["train"]) == 5


def test_data_that_changes_while_it_is_read_is_not_cached(tmp_path: Path) -> None:
    class Changing(Given):
        def documents(self, as_bytes: bool) -> Iterator[Document]:
            yield from super().documents(as_bytes)
            self.version += 1

    with pytest.raises(DataError, match="changed while it was read"):
        cache.build(Changing([Document("a", "text", "train")]), BYTES, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


BLOCK = 256


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of small blocks and shards, with which the readers of this module agree."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "BLOCK", BLOCK)
        patch.setattr(shards, "SHARD", 1000)
        yield cache.build(counted({"train": 3500, "val": 300, "test": 300}), BYTES, tmp_path_factory.mktemp("sound"))


@settings(max_examples=60)
@given(draw=st.data())
def test_every_changed_byte_is_found(sound: Path, draw: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("changed") / sound.name
    shutil.copytree(sound, folder)
    victim = draw.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    raw = bytearray((folder / victim).read_bytes())
    change = draw.draw(st.sampled_from(["flip", "cut", "grow", "remove"]))
    place = draw.draw(st.integers(0, len(raw) - 1))
    if change == "flip":
        raw[place] ^= 1 << draw.draw(st.integers(0, 7))
    elif change == "cut":
        del raw[place:]
    else:
        raw += b"\0"
    (folder / victim).write_bytes(raw)
    if change == "remove":
        (folder / victim).unlink()
    if victim == "manifest.json" and change == "grow":
        raw[-1] = ord(" ")  # white space behind a JSON object is no change
        (folder / victim).write_bytes(raw)
        assert cache.TokenCache(folder).identity == cache.TokenCache(sound).identity
        return
    with pytest.raises(DataError) as raised:
        for reader in cache.TokenCache(folder).splits.values():
            reader.read(0, len(reader))
    assert f"{folder / victim} " in str(raised.value)
    assert f"delete the folder {folder}" in str(raised.value)


def test_only_blocks_that_are_read_are_checked(sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / sound.name
    shutil.copytree(sound, folder)
    path = folder / "train-00001.bin"
    raw = bytearray(path.read_bytes())
    raw[3 * BLOCK] ^= 1
    path.write_bytes(raw)
    reader = cache.TokenCache(folder).splits["train"]
    per_block = BLOCK // 2
    reader.read(0, 1000 + 3 * per_block)
    reader.read(1000 + 4 * per_block, 1000)
    for start in (1000 + 3 * per_block, 1000 + 4 * per_block - 1):
        with pytest.raises(DataError, match=r"train-00001\.bin was changed or damaged near byte 768"):
            reader.read(start, 1)


def test_a_block_is_checked_once(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = cache.TokenCache(sound).splits["train"]
    checked: list[int] = []
    crc32 = shards.zlib.crc32
    monkeypatch.setattr(shards.zlib, "crc32", lambda block: checked.append(len(block)) or crc32(block))
    for _ in range(3):
        reader.read(0, 3 * BLOCK // 2)
        reader.read(BLOCK // 2, BLOCK)
    assert checked == [BLOCK // 2] * 3


def test_lengths_are_checked_when_a_cache_is_opened(sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / sound.name
    shutil.copytree(sound, folder)
    os.truncate(folder / "train-00003.bin", 1000)
    with pytest.raises(DataError, match=r"train-00003\.bin has 1000 bytes, but was written with 1002"):
        cache.TokenCache(folder)


def test_a_file_that_is_cut_while_it_is_open_does_not_kill_the_process(sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / sound.name
    shutil.copytree(sound, folder)
    reader = cache.TokenCache(folder).splits["train"]
    reader.read(0, 1)
    os.truncate(folder / "train-00000.bin", 10)
    with pytest.raises(DataError, match="has 10 bytes, but was written with 2000"):
        reader.read(500, 10)


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist: the data was not prepared"):
        cache.TokenCache(tmp_path / "nowhere")


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written .*LONGNET_CACHE"):
        cache.build(counted({"train": 9}), BYTES, tmp_path / "file")

    def full(self: shards.Writer, raw: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.Writer, "_write", full)
    with pytest.raises(DataError, match="No space left on device.*free space there"):
        cache.build(counted({"train": 9}), BYTES, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.parametrize("content", [b"\xff\xfe", "a\ud800"])
def test_a_document_that_is_no_text_is_named(content: Any, tmp_path: Path) -> None:
    class Text(Wide):
        takes_bytes = False

    with pytest.raises(DataError, match="the-name is no valid text"):
        cache.build(Given([Document("the-name", content)]), Text(), tmp_path)


def test_errors_of_a_plug_in_are_not_taken_for_the_cache(tmp_path: Path) -> None:
    source = Interrupted([])
    source.error = ConnectionError("refused")
    with pytest.raises(DataError, match="the data of given cannot be read: refused"):
        cache.build(source, BYTES, tmp_path)

    class Beyond(Wide):
        vocab_size = 50

    with pytest.raises(DataError, match="gave the id 100120, beyond its 50 tokens"):
        cache.build(Given([Document("a", "x")]), Beyond(), tmp_path)
    with pytest.raises(DataError, match="fingerprint of .*Given must hold plain values"):
        cache.build(Given([], version=object()), BYTES, tmp_path)


def test_progress_is_shown_for_long_builds_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = [Document(str(i), "text") for i in range(40)]
    cache.build(Given(documents), BYTES, tmp_path)
    assert capsys.readouterr().err == ""
    clock = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    cache.build(Given(documents, version=1), BYTES, tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith("tokenizing given: 0.0 million tokens") for line in lines)


def test_building_holds_a_part_of_the_text_in_memory(tmp_path: Path) -> None:
    script = """
        import resource, sys
        from pathlib import Path
        from longnet_kit.data import cache, tokenizers
        from longnet_kit.data.files import Files
        path = Path(sys.argv[1]) / "large.txt"
        with path.open("w") as file:
            for i in range(200):
                file.write(f"{i} " * 200_000 + "\\n")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        folder = cache.build(Files([str(path)]), tokenizers.build("bytes"), Path(sys.argv[1]))
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(path.stat().st_size >> 20, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    text, used = map(int, subprocess.check_output(command, text=True, env=environment).split())
    assert text > 130 and used < 80, f"{used} MiB for {text} MiB of text"
