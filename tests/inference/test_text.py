"""Text while it is drawn: whole characters, in pieces that add up, and nothing of a stop string."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers as library
from hypothesis import given
from hypothesis import strategies as st

from longnet_kit.data import tokenizers
from longnet_kit.data.tokenizers import Bytes, Tokenizer
from longnet_kit.inference.text import TextStream


def pieces(stream: TextStream, ids: list[int]) -> list[str]:
    return [*(stream.add(i) for i in ids), stream.finish()]


@given(st.lists(st.one_of(st.integers(0, 256), st.sampled_from("aé€😀\u0301".encode())), max_size=60))
def test_pieces_add_up_to_the_decoded_whole(ids: list[int]) -> None:
    stream = TextStream(Bytes())
    assert "".join(pieces(stream, ids)) == Bytes().decode(ids) == stream.text


@given(st.text(max_size=30))
def test_a_character_comes_whole(text: str) -> None:
    stream = TextStream(Bytes())
    told = ""
    for i in text.encode("utf-8", "replace"):
        told += stream.add(i)
        assert text.encode("utf-8", "replace").decode().startswith(told)


@given(text=st.text("ab\nc", max_size=40), stops=st.lists(st.text("ab\nc", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    """As if the whole text were searched, except that the stop string which is complete first ends it."""
    stream = TextStream(Bytes(), stops)
    told = ""
    for read, i in enumerate(text.encode(), start=1):
        told += stream.add(i)
        is_complete = any(stop in text[:read] for stop in stops)
        assert stream.is_stopped == is_complete
        if is_complete:
            assert told == text[: min(text.index(stop) for stop in stops if stop in text[:read])]
            assert stream.add(ord("a")) == stream.finish() == ""
            return
    assert told + stream.finish() == text == stream.text


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    stream = TextStream(Bytes(), ["\n\n"])
    assert [stream.add(i) for i in b"a\nb\n"] == ["a", "", "\nb", ""]
    assert stream.finish() == "\n"


def saved(tokenizer: library.Tokenizer, folder: Path) -> Tokenizer:
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizers.build(str(folder / "tokenizer.json"))


def byte_level(folder: Path) -> Tokenizer:
    """A byte-level BPE, whose tokens cut characters apart."""
    trainer = library.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    tokenizer.train_from_iterator(["for é in range(10): print('€uro', 😀)\n"] * 20, trainer)
    return saved(tokenizer, folder)


def byte_fallback(folder: Path) -> Tokenizer:
    """As of SentencePiece: words with their space, and bytes for what no word is made of."""
    words = ["<eos>", "▁", "a", "b", "▁a", "▁b", "▁ab", "\n", *(f"<0x{i:02X}>" for i in range(256))]
    merges = [("▁", "a"), ("▁", "b"), ("▁a", "b")]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = library.Tokenizer(library.models.BPE(vocabulary, merges, byte_fallback=True))
    tokenizer.normalizer = library.normalizers.Sequence(
        [library.normalizers.Prepend("▁"), library.normalizers.Replace(" ", "▁")]
    )
    decoders = library.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return saved(tokenizer, folder)


KINDS = {"byte level": byte_level, "byte fallback": byte_fallback}


@pytest.mark.parametrize(
    "text", ["for é in range(3):\n", "😀€é plain", "a  b ab", "ab\n ab", "日本語 ñandú", "", " b", "a " * 100]
)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_a_json_tokenizer_come_as_text(kind: str, text: str, tmp_path: Path) -> None:
    tokenizer = KINDS[kind](tmp_path)
    ids = [int(i) for i in tokenizer.encode(text)]
    stream = TextStream(tokenizer)
    told = pieces(stream, [*ids, tokenizer.eos])
    assert "".join(told) == text == stream.text == tokenizer.decode(ids)
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(told)
    assert len(told) < 4 or sum(map(bool, told)) > len(text) // 4, "it comes while it is drawn"


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_comes_as_it_is_decoded(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = KINDS[kind](tmp_path_factory.mktemp("kind"))

    @given(st.text(st.one_of(st.sampled_from("ab \né€😀"), st.characters(codec="utf-8")), max_size=30))
    def check(text: str) -> None:
        ids = [int(i) for i in tokenizer.encode(text)]
        assert "".join(pieces(TextStream(tokenizer), ids)) == tokenizer.decode(ids)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_make_no_character_are_given_up(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A byte fallback decodes a run of bytes as a whole, which no piece can know; words come unchanged."""
    tokenizer = KINDS[kind](tmp_path_factory.mktemp("kind"))
    word = [int(i) for i in tokenizer.encode("ab")]

    @given(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    def check(ids: list[int]) -> None:
        told = pieces(TextStream(tokenizer), [*ids, *word, *word])
        assert "".join(told).replace(" ", "").endswith("abab")

    check()


def test_half_a_character_of_a_json_tokenizer_is_told_in_the_end(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    ids = [int(i) for i in tokenizer.encode("a日")][:-1]
    assert "".join(pieces(TextStream(tokenizer), ids)) == tokenizer.decode(ids)
