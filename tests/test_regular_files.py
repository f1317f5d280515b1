"""What a run, cache or data set reads: regular files of a plausible size, text that is text, sound checksums."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import random
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from longnet_kit import checkpoint_io, cli, durable, recipe, resume, run_lock, runs, weights
from longnet_kit.callbacks.board import Board, Point
from longnet_kit.data import files
from longnet_kit.data.errors import DataError
from longnet_kit.data.huggingface import HuggingFace
from longnet_kit.data.labelled_files import LabelledFiles
from longnet_kit.errors import UserError
from longnet_kit.inference import console, stream_files

pytestmark = [
    pytest.mark.timeout(60),  # where one of them waits for a pipe, the test fails
    pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with a name"),
]


def pipe(path: Path) -> None:
    os.mkfifo(path)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(64 << 30)


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


ODD: dict[str, Callable[[Path], None]] = {"pipe": pipe, "sparse": sparse, "zeros": zeros, "directory": Path.mkdir}


@pytest.fixture(params=ODD)
def odd(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    """Puts something other than a small regular file at a path."""
    return ODD[request.param]


def test_only_a_regular_file_of_a_plausible_size_is_read(tmp_path: Path, odd: Callable[[Path], None]) -> None:
    odd(tmp_path / "x")
    with pytest.raises(OSError, match=r"not a regular file|68,719,476,736 bytes, more than 67,108,864"):
        durable.read(tmp_path / "x")
    (tmp_path / "y").write_bytes(b"text")
    assert durable.read(tmp_path / "y") == b"text"


@pytest.mark.parametrize("content", [b'{"status": "\xff"}', b"[1]", b"3", b"{", b"[" * 100_000])
def test_a_summary_that_is_no_object_counts_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / runs.SUMMARY).write_bytes(content)
    problems: list[str] = []
    assert runs.read_summary(tmp_path, problems) == {}
    assert len(problems) == 1 and problems[0].startswith("summary.json: ")


def test_a_run_goes_on_whatever_its_summary_is(
    tmp_path: Path, odd: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("runs/quickstart/version_0")
    run.mkdir(parents=True)
    r = recipe.load("quickstart", ["resume=auto"])
    recipe.save(r, run / runs.RECIPE)
    odd(run / runs.SUMMARY)
    assert resume.find(r) == resume.Place(run)


def test_the_lock_of_a_run_never_waits(tmp_path: Path) -> None:
    pipe(tmp_path / run_lock.LOCK)
    assert run_lock.holder(tmp_path) == ""
    with run_lock.hold(tmp_path):
        pass


def test_a_pipe_where_a_file_is_staged_never_makes_a_write_wait(tmp_path: Path) -> None:
    pipe(durable.staged(tmp_path / "x"))
    with durable.replacing(tmp_path / "x") as staged:
        staged.write_text("text")
    assert (tmp_path / "x").read_text() == "text"


def test_a_recipe_is_a_small_regular_file(
    tmp_path: Path, odd: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    odd(tmp_path / "x.yaml")
    assert cli.main(["show", str(tmp_path / "x.yaml")]) == 2
    assert "x.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["/dev/urandom", "/dev/zero", "/dev/stdin"])
def test_data_that_is_no_regular_file_is_refused(path: str) -> None:
    with pytest.raises(DataError, match=f"data.paths: {path} is no regular file"):
        files.Files([path])


def test_a_prompt_is_a_regular_file(tmp_path: Path, odd: Callable[[Path], None]) -> None:
    odd(tmp_path / "prompt")
    with pytest.raises(UserError, match=r"--prompt-file .*prompt cannot be read"):
        console.run("quickstart", prompt_files=[tmp_path / "prompt"])


PACKED = {
    "a.txt.gz": (gzip.compress(b"text"), "gzip"), "a.txt": (gzip.compress(b"text"), "gzip"),
    "a.bz2": (b"BZh9", "bzip2"),
    "a.txt.xz": (b"", "xz"), "b.txt": (b"\xfd7zXZ\x00", "xz"), "a.jsonl.zst": (b"", "zstd"),
    "a.jsonl": (b"\x28\xb5\x2f\xfd", "zstd"), "a.zip": (b"PK\x03\x04", "zip"), "a.csv": (b"a,b\n", "table"),
    "a.parquet": (b"PAR1", "table"), "c.txt": (b"PAR1\x15", "table"),
}  # fmt: skip


@pytest.mark.parametrize("name", PACKED)
def test_packed_text_and_tables_are_refused_by_name(tmp_path: Path, name: str) -> None:
    content, kind = PACKED[name]
    (tmp_path / name).write_bytes(content or b"anything")
    for path in (tmp_path / name, tmp_path / "*"):
        with pytest.raises(DataError, match=rf"data.paths: \S*{name} is .*\b{kind}\b"):
            files.Files([str(path)])
    with pytest.raises(UserError, match=rf"--prompt-file \S*{name} is .*\b{kind}\b"):
        console.run("quickstart", prompt_files=[tmp_path / name])
    for number in range(3):
        (tmp_path / f"{number}.py").write_text(f"pass # {number}")
    with pytest.raises(DataError, match=rf"labelled_files: \S*{name} is .*\b{kind}\b"):
        LabelledFiles({"a": [str(tmp_path / "*.py")], "b": [str(tmp_path / name)]})


def texts(source: files.Files, as_bytes: bool = False) -> list[str | bytes]:
    return [document.content for document in source.documents(as_bytes)]


def test_json_lines_are_read_whatever_the_file_is_called(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(9))
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_text(lines)
        assert sorted(texts(files.Files([str(tmp_path / name)]))) == [f"text {i}" for i in range(9)]


@pytest.mark.parametrize("document", ['[{"text": "a"}]', '{\n "text": "a"\n}\n', '"text"', "3"])
def test_one_json_document_is_refused(tmp_path: Path, document: str) -> None:
    (tmp_path / "a.json").write_text(document)
    with pytest.raises(DataError, match=r"a\.json is one JSON document, and JSON lines are expected"):
        files.Files([str(tmp_path / "a.json")])


@pytest.mark.parametrize("as_bytes", [False, True])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, as_bytes: bool) -> None:
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + b"one\ntwo\n")
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + b'{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "empty.txt").write_bytes(codecs.BOM_UTF8)
    found = texts(files.Files([str(tmp_path / "a.txt")]), as_bytes)
    assert (b"" if as_bytes else "").join(found) == (b"one\ntwo\n" if as_bytes else "one\ntwo\n")  # type: ignore[arg-type]
    assert sorted(texts(files.Files([str(tmp_path / "a.jsonl")]), as_bytes)) == ["one", "two"]
    assert not any(texts(files.Files([str(tmp_path / "empty.txt")]), as_bytes))


def tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "told"),
    [("text\n".encode("utf-16"), "UTF-16"), ("text\n".encode("utf-32"), "UTF-16"), (tar(), "tar")],
    ids=["utf-16", "utf-32", "tar"],
)
def test_other_encodings_and_archives_are_known_by_their_first_bytes(
    tmp_path: Path, content: bytes, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    for source in (lambda: files.Files([str(path)]), lambda: HuggingFace("text", data_files=[str(path)])):
        with pytest.raises(DataError, match=rf"a\.txt is .*\b{told}\b"):
            source()
    with path.open() as standard_input:
        monkeypatch.setattr(sys, "stdin", standard_input)
        with pytest.raises(UserError, match=rf"--prompt-file - is .*\b{told}\b"):
            console.run("quickstart", prompt_files=["-"])


def test_standard_input_that_has_no_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "LONGEST", 1 << 20)
    with open("/dev/zero") as standard_input:
        monkeypatch.setattr(sys, "stdin", standard_input)
        with pytest.raises(UserError, match="--prompt-file - has more than 1,048,576 bytes"):
            console.run("quickstart", prompt_files=["-"])


def test_tables_read_as_lines_of_text_are_refused_and_tables_read_as_such_are_not(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\none,1\n")
    with pytest.raises(DataError, match=r"data.data_files: \S*a\.csv is a table"):
        HuggingFace("text", data_files=[str(tmp_path / "a.csv")])
    assert [d.content for d in HuggingFace("csv", data_files=[str(tmp_path / "a.csv")]).documents(False)] == ["one"]


def test_a_record_may_be_long_but_not_a_whole_sparse_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"text": "x" * (files.PART + 1)}))
    assert list(map(len, texts(files.Files([str(tmp_path / "a.json")])))) == [files.PART + 1]
    sparse(tmp_path / "b.jsonl")
    monkeypatch.setattr(files, "RECORD", 1 << 20)
    with pytest.raises(DataError, match=r"b\.jsonl, line 1 has more than 1,048,576 bytes"):
        texts(files.Files([str(tmp_path / "b.jsonl")]))


def test_a_wrong_file_is_reported_under_its_own_key(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"text"))
    with pytest.raises(DataError, match=r"data.val_paths: \S*b\.gz is packed"):
        files.Files([str(tmp_path / "a.txt")], val_paths=[str(tmp_path / "b.gz")])


def test_a_file_with_a_byte_order_mark_has_a_cache_of_its_own(tmp_path: Path) -> None:
    """Earlier versions stored the mark as text."""
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + b"text")
    (tmp_path / "b.txt").write_bytes(b"text")
    marked, plain = (files.Files([str(tmp_path / name)]).fingerprint() for name in ("a.txt", "b.txt"))
    assert set(marked) - set(plain) == {"marks"}


def flipped(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


STATE = {"position": 5, "cache": torch.arange(2000.0)}


def test_a_flipped_bit_anywhere_in_the_state_of_a_stream_is_found(tmp_path: Path) -> None:
    rng = random.Random(0)
    for number in range(60):
        path = tmp_path / f"{number}.pt"
        checkpoint_io.write(STATE, path)
        read = stream_files._read_state(path)
        assert read is not None and torch.equal(read["cache"], STATE["cache"])
        flipped(path, rng)
        with pytest.raises(UserError, match=rf"{number}\.pt is damaged \(.*delete it to read from the beginning"):
            stream_files._read_state(path)


def test_a_state_without_a_checksum_is_read_as_checkpoints_are(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "state.pt")
    read = stream_files._read_state(tmp_path / "state.pt")
    assert read is not None and read["position"] == 5 and torch.equal(read["cache"], STATE["cache"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="its processes are forked")
def test_a_kill_while_a_state_is_replaced_leaves_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    path, seen = tmp_path / "state.pt", []
    for calls in range(1, 20):
        checkpoint_io.write({"position": 1}, path)
        if (child := os.fork()) == 0:
            left = calls

            def audit(event: str, _: object) -> None:
                nonlocal left
                left -= event in ("open", "os.remove", "os.rename")
                if left == 0:
                    os._exit(9)

            sys.addaudithook(audit)
            checkpoint_io.write({"position": 2}, path)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        read = stream_files._read_state(path)
        assert read is not None
        seen.append(read["position"])
        if code == 0:
            break
    assert code == 0 and seen == sorted(seen) and seen.count(1) >= 4 and seen.count(2) >= 2


def test_a_flipped_bit_in_an_exported_file_is_found(tmp_path: Path) -> None:
    rng, tensors, metadata = random.Random(0), {"w": torch.arange(2000.0)}, {"step": "5", "recipe": "name: a"}
    metadata[weights.DIGEST] = weights.digest(tensors, metadata)
    for number in range(60):
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors, path, metadata)
        assert torch.equal(weights.read(path)["state_dict"]["model.w"], tensors["w"])
        flipped(path, rng)
        with pytest.raises(UserError, match="damaged"):
            weights.read(path)


@pytest.mark.parametrize("key", ["init_from", "resume"])
def test_weights_come_from_a_regular_file(tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    pipe(tmp_path / "x.ckpt")
    for path in (tmp_path / "x.ckpt", "/dev/zero"):
        assert cli.main(["fit", "quickstart", f"{key}={path}"]) == 2
        assert f"{path} is no regular file" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"x\.ckpt cannot be read \(it is a pipe"):
        weights.read(tmp_path / "x.ckpt")


def test_a_pattern_that_matches_a_pipe_names_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    pipe(tmp_path / "b.txt")
    with pytest.raises(DataError, match=r"matches \S*b\.txt: no regular file"):
        files.Files([str(tmp_path / "*.txt")])


def test_text_that_begins_like_a_packed_file_is_text(tmp_path: Path) -> None:
    for name, content in (("a.txt", b"BZhang is a name"), ("b.txt", b"PAR1 begins here")):
        (tmp_path / name).write_bytes(content)
        files.Files([str(tmp_path / name)])


def test_json_lines_of_another_encoding_are_replaced_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"text": "caf\xe9"}\n')
    assert texts(files.Files([str(tmp_path / "a.json")], errors="replace")) == ["caf\ufffd"]


def test_event_files_of_a_resumed_run_are_regular_files(tmp_path: Path) -> None:
    pipe(tmp_path / "events.out.tfevents.1.x")
    with pytest.raises(UserError, match=r"events\.out\.tfevents\.1\.x cannot be read \(it is a pipe"):
        Board(tmp_path, 3, [Point("a", 1, 0.5)])
