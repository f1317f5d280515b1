"""Tokenizers: text comes back, ids stay in range, and what cannot be had says what to do."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import tiktoken.load
import tokenizers as library
from hypothesis import given
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from longnet_kit.data import DataError, tokenizers

SAMPLE = "def naïve(x):\n    return 'Grüße, 世界 🙂' * x\n"


def json_file(folder: Path, *special: str, **settings: Any) -> str:
    """A small byte-level BPE, saved; with those special tokens."""
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=list(special))
    made.train_from_iterator([SAMPLE * 5], trainer)
    for name, value in settings.items():
        getattr(made, name)(**value)
    path = folder / "bpe.json"
    made.save(str(path))
    return str(path)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make tiktoken believe that it has fetched its ranks: the 256 bytes, and numbers for the rest."""
    byte_ranks = {bytes([i]): i for i in range(256)}
    merged = {b"ab": 256, b"  ": 257}

    def fake(*args: object, **keywords: object) -> dict[bytes, int]:
        return {**byte_ranks, **merged, **{b"\xff" + str(i).encode(): i for i in range(258, 50256)}}

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", fake)
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", fake)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})


@given(st.binary(max_size=300))
def test_bytes_come_back_whatever_they_are(raw: bytes) -> None:
    tokenizer = tokenizers.build("bytes")
    ids = tokenizer.encode(raw)
    assert bytes(ids.tolist()) == raw and ids.dtype == np.uint32
    assert tokenizer.decode([*ids, tokenizer.eos]) == raw.decode(errors="replace")


@given(st.text(max_size=100))
def test_text_comes_back_from_bytes(text: str) -> None:
    tokenizer = tokenizers.build("bytes")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.vocab_size, tokenizer.eos) == (257, 256)


def test_a_json_tokenizer_takes_the_text_and_nothing_else(tmp_path: Path) -> None:
    settings = {"enable_truncation": {"max_length": 3}, "enable_padding": {"length": 500}}
    tokenizer = tokenizers.build(json_file(tmp_path, "<pad>", "</s>", **settings))
    text = SAMPLE + "</s>" + SAMPLE
    ids = tokenizer.encode(text)
    assert len(ids) > 20 and tokenizer.decode(ids) == text
    assert tokenizer.eos == 1 and tokenizer.eos not in ids, "an end of text in the text is ordinary text"
    assert tokenizer.decode([*ids, tokenizer.eos]) == text
    assert ids.max() < tokenizer.vocab_size
    assert (tokenizer.encode(text.encode()) == ids).all()


def test_the_vocabulary_covers_ids_with_gaps(tmp_path: Path) -> None:
    path = Path(json_file(tmp_path, "</s>"))
    content = json.loads(path.read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 5000, "content": "<far>"})
    content["model"]["vocab"]["<far>"] = 5000
    path.write_text(json.dumps(content))
    assert tokenizers.build(str(path)).vocab_size == 5001


def test_the_fingerprint_of_a_json_file_is_its_content(tmp_path: Path) -> None:
    path = json_file(tmp_path, "</s>")
    before = tokenizers.build(path).fingerprint
    assert tokenizers.build(path).fingerprint == before
    Path(path).write_text(Path(path).read_text() + " ")
    assert tokenizers.build(path).fingerprint != before


@pytest.mark.parametrize("name", sorted(tokenizers.TIKTOKEN))
def test_sizes_are_those_of_tiktoken(name: str, ranks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiktoken, "Encoding", dict)
    definition = openai_public.ENCODING_CONSTRUCTORS[name]()
    tokenizer = tokenizers.build(f"tiktoken:{name}")
    size = definition.get("explicit_n_vocab") or max(definition["special_tokens"].values()) + 1
    assert tokenizer.vocab_size == size
    assert tokenizer.eos == definition["special_tokens"]["<|endoftext|>"]
    assert sorted(tokenizers.TIKTOKEN) == sorted(tiktoken.list_encoding_names())


def test_tiktoken_encodes_special_tokens_as_text(ranks: None) -> None:
    tokenizer = tokenizers.build("r50k_base")
    text = "ab<|endoftext|>ab" + SAMPLE
    ids = tokenizer.encode(text)
    assert tokenizer.eos not in ids and ids[0] == 256 and ids.dtype == np.uint32
    assert tokenizer.decode([*ids, tokenizer.eos]) == text
    assert (tokenizer.encode(text.encode()) == ids).all()
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert (copy.encode(text) == ids).all()


def test_tiktoken_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **keywords: object) -> None:
        raise ConnectionError("name not known\nand more lines")

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", offline)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    tokenizer = tokenizers.build("cl100k_base")
    assert (tokenizer.vocab_size, tokenizer.eos) == (100277, 100257), "known without any download"
    with pytest.raises(
        DataError, match="'cl100k_base' could not be fetched.*name not known.*TIKTOKEN_CACHE_DIR.*bytes"
    ):
        tokenizer.encode("text")


@pytest.mark.parametrize("ids", [[300], [-1], [0, 257]])
def test_ids_beyond_the_vocabulary_are_refused(ids: list[int]) -> None:
    with pytest.raises(DataError, match=r"is no token of bytes, whose ids run from 0 to 256"):
        tokenizers.build("bytes").decode(ids)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("byte", "unknown tokenizer 'byte'; did you mean 'bytes'"),
        ("cl100k", "did you mean 'cl100k_base'"),
        ("tiktoken:cl100kbase", "unknown tiktoken encoding 'cl100kbase'; did you mean 'cl100k_base'"),
        ("nowhere/tok.json", "the file nowhere/tok.json does not exist"),
        ("", "got ''; expected a path"),
    ],
)
def test_unknown_names_are_told_with_what_there_is(name: str, told: str) -> None:
    with pytest.raises(DataError) as raised:
        tokenizers.build(name)
    assert told in str(raised.value) and "data.tokenizer" in str(raised.value)


def test_files_that_are_no_tokenizer_are_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.json"
    for content in ("{", "{}", "[1]", ""):
        wrong.write_text(content)
        with pytest.raises(DataError, match=r"wrong\.json is not a JSON file of the `tokenizers` library"):
            tokenizers.build(str(wrong))
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        tokenizers.build(str(tmp_path / "folder.json"))
    with pytest.raises(DataError, match="no token to end a document with; add one of"):
        tokenizers.build(json_file(tmp_path, "<pad>"))


@pytest.mark.parametrize(("name", "library_name"), [("cl100k_base", "tiktoken"), ("x.json", "tokenizers")])
def test_a_missing_library_is_named(
    name: str, library_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, library_name, None)
    with pytest.raises(DataError, match=f"pip install {library_name}"):
        tokenizers.build(name).encode("text")
