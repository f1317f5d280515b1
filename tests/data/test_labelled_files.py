"""Files as examples: no file in two splits, every class in each, pieces that are the files again, and what is told."""

from __future__ import annotations

import os
import pickle
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longnet_kit.data import DataError
from longnet_kit.data.labelled_batches import LabelledData
from longnet_kit.data.labelled_files import (
    HELD_OUT,
    File,
    LabelledFiles,
    LabelledLibrary,
    Pieces,
    shared_out,
)
from longnet_kit.data.sources import SPLITS


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with files of two classes, of different lengths and not all of them text."""
    monkeypatch.chdir(tmp_path)
    for name, byte in (("cats", b"\xff"), ("dogs", b"d")):
        for number in range(12):
            path = Path("animals", name, f"deep/{number}.txt" if number % 2 else f"{number}.txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(byte * (50 + 37 * number))
    return tmp_path


def contents(source: Pieces) -> dict[Path, bytes]:
    """Every file of a source, put together from its pieces."""
    found: dict[Path, bytes] = {}
    for split in SPLITS:
        for index, piece in enumerate(source._pieces[split]):
            content, label = source.example(split, index)
            assert isinstance(content, bytes) and len(content) == piece.stop - piece.start and label == piece.label
            assert piece.start == len(found.get(piece.path, b"")), "pieces follow each other"
            found[piece.path] = found.get(piece.path, b"") + content
    return found


@st.composite
def files(draw: st.DrawFn) -> list[File]:
    sizes = draw(st.lists(st.integers(1, 10_000), min_size=3, max_size=60))
    return [File(f"f{i}", Path(f"f{i}"), size) for i, size in enumerate(sizes)]


@given(files())
def test_every_split_has_files_of_its_own(found: list[File]) -> None:
    """Whole files, each in one split, a tenth held out at most (but one file at least), in whatever order they come."""
    shared = shared_out(found)
    assert sorted(file for part in shared.values() for file in part) == sorted(found)
    assert all(shared[split] for split in SPLITS)
    total = sum(file.size for file in found)
    for split in ("val", "test"):
        assert len(shared[split]) == 1 or sum(file.size for file in shared[split]) <= HELD_OUT * total
    again = shared_out(found[::-1])
    assert {split: set(part) for split, part in again.items()} == {split: set(part) for split, part in shared.items()}


def test_a_folder_and_paths_are_the_same() -> None:
    of_folder = LabelledFiles(folder="animals", piece_bytes=100)
    of_paths = LabelledFiles({n: [f"animals/{n}/**/*.txt"] for n in ("cats", "dogs")}, piece_bytes=100)
    assert of_folder.classes == of_paths.classes == ("cats", "dogs")
    for source in (of_folder, of_paths):
        found = contents(source)
        assert {path.read_bytes(): path for path in found} == {content: path for path, content in found.items()}
        assert len(found) == 24
        for split in SPLITS:
            assert {piece.label for piece in source._pieces[split]} == {0, 1}
    assert of_folder.fingerprint() == of_paths.fingerprint()


def test_pieces_are_about_equally_long() -> None:
    source = LabelledFiles(folder="animals", piece_bytes=100)
    by_file: dict[Path, list[int]] = {}
    for split in SPLITS:
        for piece in source._pieces[split]:
            by_file.setdefault(piece.path, []).append(piece.stop - piece.start)
    for path, lengths in by_file.items():
        assert max(lengths) <= 100 and max(lengths) - min(lengths) <= 1
        assert len(lengths) == -(-path.stat().st_size // 100)


def test_the_fingerprint_changes_with_the_files() -> None:
    def fingerprint(**options: Any) -> Any:
        return LabelledFiles(folder="animals", **options).fingerprint()

    before = fingerprint()
    assert before == fingerprint() != fingerprint(piece_bytes=7)
    path = Path("animals/dogs/4.txt")
    os.utime(path, ns=(1, 1))
    assert fingerprint() != before


def test_the_content_is_equal_where_bytes_and_labels_are() -> None:
    def content() -> str:
        return LabelledData(LabelledFiles(folder="animals"), "bytes", seq_len=8, batch_size=4).content()

    path = Path("animals", "cats", "0.txt")
    before, stamp = content(), path.stat()
    os.utime(path, ns=(0, 0))
    assert content() == before
    path.write_bytes(b"\xfe" * stamp.st_size)
    os.utime(path, ns=(0, 0))
    assert content() != before
    path.write_bytes(b"\xff" * stamp.st_size)
    assert content() == before
    Path("animals", "cats").rename("animals/third")
    Path("animals", "dogs").rename("animals/cats")
    Path("animals", "third").rename("animals/dogs")
    assert content() != before


def test_a_class_takes_no_more_than_it_may() -> None:
    source = LabelledFiles(folder="animals", class_bytes=900)
    for label in (0, 1):
        size = sum(p.stop - p.start for split in SPLITS for p in source._pieces[split] if p.label == label)
        assert 400 < size <= 900
    assert {piece.label for piece in source._pieces["val"]} == {0, 1}


def test_a_file_that_goes_or_shrinks_is_told_of() -> None:
    source = LabelledFiles(folder="animals")
    path = source._pieces["train"][0].path
    path.write_bytes(b"d")
    with pytest.raises(DataError, match=rf"{re.escape(path.name)} became shorter while it was in use"):
        source.example("train", 0)
    path.unlink()
    with pytest.raises(DataError, match=rf"{re.escape(path.name)} cannot be read: No such file"):
        source.example("train", 0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, ["neither paths nor folder is given; give paths: {class: [files or patterns]}"]),
        ({"paths": {"a": ["x"]}, "folder": "animals"}, ["both paths and folder are given"]),
        ({"folder": "zoo"}, ["data.folder: zoo is no folder"]),
        ({"folder": "animals/dogs"}, ["data.folder: got deep; give at least two classes"]),
        ({"paths": {"dogs": ["animals/dogs/*.txt"]}}, ["data.paths: got dogs; give at least two classes"]),
        (
            {"paths": {"cats": ["no/*.txt"], "dogs": [], "birds": ["animals/birds.txt"]}},
            [
                "data.paths.cats: no file matches no/*.txt",
                "data.paths.dogs is empty; name at least one file or pattern",
                "data.paths.birds: animals/birds.txt does not exist",
            ],
        ),
        (
            {"paths": {"cats": ["animals/cats/0.txt", "animals/cats/2.txt"], "dogs": ["animals/dogs/*.txt"]}},
            ["data.paths.cats: 2 files with something in it, and train, val and test need one each"],
        ),
        ({"folder": "animals", "class_bytes": 60}, ["cats: 1 file with", "no more than data.class_bytes 60 together"]),
        (
            {"paths": {"cats": ["animals/cats/*.txt"], "dogs": ["animals/dogs/*.txt", "animals/cats/4.txt"]}},
            ["data.paths.dogs: animals/cats/4.txt is in cats too; a file has one class"],
        ),
    ],
)
def test_what_is_wrong_is_told(options: dict[str, Any], told: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        LabelledFiles(**options)
    assert [part for part in told if part not in str(caught.value)] == [], str(caught.value)


def test_empty_files_are_no_examples() -> None:
    for path in Path("animals/cats").glob("*.txt"):
        path.write_bytes(b"")
    source = LabelledFiles(folder="animals")
    assert all(piece.stop > piece.start for split in SPLITS for piece in source._pieces[split])
    for path in Path("animals/cats").rglob("*.txt"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"cats: 0 files with something in it"):
        LabelledFiles(folder="animals")


def test_copies_of_a_file_are_one_example() -> None:
    """Else a split would be tested on what another was trained on; of two classes, the bytes tell neither."""
    before = LabelledFiles(folder="animals")
    for number in range(20):
        Path(f"animals/cats/copy {number}").write_bytes(Path("animals/cats/4.txt").read_bytes())
    assert sorted(contents(LabelledFiles(folder="animals")).values()) == sorted(contents(before).values())
    long = bytes(5000)
    for path, content in {
        "cats/long": long,
        "dogs/long": long,
        "cats/longer": long + b"1",
        "dogs/other": long[1:],
    }.items():
        Path("animals", path).write_bytes(content)
    found = contents(LabelledFiles(folder="animals"))
    assert long not in found.values() and {long + b"1", long[1:]} < set(found.values())


def test_hidden_files_of_a_folder_are_left_out() -> None:
    before = LabelledFiles(folder="animals").fingerprint()
    for name in ("cats/.DS_Store", "dogs/.git/config", "dogs/deep/.hidden/file"):
        Path("animals", name).parent.mkdir(exist_ok=True)
        Path("animals", name).write_bytes(name.encode())
    assert LabelledFiles(folder="animals").fingerprint() == before


def test_a_hundred_thousand_files_are_shared_out_in_seconds() -> None:
    many = [File(str(i), Path(str(i)), 100 + i % 50) for i in range(100_000)]
    began = time.monotonic()
    shared = shared_out(many)
    assert time.monotonic() - began < 20
    assert len(shared["val"]) == pytest.approx(10_000, rel=0.01)


def test_packages_of_the_library_are_classes() -> None:
    source = LabelledLibrary(packages=6, class_bytes=400_000)
    assert len(source.classes) == 6 and "asyncio" in source.classes and source.classes == tuple(sorted(source.classes))
    seen: dict[Path, str] = {}
    for split in SPLITS:
        counts = Counter(piece.label for piece in source._pieces[split])
        assert set(counts) == set(range(6))
        assert max(counts.values()) < 0.4 * source.size(split), "no class is most of it"
        for piece in source._pieces[split]:
            assert source.classes[piece.label] in piece.path.parts
            assert seen.setdefault(piece.path, split) == split
    assert pickle.loads(pickle.dumps(source)).example("val", 3) == source.example("val", 3)


def test_more_packages_than_there_are_are_refused() -> None:
    with pytest.raises(DataError, match=r"data.packages is 500, but only \d+ packages"):
        LabelledLibrary(packages=500)
