"""Files as one stream: every byte once, from any place on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers as library
from hypothesis import given
from hypothesis import strategies as st

from longnet_kit.data import files, tokenizers
from longnet_kit.data.errors import DataError
from longnet_kit.data.tokenizers import Bytes
from longnet_kit.inference.corpus import Corpus, Place, joined

TEXTS = {"a.txt": "first\nsecond\n", "b.py": "x = 'é'\n" * 9, "c.txt": "", "d.txt": "the end"}
WHOLE = b"".join(text.encode() + bytes([0]) for text in TEXTS.values() if text)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "PART", 16)  # so that files come in parts
    for name, text in TEXTS.items():
        Path(name).write_text(text)
    return tmp_path


def corpus(*paths: str, **options: object) -> Corpus:
    return Corpus(paths or list(TEXTS), Bytes(), **options)  # type: ignore[arg-type]


def as_bytes(ids: np.ndarray) -> bytes:
    """With 0 for the end of a document."""
    return bytes(0 if i == 256 else i for i in ids.tolist())


def test_documents_follow_each_other_each_with_an_end() -> None:
    taken = corpus().reader(Place()).take(10_000)
    assert as_bytes(taken.ids) == WHOLE
    assert taken.text_bytes.tolist() == [float(i != 256) for i in taken.ids]
    assert corpus().size == sum(len(text.encode()) for text in TEXTS.values())


@given(st.lists(st.integers(0, 40), max_size=12))
def test_a_place_is_where_reading_goes_on(counts: list[int]) -> None:
    for repeat in (False, True):
        reader, expected = corpus(repeat=repeat).reader(Place()), WHOLE * (50 if repeat else 1)
        done = 0
        for count in counts:
            taken = reader.take(count)
            assert as_bytes(taken.ids) == expected[done : done + count]
            done += taken.count
            again = corpus(repeat=repeat).reader(Place(*json.loads(json.dumps(reader.place)))).take(30)
            assert as_bytes(again.ids) == expected[done : done + 30]
        assert not repeat or reader.place.reading == max(0, done - 1) // len(WHOLE)


def test_other_tokens_share_their_document_s_bytes(tmp_path: Path) -> None:
    trainer = library.trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<eos>"], initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator(TEXTS.values(), trainer)
    tokenizer.save("bpe.json")
    bpe = tokenizers.build("bpe.json")
    taken = Corpus(list(TEXTS), bpe).reader(Place()).take(10_000)
    assert taken.text_bytes.sum() == pytest.approx(corpus().size)
    assert ((taken.text_bytes == 0) == (taken.ids == bpe.eos)).all()
    assert taken.count < len(WHOLE)


def test_records_of_json_lines_are_documents() -> None:
    Path("r.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": "two"}\n')
    assert as_bytes(corpus("r.jsonl").reader(Place()).take(100).ids) == b"one\0two\0"


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (["missing.txt"], r"^FILES: missing.txt does not exist"),
        (["*.nope"], r"^FILES: no file matches \*.nope"),
        (["."], r"^FILES: \. is a folder; give its files"),
        ([], r"^FILES is empty"),
    ],
)
def test_wrong_paths_are_told_in_the_words_of_the_command(paths: list[str], words: str) -> None:
    with pytest.raises(DataError, match=words):
        Corpus(paths, Bytes())


def test_text_that_is_not_utf_8_is_told_and_can_be_replaced(tmp_path: Path) -> None:
    tokenizer = library.Tokenizer(library.models.WordLevel({"<eos>": 0, "a": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.save("words.json")
    words = tokenizers.build("words.json")
    Path("latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"latin.txt: byte 3 \(0xe9\) is not UTF-8; use --errors replace"):
        Corpus(["latin.txt"], words).reader(Place()).take(10)
    assert Corpus(["latin.txt"], words, "replace").reader(Place()).take(10).ids.tolist() == [2, 0]
    assert as_bytes(corpus("latin.txt").reader(Place()).take(10).ids) == b"caf\xe9\0"


def test_files_without_text_cannot_be_repeated() -> None:
    assert corpus("c.txt").reader(Place()).take(5).count == 0
    with pytest.raises(DataError, match="c.txt: there is no text in it, so it cannot be repeated"):
        corpus("c.txt", repeat=True).reader(Place()).take(5)


def test_runs_of_tokens_join() -> None:
    reader = corpus().reader(Place())
    parts = [reader.take(n) for n in (0, 3, 5)]
    assert as_bytes(joined(parts).ids) == WHOLE[:8]
    assert joined([]).count == 0
