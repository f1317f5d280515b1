"""Whatever a recipe, a data file, a token cache or a checkpoint holds: it is read, or refused in the kit's own words.

Never another error, never without end, and never is code run that a file brings along. By default a hundred inputs are
tried in each test; `tools/test tests/test_fuzz.py --hypothesis-profile deep` tries 10,000.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import types
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers as library
import torch
from hypothesis import example, given, reject
from hypothesis import strategies as st

from longnet_kit import plugins, recipe, weights
from longnet_kit.data import DataError, cache, files, shards, tokenizers
from longnet_kit.data.sources import SPLITS
from longnet_kit.errors import UserError
from longnet_kit.recipe import RecipeError
from tests.data.corpus import counted
from tests.fuzzing import checkpoints, recipes, texts
from tests.fuzzing.limits import limits, slowest
from tests.fuzzing.mutations import mutated

pytestmark = pytest.mark.timeout(7200)  # of the deep profile
number = itertools.count()


@pytest.fixture(scope="module", autouse=True)
def desk(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Path]:
    """A working directory, in which no plug-in is imported; afterwards the slowest inputs are told."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("desk")
        patch.chdir(folder)

        def missing(name: str) -> None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        patch.setattr(
            plugins, "importlib", types.SimpleNamespace(import_module=missing, invalidate_caches=lambda: None)
        )
        yield folder
    reporter = pytestconfig.pluginmanager.get_plugin("terminalreporter")
    capturing = pytestconfig.pluginmanager.get_plugin("capturemanager")
    if reporter is not None and capturing is not None:
        with capturing.global_and_fixture_disabled():
            reporter.ensure_newline()
            for target, (seconds, given_to_it) in slowest.items():
                reporter.write_line(f"slowest of {target}: {seconds:.2f} s, {given_to_it}")


def check_refusal(error: ValueError, subject: object) -> None:
    """Hold an error to being the kit's own, whose message alone the user sees, and to saying what it is about."""
    assert str(subject) in str(error)
    assert isinstance(error, UserError)


# --- recipes


def read_recipe(target: str, content: bytes, items: list[str]) -> None:
    """Load it; a recipe that is good is good again from its own text."""
    Path("r.yaml").write_bytes(content)
    with limits(target, (content, items)):
        try:
            loaded = recipe.load("r.yaml", items)
        except RecipeError as error:
            check_refusal(error, "")
            return
        recipe.save(loaded, "again.yaml")
        assert recipe.dumps(recipe.load("again.yaml")) == recipe.dumps(loaded)


@given(recipes.DOCUMENTS, recipes.ITEMS)
@example(recipes.MERGES, [])
@example(b"{extends: .}", [])
@example(b"a: &a {b: 1, <<: [*a]}", [])
@example(b'extends: "a\\0/b.yaml"', [])
@example(b'name: x\ntrainer: {max_steps: 1, devices: !!bool x, precision: !!int ""}', [])
def test_any_recipe_is_loaded_or_refused(content: bytes, items: list[str]) -> None:
    read_recipe("recipes", content, items)


UNEVEN = "model.attention={backend: dilated, segment_lengths: [3], dilation_rates: [1]}"


@given(recipes.ITEMS)
@example(["data=${model}"])
@example(["optimizer=${a}", "a={}"])
@example(["trainer.max_time=${trainer.a}", "trainer.a={'a[b': 1}"])
@example(["init_from=" + "x" * 300])
@example(["data.tokenizer=" + "x" * 300])
@example(["strategy.sequence_parallel_size=3", f"trainer.devices={2**40}"])
@example(["strategy.sequence_parallel_size=2", "trainer.devices=2", f"data.seq_len={2**40}", UNEVEN])
@example(
    ["strategy.sequence_parallel_size=2", "trainer.devices=2", f"model.heads={2**39 + 1}", f"model.dim={2**40 + 2}"]
)
def test_any_override_is_taken_or_refused(items: list[str]) -> None:
    read_recipe("overrides", recipes.SMALL, items)


@pytest.mark.parametrize("kind", recipes.BOMBS)
def test_a_recipe_larger_than_any_is_refused(kind: str) -> None:
    Path("r.yaml").write_bytes(recipes.BOMBS[kind])
    with (
        limits("bombs", kind),
        pytest.raises(RecipeError, match=r"recipe needs|no recipe|interpolations in all texts"),
    ):
        recipe.load("r.yaml")


def test_half_a_character_is_refused() -> None:
    Path("r.yaml").write_bytes(recipes.SMALL)
    for item in ('description="\\ud800"', 'trainer.max_time={"\\udfff": 1}'):
        with pytest.raises(RecipeError, match="half a character"):
            recipe.load("r.yaml", [item])


def test_an_interpolation_of_what_it_stands_in_is_told() -> None:
    Path("r.yaml").write_bytes(recipes.SMALL)
    with pytest.raises(RecipeError, match=r"trainer\.a\.b\.d \(on the command line\): it stands for a mapping"):
        recipe.load("r.yaml", ["trainer.a={b: '${trainer.c}'}", "trainer.c={d: '${trainer.a}'}"])


# --- data


@given(
    content=texts.TEXTS,
    name=st.sampled_from(["a.txt", "a.jsonl", "a.ndjson"]),
    errors=st.sampled_from(["strict", "replace", "skip"]),
    as_bytes=st.booleans(),
    part=st.integers(4, 70),
    is_held_out=st.booleans(),
)
@example(b'{"text": ' + b"1" * 5000 + b"}", "a.jsonl", "strict", False, 4, False)
@example(b'{"a":' * 100_000, "a.jsonl", "skip", False, 4, False)
@example(b'{"text": "\\udc00\\ud800"}', "a.jsonl", "replace", True, 4, True)
@example(b"x" * (9 << 20), "a.txt", "skip", False, 4 << 20, False)
def test_any_text_is_read_or_refused(
    content: bytes, name: str, errors: Any, as_bytes: bool, part: int, is_held_out: bool
) -> None:
    Path(name).write_bytes(content)
    Path("other.txt").write_text("line\n" * 20)
    with (
        pytest.MonkeyPatch.context() as patch,
        limits("texts", (content, name, errors, as_bytes, part, is_held_out)),
    ):
        patch.setattr(files, "PART", part)
        patch.setattr(files, "LINE", part)
        source = files.Files(["other.txt"] if is_held_out else [name], [name] if is_held_out else [], errors=errors)
        try:
            documents = [d for d in source.documents(as_bytes) if not d.name.startswith("other.txt")]
        except DataError as error:
            check_refusal(error, name)
            return
        read = b"".join(d.content if isinstance(d.content, bytes) else d.content.encode() for d in documents)
        if name == "a.txt" and (as_bytes or errors == "strict"):
            assert read == content


@given(st.lists(texts.PATTERNS, max_size=3), st.lists(texts.PATTERNS, max_size=2), st.text(max_size=5))
@example(["a*\0"], [], "text")
@example(["~\ud800"], [], "text")
@example(["a" * 5000], ["*" + "a" * 5000], "text")
@example(["~nobody-of-this-name/a", "[", "**"], [], "text")
def test_any_path_is_found_or_refused(paths: list[str], val_paths: list[str], field: str) -> None:
    with limits("paths", (paths, val_paths)):
        try:
            source = files.Files(paths, val_paths, field=field)
            source.fingerprint()
            list(itertools.islice(source.documents(True), 3))
        except DataError as error:
            check_refusal(error, "")


@pytest.fixture(scope="module")
def sound(desk: Path) -> tuple[dict[str, bytes], list[list[int]]]:
    """The files of a cache of a few blocks in several shards, and its tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD", 40)
        patch.setattr(shards, "BLOCK", 32)
        folder = cache.build(counted({"train": 99, "val": 20, "test": 0}), tokenizers.build("bytes"), desk / "built")
        return {path.name: path.read_bytes() for path in folder.iterdir()}, tokens_of(cache.TokenCache(folder))


def tokens_of(opened: cache.TokenCache) -> list[list[int]]:
    """Everything in a cache."""
    return [opened.splits[split].read(0, len(opened.splits[split])).tolist() for split in SPLITS]


def signed(manifest: bytes) -> bytes:
    """With the right checksum, if it is a mapping at all: as anyone could make it."""
    try:
        values = json.loads(manifest)
        values.pop("crc32", None)
        return json.dumps({"crc32": cache._checksum(values), **values}).encode()
    except (ValueError, TypeError, AttributeError, RecursionError):
        return manifest


@given(st.data(), st.booleans())
def test_any_cache_is_read_right_or_refused(
    sound: tuple[dict[str, bytes], list[list[int]]], draw: st.DataObject, is_signed: bool
) -> None:
    whole, tokens = sound
    name = draw.draw(st.sampled_from([cache.MANIFEST, *sorted(whole)]))
    pieces = texts.JSON_PIECES if name == cache.MANIFEST else [b"\0" * 32, b"\xff"]
    content = draw.draw(mutated([whole[name]], pieces))
    if name == cache.MANIFEST and is_signed:
        content = signed(content)
    folder = Path("opened")
    folder.mkdir(exist_ok=True)
    for other, original in whole.items():
        (folder / other).write_bytes(content if other == name else original)
    with pytest.MonkeyPatch.context() as patch, limits("caches", (name, content)):
        patch.setattr(shards, "BLOCK", 32)
        try:
            read = tokens_of(cache.TokenCache(folder))
        except DataError as error:
            check_refusal(error, folder)
            return
        assert read == tokens or (is_signed and name == cache.MANIFEST)


MANIFESTS = {
    "nested": lambda _: b"[" * 100_000,
    "a number": lambda _: b"9" * 5000,
    "no mapping": lambda _: b"[1]",
    "without a split": lambda whole: signed(whole.replace(b'"val"', b'"valid"')),
    "objects": lambda whole: signed(whole.replace(b"<u2", b"O")),
    "negative": lambda whole: signed(re.sub(rb'"tokens": \d+', b'"tokens": -1', whole)),
    "few checksums": lambda whole: signed(re.sub(rb'"crc32": "\w{8}', b'"crc32": "', whole)),
    "elsewhere": lambda whole: signed(whole.replace(b"train-00000.bin", b"\\u0000")),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_of_anyones_making_is_refused(
    sound: tuple[dict[str, bytes], list[list[int]]], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BLOCK", 32)
    for name, content in sound[0].items():
        (tmp_path / name).write_bytes(content)
    tokens_of(cache.TokenCache(tmp_path))
    (tmp_path / cache.MANIFEST).write_bytes(MANIFESTS[kind](sound[0][cache.MANIFEST]))
    with pytest.raises(DataError, match="delete the folder"):
        cache.TokenCache(tmp_path)


@pytest.fixture(scope="module")
def vocabulary() -> bytes:
    """A tokenizer file with some of everything."""
    made = library.Tokenizer(library.models.BPE())
    made.normalizer = library.normalizers.NFC()
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    made.post_processor = library.processors.ByteLevel()
    trainer = library.trainers.BpeTrainer(vocab_size=40, special_tokens=["</s>"])
    made.train_from_iterator(["some words of a sample, some words"], trainer)
    made.enable_padding(length=4)
    return made.to_str().encode()


@given(st.data())
def test_any_tokenizer_file_encodes_or_is_refused(vocabulary: bytes, draw: st.DataObject) -> None:
    content = draw.draw(mutated([vocabulary], texts.JSON_PIECES))
    Path("fuzzed.json").write_bytes(content)
    with limits("tokenizers", content):
        try:
            tokenizer = tokenizers.build("fuzzed.json")
            ids = tokenizer.encode("some words of a sample, 世界")
        except DataError as error:
            check_refusal(error, "fuzzed.json")
            return
        assert ids.dtype == np.uint32
        tokenizer.decode([i for i in ids.tolist() if i < tokenizer.vocab_size])


def test_a_tokenizer_file_in_which_its_library_panics_is_refused(vocabulary: bytes) -> None:
    values = json.loads(vocabulary)
    values["model"]["continuing_subword_prefix"] = "long prefix"
    Path("panic.json").write_text(json.dumps(values))
    with pytest.raises(
        DataError, match=r"panic\.json is not a JSON file of the `tokenizers` library, or not a sound one"
    ):
        tokenizers.build("panic.json")


# --- checkpoints


def read_checkpoint(target: str, content: bytes, suffix: str) -> None:
    """Read it in each of the ways that there are."""
    path = Path(f"{next(number)}{suffix}")
    path.write_bytes(content)
    network = checkpoints.Small()
    ways = (weights.read, lambda p: weights.load(network, p), lambda p: weights.check_resumable(network, p))
    try:
        with limits(target, content), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of kinds of tensors that are still in the making
            for read in ways:
                try:
                    read(path)
                except ValueError as error:
                    check_refusal(error, path)
    finally:
        path.unlink()
    assert not os.path.lexists(checkpoints.CANARY), "the file brought code along, and it was run"


@given(checkpoints.DAMAGED, st.sampled_from([".ckpt", ".ckpt", weights.EXPORTED]))
@example(checkpoints.GOOD[:-1], ".ckpt")
@example(b"", ".ckpt")
def test_any_checkpoint_is_loaded_or_refused(content: bytes, suffix: str) -> None:
    read_checkpoint("checkpoints", content, suffix)


WHOLE = checkpoints.checkpoint(checkpoints.state())


@given(checkpoints.CONTENTS, st.booleans())
@example(checkpoints.checkpoint({1: None}), True)
@example(checkpoints.checkpoint({**WHOLE["state_dict"], "model.counts": "text"}), True)
@example(checkpoints.checkpoint({**WHOLE["state_dict"], "model.inner.weight": torch.zeros(2, 3).to_sparse()}), True)
@example({**WHOLE, "global_step": []}, True)
@example({**WHOLE, "state_dict": torch.zeros(1)}, True)
def test_any_content_of_a_checkpoint_is_loaded_or_refused(content: Any, is_zipped: bool) -> None:
    try:
        raw = checkpoints.saved(content, _use_new_zipfile_serialization=is_zipped)
    except Exception:  # torch does not save every tensor
        reject()
    read_checkpoint("contents", raw, ".ckpt")


@given(checkpoints.CALLING)
def test_no_code_in_a_checkpoint_is_run(content: bytes) -> None:
    read_checkpoint("calls", content, ".ckpt")


def test_code_that_is_run_is_seen(desk: Path) -> None:
    """Else the test above could not fail."""
    torch.load(io.BytesIO(checkpoints.saved(checkpoints.CALL)), weights_only=False)
    assert (desk / checkpoints.CANARY).exists()
    (desk / checkpoints.CANARY).unlink()


@pytest.mark.parametrize("part", ["archive/data.pkl", "archive/data/0"])
def test_a_part_that_unpacks_to_a_thousand_times_the_file_is_refused(part: str) -> None:
    parts = {**checkpoints.entries(checkpoints.GOOD), part: b"\0" * (1 << 26)}
    read_checkpoint("zip bombs", checkpoints.zipped(parts.items(), zipfile.ZIP_DEFLATED), ".ckpt")
