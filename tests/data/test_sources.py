"""Sources: what is read, into which split, and what is said of text that cannot be used."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longnet_kit import data
from longnet_kit.data import DataError, Document, files, sources
from longnet_kit.data.files import Files
from longnet_kit.data.sources import SPLITS, InstalledPackages, PythonStdlib, split_of


def texts(documents: Iterable[Document]) -> dict[str, Any]:
    """The content of each split, its documents' parts joined."""
    joined: dict[str, Any] = {}
    for d in documents:
        split = d.split or split_of(d.name)
        joined[split] = joined[split] + d.content if split in joined else d.content
    return joined


def test_sources_are_registered() -> None:
    of_text = ["files", "huggingface", "installed_packages", "python_stdlib"]
    of_answers = ["associative_recall", "many_shot", "passkey"]
    of_labels = ["labelled_files", "labelled_library", "listops"]
    assert data.names() == sorted(of_text + of_answers + of_labels)
    kinds = {"text": of_text, "answers": of_answers, "labels": of_labels}
    assert all(data.registry.get(name).supplies == kind for kind, names in kinds.items() for name in names)


@given(st.text(max_size=30))
def test_a_split_depends_on_the_name_alone(name: str) -> None:
    assert split_of(name) == split_of(name) and split_of(name) in SPLITS
    assert split_of(name, frozenset({"val", "test"})) == "train"
    assert split_of(name, frozenset({"val"})) == ("train" if split_of(name) == "val" else split_of(name))


def test_splits_never_change_and_have_their_shares() -> None:
    assert [split_of(name) for name in ("1.py", "4.py", "0.py")] == ["train", "val", "test"]
    counts = {split: sum(split_of(f"{i}.py") == split for i in range(10_000)) for split in SPLITS}
    assert abs(counts["val"] - 500) < 80 and abs(counts["test"] - 500) < 80


def test_the_standard_library_is_real_code_without_tests_and_packages() -> None:
    source = PythonStdlib()
    raw = {d.name: d.content for d in source.documents(as_bytes=True)}
    assert list(raw) == [d.name for d in source.documents(as_bytes=True)]
    assert {"argparse.py", "json/encoder.py", "asyncio/events.py"} <= set(raw)
    assert not [n for n in raw if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(n.split("/"))]
    assert 5e6 < sum(map(len, raw.values())) < 2e7
    decoded = {d.name: d.content for d in source.documents(as_bytes=False)}
    assert all(raw[name] == text.encode() for name, text in decoded.items()) and len(raw) - len(decoded) < 5
    shares = {split: sum(len(raw[n]) for n in raw if split_of(n) == split) for split in SPLITS}
    assert min(shares["val"], shares["test"]) > 150_000 and shares["train"] > 4e6


def test_an_interpreter_without_its_library_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path / "python311.zip"))
    with pytest.raises(DataError, match=r"no library sources in .*python311\.zip; use an ordinary Python"):
        PythonStdlib()


def test_library_files_that_are_not_utf8_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_bytes(b"a = '\xe9'\n")
    (tmp_path / "b.py").write_bytes(b"b = 1\n")
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    assert [d.name for d in PythonStdlib().documents(as_bytes=False)] == ["b.py"]
    assert [d.name for d in PythonStdlib().documents(as_bytes=True)] == ["a.py", "b.py"]
    before = PythonStdlib().fingerprint()
    (tmp_path / "b.py").write_bytes(b"b = 12\n")
    assert PythonStdlib().fingerprint() != before


def test_packages_give_their_source_under_their_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"one/a.py": "1", "one/sub/b.py": "22", "two/a.py": "333", "one/__pycache__/c.py": ""}.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/data.txt").write_text("no source")
    monkeypatch.syspath_prepend(tmp_path)
    source = InstalledPackages(["two", "one"])
    documents = {d.name: d.content for d in source.documents(as_bytes=True)}
    assert documents == {"two/a.py": b"333", "one/a.py": b"1", "one/sub/b.py": b"22"}
    assert source.fingerprint() != InstalledPackages(["one"]).fingerprint()
    for wrong in ("bare", "missing", "one.sub", "sys"):
        with pytest.raises(DataError, match=rf"data\.packages: {wrong}: no package of this name"):
            InstalledPackages(["one", wrong])
    with pytest.raises(DataError, match="data.packages is empty"):
        InstalledPackages([])


def test_torch_is_real_code_on_every_machine_of_this_kit() -> None:
    names = [d.name for d in InstalledPackages().documents(as_bytes=True)]
    assert "torch/nn/functional.py" in names and len(names) > 1000
    assert {split_of(name) for name in names} == set(SPLITS)


@given(
    lines=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=60),
    part=st.integers(1, 40),
    ahead=st.integers(3, 40),
    own=st.sampled_from([(), ("val",), ("test",), ("val", "test")]),
)
def test_a_divided_file_is_whole_and_never_cut_within_a_character(
    lines: list[str], part: int, ahead: int, own: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("files")
    path = folder / "text"
    raw = "\n".join(lines).encode()
    path.write_bytes(raw)
    for split in own:
        (folder / split).write_text(split)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PART", max(4, part))
        patch.setattr(files, "LINE", ahead)
        source = Files([str(path)], **{f"{split}_paths": [str(folder / split)] for split in own})
        documents = list(source.documents(as_bytes=False))
        binary = list(source.documents(as_bytes=True))
    assert "".join(d.content for d in documents if d.name == str(path)).encode() == raw
    assert b"".join(d.content for d in binary if d.name == str(path)) == raw
    assert {d.content for d in documents if d.name != str(path)} == set(own)
    order = [SPLITS.index(d.split) for d in documents if d.name == str(path)]
    assert order == sorted(order), "train first, then val, then test"
    for split in SPLITS:
        ends = [d.ends for d in documents if d.split == split and d.name == str(path)]
        assert ends == [False] * (len(ends) - 1) + [True] * bool(ends), "only the last part ends a document"


def test_one_text_file_is_divided_at_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "my.txt"
    lines = [f"line {i} of the only file there is\n" for i in range(30_000)]
    path.write_text("".join(lines))
    found = texts(Files([str(path)]).documents(as_bytes=False))
    assert found["train"] + found["val"] + found["test"] == "".join(lines)
    size = path.stat().st_size
    for split, share in (("train", 0.9), ("val", 0.05), ("test", 0.05)):
        assert len(found[split]) == pytest.approx(share * size, abs=100)
        assert found[split].endswith("\n") and found[split].startswith("line ")


def test_many_files_go_to_splits_as_wholes_wherever_the_folder_is(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        for i in range(files.MANY):
            (tmp_path / folder / f"sub{i % 3}").mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / f"sub{i % 3}" / f"{i}.py").write_text(f"{i} ")
    found = [
        texts(Files([str(tmp_path / folder / "**" / "*.py")]).documents(as_bytes=False)) for folder in ("one", "two")
    ]
    assert found[0] == found[1] and set(found[0]) == set(SPLITS)
    assert sorted(" ".join(found[0].values()).split()) == sorted(map(str, range(files.MANY)))
    (tmp_path / "two" / "sub0" / "new.py").write_text("new ")
    more = texts(Files([str(tmp_path / "two" / "**" / "*.py")]).documents(as_bytes=False))
    kept = {split: [t for t in text.split() if t != "new"] for split, text in more.items()}
    assert kept == {split: text.split() for split, text in found[0].items()}, "another file moves none"


def test_a_file_counts_once_and_held_out_paths_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    monkeypatch.chdir(tmp_path)
    os.symlink("a.txt", "again.txt")
    source = Files(["*.txt", "a.txt", str(tmp_path / "b.txt")], val_paths=["b.txt"], test_paths=["c.txt"])
    assert texts(source.documents(as_bytes=False)) == {"train": "a", "val": "b", "test": "c"}


def test_json_records_go_to_splits_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    records = [json.dumps({"id": i, "body": f"récord {i} "}, ensure_ascii=i % 2 == 0) for i in range(400)]
    path.write_text("\n\n".join(records))
    documents = list(Files([str(path)], field="body").documents(as_bytes=False))
    assert [d.content for d in documents] == [f"récord {i} " for i in range(400)]
    assert {d.split for d in documents} == set(SPLITS) and all(d.ends for d in documents)
    with path.open("a") as file:
        file.write('\n{"body": "one more"}\n')
    assert list(Files([str(path)], field="body").documents(as_bytes=True))[:-1] == documents


BAD = b"good line\n" * 3 + b"caf\xe9 au lait\n"


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path, good = tmp_path / "latin.txt", tmp_path / "good.txt"
    path.write_bytes(BAD)
    good.write_text("good")
    paths = [str(path), str(good)]
    held_out = {"val_paths": [str(good)], "test_paths": [str(good)]}
    with pytest.raises(DataError, match=r"latin\.txt: byte 33 \(0xe9\) is not UTF-8; set data.errors to replace"):
        list(Files(paths).documents(as_bytes=False))
    replaced = texts(Files(paths, errors="replace", **held_out).documents(as_bytes=False))
    assert replaced["train"] == BAD.decode(errors="replace")
    skipped = texts(Files(paths, errors="skip").documents(as_bytes=False))
    assert "".join(skipped[s] for s in SPLITS if s in skipped) == "good"
    assert texts(Files(paths, **held_out).documents(as_bytes=True))["train"] == BAD


def test_the_offset_of_a_wrong_byte_counts_from_the_start_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PART", 1000)
    path = tmp_path / "long.txt"
    for place in (0, 999, 1000, 45_678, 99_999):
        raw = bytearray(b"0123456789abcde\n" * 6250)
        raw[place] = 0xFF
        path.write_bytes(raw)
        with pytest.raises(DataError, match=rf"byte {place} \(0xff\)"):
            list(Files([str(path)]).documents(as_bytes=False))
        assert not list(Files([str(path)], errors="skip").documents(as_bytes=False))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"text": ', "line 3 is not JSON"),
        (b'["text"]', "line 3 is no JSON object; expected"),
        (b'{"body": "x", "id": 1}', "line 3 has no key 'text' (it has: 'body', 'id'); set data.field"),
        (b"{}", "line 3 has no key 'text' (it has: none)"),
        (b'{"text": 7}', "line 3: 'text' is 7, expected text"),
        (b'{"text": null}', "line 3: 'text' is null, expected text"),
        (b'{"text": "\xe9"}', "line 3: byte 38 (0xe9) is not UTF-8"),
        (b'{"text": "a\\ud800b"}', "line 3: 'text' has '\\ud800', half a character"),
    ],
)
def test_wrong_records_are_named_by_their_line(line: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"text": "1"}\n{"text": "2"}\n' + line + b"\n")
    with pytest.raises(DataError) as raised:
        list(Files([str(path)]).documents(as_bytes=False))
    assert told in str(raised.value) and "r.jsonl" in str(raised.value)


def test_records_that_are_not_utf8_are_skipped_or_replaced(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"text": "1"}\n{"text": "\xe9"}\n{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude42"}\n')
    contents = {
        errors: [d.content for d in Files([str(path)], errors=errors).documents(as_bytes=False)]  # type: ignore[arg-type]
        for errors in ("skip", "replace")
    }
    assert contents == {"skip": ["1", "🙂"], "replace": ["1", "\ufffd", "a\ufffdb", "🙂"]}


def test_wrong_paths_are_told_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError) as raised:
        Files(["missing.txt", "folder", "*.rs"], val_paths=["none/*.txt"])
    told = str(raised.value).splitlines()
    assert len(told) == 4
    assert told[0].startswith("data.val_paths: no file matches none/*.txt")
    assert told[1].startswith(f"data.paths: missing.txt does not exist (looked from {tmp_path})")
    assert told[2] == "data.paths: folder is a folder; give its files, as in folder/**/*.py"
    assert told[3].startswith("data.paths: no file matches *.rs")


def test_no_paths_and_nothing_to_train_on_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.paths is empty"):
        Files([])
    (tmp_path / "a").write_text("a")
    with pytest.raises(DataError, match="nothing is left to train on"):
        Files([str(tmp_path / "a")], val_paths=[str(tmp_path / "a")])


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("text")
    assert "".join(d.content for d in Files(["~/*.txt"]).documents(as_bytes=False)) == "text"  # type: ignore[misc]


def test_the_fingerprint_changes_with_files_and_options(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}')
    prints = [Files([str(path)]).fingerprint(), Files([str(path)], field="b").fingerprint()]
    prints.append(Files([str(path)], errors="skip").fingerprint())
    path.write_text('{"text": "ab"}')
    prints.append(Files([str(path)]).fingerprint())
    os.utime(path, ns=(1, 1))
    prints.append(Files([str(path)]).fingerprint())
    assert len({json.dumps(p) for p in prints}) == 5
    assert Files([str(path)]).fingerprint() == prints[-1]


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a")
    path.chmod(0)
    with pytest.raises(DataError, match=r"a\.txt cannot be read: Permission denied"):
        list(Files([str(path)]).documents(as_bytes=True))


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a")
    source = Files([str(path)])
    path.unlink()
    with pytest.raises(DataError, match=r"a\.txt cannot be read: No such file"):
        list(source.documents(as_bytes=True))
