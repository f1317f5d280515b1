"""The huggingface source, on data sets in a local folder: no network is used."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from longnet_kit.data import DataError, cache, tokenizers
from longnet_kit.data.huggingface import HuggingFace
from longnet_kit.data.sources import SPLITS, split_of


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of 300 training and 4 validation records."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    made = tmp_path / "set"
    made.mkdir()
    for split, count in (("train", 300), ("validation", 4)):
        records = [json.dumps({"id": i, "body": f"{split} récord {i}\n"}) for i in range(count)]
        (made / f"{split}.jsonl").write_text("\n".join(records))
    return made


def test_records_are_shared_out_by_their_number(folder: Path) -> None:
    documents = list(HuggingFace(str(folder), field="body").documents(as_bytes=True))
    assert [d.content for d in documents] == [f"train récord {i}\n" for i in range(300)]
    assert [d.split for d in documents] == [split_of(f"train {i}") for i in range(300)]
    assert {d.split for d in documents} == set(SPLITS)


def test_a_split_of_its_own_takes_no_others(folder: Path) -> None:
    source = HuggingFace(str(folder), field="body", val_split="validation", max_documents=100)
    found = [(d.split, d.content) for d in source.documents(as_bytes=False)]
    assert [text for split, text in found if split == "val"] == [f"validation récord {i}\n" for i in range(4)]
    assert sum(split != "val" for split, _ in found) == 100, "at most so many of each split"
    assert {split for split, _ in found} == set(SPLITS)


def test_it_fills_the_token_cache(folder: Path, tmp_path: Path) -> None:
    source = HuggingFace(
        "json", field="body", data_files=[str(folder / "train.jsonl")], val_split="train[:5]", test_split="train[5:9]"
    )
    with pytest.raises(DataError, match="cannot be read"):  # slices cannot be streamed
        cache.build(source, tokenizers.build("bytes"), tmp_path)
    source = HuggingFace("json", field="body", data_files=[str(folder / "train.jsonl")])
    built = cache.build(source, tokenizers.build("bytes"), tmp_path)
    assert built.name.startswith("json-bytes-")
    splits = cache.TokenCache(built).splits
    assert sum(len(reader) for reader in splits.values()) == sum(len(f"train récord {i}\n") + 2 for i in range(300))
    (folder / "train.jsonl").write_text('{"body": "x"}')
    assert cache.folder_of(source, tokenizers.build("bytes"), tmp_path) != built, "its files have changed"


def test_the_fingerprint_names_what_is_read(folder: Path) -> None:
    options = [{}, {"field": "body"}, {"val_split": "validation"}, {"revision": "abc"}, {"max_documents": 3}]
    prints = [json.dumps(HuggingFace(str(folder), **o).fingerprint()) for o in options]  # type: ignore[arg-type]
    assert len(set(prints)) == len(prints)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"field": "text"}, r"record 0 has no text under 'text' \(its columns: 'id', 'body'\); set data.field"),
        ({"field": "id"}, r"record 0 has no text under 'id'"),
        ({"split": "trian", "field": "body"}, r"the split 'trian' of .* cannot be read: "),
        ({"subset": "nope", "field": "body"}, r"cannot be read: "),
        ({"data_files": ["missing.jsonl"], "field": "body"}, r"cannot be read: "),
    ],
)
def test_what_does_not_exist_is_told(folder: Path, options: dict, told: str) -> None:
    with pytest.raises(DataError, match=told):
        list(HuggingFace(str(folder), **options).documents(as_bytes=False))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'longnet_kit\[huggingface\]'"):
        HuggingFace("any")
