"""Text from a data set of the Hugging Face hub, or of its `datasets` library's local formats; an optional extra.

The set is streamed into the token cache: it is neither stored in the library's own format nor held in memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from longnet_kit import durable
from longnet_kit.data.errors import DataError
from longnet_kit.data.files import HEAD, kind_of, not_text
from longnet_kit.data.sources import Document, Source, Split, registry, split_of, stamp
from longnet_kit.typed import Range


@registry.register("huggingface")
class HuggingFace(Source):
    """A data set by name.

    A split with one of its own (`val_split`, `test_split`) takes exactly that. The records of `split` are shared out
    90 : 5 : 5 by a hash of their number among the rest.

    Args:
        path: a name on the hub (`roneneldan/TinyStories`), a local folder, or a format (`json`, `parquet`, `text`) with
            `data_files`.
        subset: which configuration of the set, where it has several.
        split: its split to train on.
        val_split, test_split: its splits to validate and test on.
        field: the column that holds the text.
        revision: a commit, branch or tag on the hub. Once the cache is built, a change on the hub under the same
            revision is not noticed.
        data_files: files of the set to use, local paths among them.
        max_documents: at most so many records of each split.

    Raises:
        DataError: the library is not installed, or `path` is `text` and a local file holds a table, a tar archive or
            UTF-16. Reading raises it for a set, split or column that does not exist.
    """

    def __init__(
        self,
        path: str,
        subset: str | None = None,
        split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        field: str = "text",
        revision: str | None = None,
        data_files: Sequence[str] | None = None,
        max_documents: Annotated[int, Range(at_least=1)] | None = None,
    ) -> None:
        _datasets()
        self._path = path
        self._files = [os.path.expanduser(file) for file in data_files] if data_files is not None else None
        if problems := [f"data.data_files: {wrong}" for wrong in self._not_text()]:
            raise DataError("\n".join(problems))
        self._options = {"subset": subset, "field": field, "revision": revision, "max_documents": max_documents}
        given: dict[Split, str | None] = {"train": split, "val": val_split, "test": test_split}
        self._splits: dict[Split, str] = {ours: theirs for ours, theirs in given.items() if theirs is not None}
        self._field = field
        self._max_documents = max_documents
        self.label = path.strip("/").split("/")[-1]

    def documents(self, as_bytes: bool) -> Iterator[Document]:
        own = frozenset(self._splits) - {"train"}
        for ours, theirs in self._splits.items():
            for number, record in enumerate(islice(self._records(theirs), self._max_documents)):
                where = f"{self._path}, {theirs} record {number}"
                text = record.get(self._field)
                if not isinstance(text, str):
                    keys = ", ".join(map(repr, record))
                    raise DataError(
                        f"{where} has no text under {self._field!r} (its columns: {keys}); set data.field to the "
                        "column of the text"
                    )
                text = text.removeprefix("\ufeff")  # the library keeps a byte-order mark
                yield Document(where, text, ours if ours != "train" else split_of(f"{theirs} {number}", own))

    def fingerprint(self) -> Any:
        local = os.path.expanduser(self._path)
        files = [Path(file) for file in self._files or []]
        files += sorted(path for path in Path(local).rglob("*") if path.is_file()) if os.path.isdir(local) else []
        stamps = [[str(file), *stamp(file)] for file in files]
        return {"path": self._path, "splits": dict(self._splits), **self._options, "files": stamps}

    def _not_text(self) -> Iterator[str]:
        """What the library would read as text of local files that are none; it unpacks compressed ones."""
        for path in map(Path, (self._files or []) if self._path == "text" else []):
            if os.path.isfile(path):
                with suppress(OSError), durable.opened(path) as file:
                    head = file.read(HEAD)
                    if kind_of(path, head) in ("table", "tar", "UTF-16"):
                        yield f"{path} {not_text(path, head)}"

    def _records(self, split: str) -> Iterator[dict[str, Any]]:
        """The records of one of the set's own splits; whatever goes wrong in the library names the set."""
        try:
            yield from _datasets().load_dataset(
                os.path.expanduser(self._path),
                self._options["subset"],
                data_files=self._files,
                split=split,
                revision=self._options["revision"],
                streaming=True,
            )
        except Exception as error:  # network, parsing and look-up errors of several libraries
            reason = str(error).strip() or type(error).__name__
            raise DataError(
                f"data.source huggingface: the split {split!r} of {self._path!r} cannot be read: {reason}\n"
                "Check path, subset, split and data_files, and the network for a set on the hub"
            ) from error


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "data.source huggingface needs the library datasets, which is not installed; "
            "pip install 'longnet_kit[huggingface]' (or pip install datasets)"
        ) from error
    return datasets
