"""Text in, batches of tokens out: sources by name, tokenizers, the token cache, and the data module over them.

Importing this package imports neither torch nor Lightning, so that recipes can be checked without them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from longnet_kit.data import files as _files  # noqa: F401  (importing a source registers it)
from longnet_kit.data import huggingface as _huggingface  # noqa: F401
from longnet_kit.data import labelled_files as _labelled_files  # noqa: F401
from longnet_kit.data import listops as _listops  # noqa: F401
from longnet_kit.data import many_shot as _many_shot  # noqa: F401
from longnet_kit.data import recall as _recall  # noqa: F401
from longnet_kit.data.answers import Answer, AnswersSource, Example
from longnet_kit.data.errors import DataError
from longnet_kit.data.labels import Labelled, LabelledSource
from longnet_kit.data.sources import Document, Source, registry
from longnet_kit.errors import UserError

if TYPE_CHECKING:
    from longnet_kit import recipe
    from longnet_kit.data.language_modeling import LanguageModelingData

__all__ = [
    "Answer",
    "AnswersSource",
    "DataError",
    "Document",
    "Example",
    "Labelled",
    "LabelledSource",
    "LanguageModelingData",
    "Source",
    "build",
    "build_source",
    "names",
    "register",
    "registry",
]

register = registry.register
names = registry.names

_MODULE_KEYS = ("tokenizer", "seq_len", "batch_size", "num_workers", "cache_dir")
_IGNORED_KEYS = ("eval_contexts",)  # the task's business


def build(data: recipe.Data | Mapping[str, Any], seed: int = 0) -> LanguageModelingData:
    """Make the data module that the `data` section of a recipe describes; nothing is read or tokenized yet.

    Args:
        data: the section, or a flat mapping as in YAML: `source`, that source's own keys, `tokenizer`, `seq_len`,
            `batch_size`, `num_workers`.
        seed: which order the training windows come in.

    Raises:
        UserError: a key is unknown, missing or of the wrong type; all such keys are told together.
        DataError: files that do not exist, or a tokenizer that cannot be had.
    """
    from longnet_kit import typed
    from longnet_kit.data.language_modeling import LanguageModelingData

    keys = _flat(data)
    module = {key: keys.pop(key) for key in _MODULE_KEYS if key in keys}
    found = typed.argument_problems(LanguageModelingData, {"source": None, "seed": seed, **module}, "data")
    found = [problem for problem in found if problem.key != "data.source"] + registry.problems(keys, "data")
    if found:
        raise UserError("\n".join(map(str, found)))
    source = registry.build(keys)
    return source.data_module()(source, seed=seed, **module)


def build_source(data: recipe.Data | Mapping[str, Any]) -> Source:
    """Make the source alone, as `build` does.

    Raises:
        UserError: its keys are unknown, missing or of the wrong type.
        DataError: files that do not exist.
    """
    return registry.build({key: value for key, value in _flat(data).items() if key not in _MODULE_KEYS})


def _flat(data: recipe.Data | Mapping[str, Any]) -> dict[str, Any]:
    """The section as one level of keys, the source's options among them."""
    if isinstance(data, Mapping):
        keys = dict(data)
    else:
        keys = {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}
    keys.update(keys.pop("options", {}))
    return {key: value for key, value in keys.items() if key not in _IGNORED_KEYS}


def __getattr__(name: str) -> Any:
    if name == "LanguageModelingData":
        from longnet_kit.data.language_modeling import LanguageModelingData

        return LanguageModelingData
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
