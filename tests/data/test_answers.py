"""Sources of answers: what an example holds and on what it depends, batches of them, resuming, and refusals."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longnet_kit import data
from longnet_kit.data import Answer, AnswersSource, Example
from longnet_kit.data.answers_data import AnswersData
from longnet_kit.data.sampling import evaluation_window, training_window
from longnet_kit.data.sources import SPLITS
from tests.data.test_language_modeling import Ranks, Task, trainer

SOURCES: dict[str, dict[str, Any]] = {
    "passkey": {"distances": [24, 40, 90], "keys": 2, "digits": 2},
    "associative_recall": {"distances": [8, 16, 70], "pairs": 5},
    "many_shot": {"classes": 3, "length": 3},
}
COUNTS = {"train_examples": 50, "val_examples": 11, "test_examples": 11}


def section(name: str, **changes: Any) -> dict[str, Any]:
    return {"source": name, **SOURCES[name], **COUNTS, "tokenizer": "bytes", "seq_len": 200, "batch_size": 4} | changes


def built(name: str, order: int = 0, **changes: Any) -> AnswersData:
    made = data.build(section(name, **changes), seed=order)
    assert isinstance(made, AnswersData)
    made.prepare_data()
    made.setup()
    return made


def source(name: str, **changes: Any) -> AnswersSource:
    made = data.build_source({"source": name, **SOURCES[name], **changes})
    assert isinstance(made, AnswersSource)
    return made


# --- what an example holds


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 5), st.lists(st.integers(24, 150), unique=True))
def test_a_pass_key_is_asked_for_as_far_from_where_it_stands_as_is_said(
    index: int, keys: int, digits: int, distances: list[int]
) -> None:
    distances = distances or [64]
    text, answers = source("passkey", distances=distances, keys=keys, digits=digits).made("train", index, 700)
    stated = {m[1]: m for m in re.finditer(rb" Pass key ([A-Z]) is (\d+)\.", text)}
    asked = {m[1]: m for m in re.finditer(rb" Pass key ([A-Z])\? (\d+)\.", text)}
    assert len(stated) == len(asked) == len(answers) == keys
    assert [(a.start, a.end) for a in answers] == [m.span(2) for m in asked.values()]
    assert all(len(m[2]) == digits for m in asked.values())
    for (name, question), answer in zip(asked.items(), answers, strict=True):
        assert stated[name][2] == question[2]
        assert question.start(2) - stated[name].start(2) == answer.group
        assert answer.group in distances
    prose = re.sub(rb" Pass key [A-Z](?: is|\?) \d+\.", b"", text)
    assert not re.search(rb"\d", prose), "the filler must not look like an answer"


@given(st.integers(0, 2**32), st.integers(1, 12), st.lists(st.integers(4, 100), unique=True, max_size=5))
def test_a_value_is_asked_for_as_far_from_where_it_stands_as_is_said(
    index: int, pairs: int, distances: list[int]
) -> None:
    distances = distances or [8]
    text, answers = source("associative_recall", distances=distances, pairs=pairs).made("val", index, 400)
    stated = {m[1]: m for m in re.finditer(rb"([A-Z0-9])=([a-z]) ", text)}
    asked = {m[1]: m for m in re.finditer(rb"([A-Z0-9])\?([a-z]) ", text)}
    assert len(stated) == len(asked) == len(answers) == pairs
    assert [(a.start, a.end) for a in answers] == [m.span(2) for m in asked.values()]
    for (name, question), answer in zip(asked.items(), answers, strict=True):
        assert stated[name][2] == question[2]
        assert question.start(2) - stated[name].start(2) == answer.group
        assert answer.group in distances
    assert len(text) - text.count(b".") == 8 * pairs


@given(st.integers(0, 2**32), st.integers(2, 9), st.integers(2, 6), st.integers(20, 400))
def test_every_line_of_a_data_set_is_asked_for_and_labels_follow_its_concept(
    index: int, classes: int, length: int, seq_len: int
) -> None:
    made = source("many_shot", classes=classes, length=length, letters=5, noise=0)
    text, answers = made.made("train", index, seq_len)
    lines = text.decode().lstrip("\n").splitlines()
    assert len(lines) == (seq_len + 1) // (length + 2) == len(answers)
    assert [a.group for a in answers][:17] == [0, 1, 2, 2, 4, 4, 4, 4, *[8] * 8, 16][: len(lines)]
    assert all(a.group <= before < 2 * a.group for before, a in enumerate(answers) if before)
    concept: dict[str, str] = {}
    for line, answer in zip(lines, answers, strict=True):
        word, label = line[:-1], line[-1]
        assert text[answer.start : answer.end].decode() == label
        assert concept.setdefault(word, label) == label and len(word) == length
    assert len(set(concept.values())) == len(concept) <= classes
    assert made.groups(seq_len) == [g for g in (1, 2, 4, 8, 16, 32, 64, 128) if g < len(lines)]


@pytest.mark.parametrize(("fewest", "drawn"), [(1, {1, 2, 3, 4}), (3, {3, 4}), (4, {4})])
def test_each_text_draws_how_many_classes_it_has(fewest: int, drawn: set[int]) -> None:
    made = source("many_shot", classes=4, fewest_classes=fewest, length=4, noise=0)
    counts = Counter(len(set(made.made("train", index, 599).text.split())) for index in range(100))
    assert set(counts) == drawn and min(counts.values()) > 100 / len(drawn) / 2


def test_noise_changes_as_many_letters_as_is_said() -> None:
    letters = changed = 0
    for index in range(40):
        text = source("many_shot", classes=2, length=5, letters=10, noise=0.2).made("val", index, 799).text.decode()
        lines = [(line[:-1], line[-1]) for line in text.split()]
        for label in {label for _, label in lines}:
            for column in zip(*(word for word, own in lines if own == label), strict=True):
                letters += len(column)
                changed += len(column) - Counter(column).most_common(1)[0][1]
    assert changed / letters == pytest.approx(0.2 * 9 / 10, abs=0.01), "a letter that is drawn anew may be the same"


def test_every_distance_is_asked_for_equally_often() -> None:
    for name, each in (("passkey", 8), ("associative_recall", 20)):
        made = source(name)
        counts = Counter(a.group for index in range(12) for a in made.made("val", index, 200).answers)
        assert counts == dict.fromkeys(SOURCES[name]["distances"], each)


def test_spread_distances_cannot_be_told_by_their_place() -> None:
    """Each is from 1 - spread of the stated one to that, all of them come, and none is most of its group."""
    found: dict[int, Counter[int]] = {40: Counter(), 90: Counter()}
    made = source("passkey", distances=[40, 90], spread=0.5, keys=2, digits=2)
    for index in range(600):
        text, answers = made.made("train", index, 200)
        for start, _, group in answers:
            name = text[start - 3 : start - 2]
            found[group][start - text.index(b" Pass key " + name + b" is ") - len(b" Pass key A is ")] += 1
    assert set(found[40]) == set(range(20, 41)) and set(found[90]) == set(range(45, 91))
    assert all(max(counts.values()) < 0.15 * counts.total() for counts in found.values())


def test_a_crowded_source_that_is_let_in_never_gives_up() -> None:
    made = source("passkey", distances=[32, 64, 128, 256, 512], keys=15)
    made.groups(1024)
    for index in range(300):
        made.made("train", index, 1024)


# --- on what an example depends


@pytest.mark.parametrize("name", SOURCES)
def test_an_example_depends_on_seed_split_and_index_alone(name: str) -> None:
    def texts(made: AnswersSource, indices: Iterable[int]) -> dict[tuple[str, int], bytes]:
        return {(split, i): made.made(split, i, 200).text for i in indices for split in SPLITS}

    first = texts(source(name), range(20))
    assert first == texts(source(name, train_examples=7), reversed(range(20)))
    assert len(set(first.values())) == 60, "no split shares an example with another"
    assert not set(first.values()) & set(texts(source(name, examples_seed=1), range(20)).values())


# --- batches


@pytest.mark.parametrize("name", SOURCES)
def test_targets_are_the_answers_one_further(name: str) -> None:
    made = built(name)
    for batch in made.val_dataloader():
        size = len(batch["index"])
        assert {key: (x.dtype, tuple(x.shape)) for key, x in batch.items()} == {
            "tokens": (torch.int64, (size, 200)),
            "targets": (torch.int64, (size, 200)),
            "groups": (torch.int64, (size, 200)),
            "index": (torch.int64, (size,)),
        }
        for row, index in enumerate(batch["index"].tolist()):
            text, answers = made.source.made("val", index, 200)
            expected = {place - 1: (text[place], a.group) for a in answers for place in range(a.start, a.end)}
            assert batch["tokens"][row].tolist() == list(text[:-1])
            for place in range(200):
                target, group = expected.get(place, (-100, -1))
                assert (batch["targets"][row, place], batch["groups"][row, place]) == (target, group)


def test_an_example_in_place_of_none_asks_for_nothing() -> None:
    made = built("passkey")
    made.trainer = Ranks(2, 1)  # type: ignore[assignment]
    batches = list(made.val_dataloader())
    rows = torch.cat([batch["index"] for batch in batches]) == -1
    assert int(rows.sum()) == 1
    for key, nothing in (("targets", -100), ("groups", -1)):
        assert torch.equal((torch.cat([batch[key] for batch in batches]) == nothing).all(1), rows)


def test_training_draws_from_more_examples_than_any_run_sees() -> None:
    made = built("many_shot", train_examples=2**32)
    made.trainer = Ranks(1, 0)  # type: ignore[assignment]
    seen = [i for batch in made.train_dataloader() for i in batch["index"].tolist()]
    assert seen == [training_window(place, 2**32, 0) for place in range(20)]
    assert max(seen) > 2**31


def test_validation_is_the_same_for_every_seed_of_the_order() -> None:
    first, second = (torch.cat([b["tokens"] for b in built("passkey", order).val_dataloader()]) for order in (0, 1))
    assert torch.equal(first, second)
    indices = [i for b in built("passkey").test_dataloader() for i in b["index"].tolist()]
    assert indices == [evaluation_window(i, 11) for i in range(11)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_goes_on_with_the_same_examples(workers: int, tmp_path: Path) -> None:
    whole, first, second = Task(), Task(), Task()
    trainer(tmp_path).fit(whole, datamodule=built("many_shot", num_workers=workers))
    started = trainer(tmp_path, max_steps=5)
    started.fit(first, datamodule=built("many_shot", num_workers=workers))
    started.save_checkpoint(tmp_path / "c.ckpt")
    trainer(tmp_path).fit(second, datamodule=built("many_shot", num_workers=workers), ckpt_path=tmp_path / "c.ckpt")
    assert first.windows + second.windows == whole.windows
    assert first.losses + second.losses == whole.losses


def test_other_examples_under_a_checkpoint_are_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    state = built("passkey").state_dict()
    built("passkey").load_state_dict(state)
    assert not [w for w in recwarn if "training data" in str(w.message)]
    others: list[dict[str, Any]] = [{"examples_seed": 1}, {"digits": 3}, {"seq_len": 201}, {"distances": [24, 40, 91]}]
    for changes in others:
        with pytest.warns(UserWarning, match="the training data is not the same"):
            built("passkey", **changes).load_state_dict(state)


@pytest.mark.parametrize("name", SOURCES)
def test_loaders_pickle_for_worker_processes(name: str) -> None:
    examples = built(name).train_dataloader().dataset
    assert torch.equal(pickle.loads(pickle.dumps(examples))[7]["tokens"], examples[7]["tokens"])


# --- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "gpt2"}, r"data\.tokenizer: got 'gpt2', .* use tokenizer: bytes"),
        (
            {"distances": [24, 190]},
            r"data\.distances: 190 does not fit a sequence of 200 .* take 20\d; use at most 18\d",
        ),
        ({"distances": [24, 5]}, r"data\.distances: got \[24, 5\], expected .* of at least 16 tokens"),
        ({"distances": [24, 24]}, r"data\.distances: got \[24, 24\], expected one or more different ones"),
        ({"spread": 0.5}, r"data\.distances: .* at least 16 tokens after data\.spread 0\.5 of them is taken off, in"),
        ({"distances": []}, r"data\.distances: got \[\], expected one or more"),
        ({"keys": 27}, r"data\.keys: got 27, expected at least 1 and at most 26"),
        ({"keys": 12}, r"data\.keys: 12 at distances of .* are too many for a sequence of 200 tokens; use fewer"),
        ({"distanzes": [24]}, r"data\.distanzes: unknown key; did you mean 'distances'\?"),
        ({"val_examples": 0}, r"data\.val_examples: got 0, expected at least 1"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        data.build(section("passkey", **changes))
    assert str(caught.value).count("\n") == 0


def test_the_longest_distance_that_a_refusal_names_is_right() -> None:
    with pytest.raises(ValueError, match="use at most") as caught:
        data.build(section("passkey", distances=[24, 500], keys=1))
    longest = int(re.search(r"use at most (\d+)", str(caught.value))[1])  # type: ignore[index]
    built("passkey", distances=[24, longest], keys=1)
    with pytest.raises(ValueError, match=f"use at most {longest},"):
        data.build(section("passkey", distances=[24, longest + 1], keys=1))
    with pytest.raises(ValueError, match="take 42; use a longer seq_len"):
        data.build(section("passkey", distances=[24], keys=1, seq_len=20))


def test_a_sequence_too_short_for_two_lines_is_refused() -> None:
    built("many_shot", seq_len=9)
    with pytest.raises(ValueError, match=r"8 tokens hold 1 lines of 5 bytes, .* use 9 or more"):
        data.build(section("many_shot", seq_len=8))


def test_more_classes_than_words_are_refused() -> None:
    with pytest.raises(ValueError, match="got 5, but there are only 4 words of 2 of 2 letters"):
        data.build(section("many_shot", classes=5, length=2, letters=2))


def test_more_classes_at_least_than_at_most_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.fewest_classes: got 4, more than the 3 of data\.classes"):
        data.build(section("many_shot", fewest_classes=4))


# --- a source of one's own


class Own(AnswersSource):
    """Makes what it is given, whatever is asked for."""

    def __init__(self, text: bytes, *answers: tuple[int, int, int]) -> None:
        super().__init__(val_examples=1)
        self.given = Example(text, [Answer(*answer) for answer in answers])

    def groups(self, seq_len: int) -> list[int]:
        return [7]

    def example(self, index: int, rng: Random, seq_len: int) -> Example:
        return self.given


def test_a_source_of_ones_own_needs_groups_and_examples_only() -> None:
    made = AnswersData(Own(b"1+2=3;4+4=8", (4, 5, 7), (10, 11, 9)), "bytes", seq_len=10, batch_size=1)
    (batch,) = made.val_dataloader()
    assert batch["targets"].tolist() == [[-100] * 3 + [ord("3")] + [-100] * 5 + [ord("8")]]
    assert batch["groups"].tolist() == [[-1] * 3 + [7] + [-1] * 5 + [9]]


def test_a_source_whose_attributes_are_no_plain_values_is_told_to_write_a_fingerprint() -> None:
    made = AnswersData(Own(b"1+2=3", (4, 5, 7)), "bytes", seq_len=4, batch_size=1)
    made.setup()
    with pytest.raises(data.DataError, match=r"the fingerprint of .*Own must hold plain values"):
        made.state_dict()


@pytest.mark.parametrize(
    ("text", "answers", "message"),
    [
        (b"ab", [(1, 2, 0)], r"its text has 2 bytes, expected seq_len \+ 1 = 5"),
        (b"abcde", [], "it has no answer"),
        (b"abcde", [(0, 1, 0)], "bytes 0 to 1, expected a range that begins at 1 or later"),
        (b"abcde", [(3, 6, 0)], "bytes 3 to 6, expected .* ends at 5 at most"),
        (b"abcde", [(3, 3, 0)], "bytes 3 to 3"),
        (b"abcde", [(1, 2, 0), (2, 3, 0)], "bytes 2 to 3, expected a range that begins at 3 or later"),
        (b"abcde", [(1, 2, -1)], "group -1, expected 0 or more"),
    ],
)
def test_what_is_no_example_is_refused(text: bytes, answers: list[tuple[int, int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=r"Own\.example\(3, seq_len=4\): .*" + message):
        Own(text, *answers).made("train", 3, 4)
