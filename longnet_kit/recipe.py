"""The recipe of an experiment: typed defaults <- what it extends <- its file <- the command line's key.path=value.

Mappings merge, lists replace, later layers win; a layer that changes a selector (`model.attention.backend`,
`data.source`, `strategy.name`) starts that mapping afresh. Everything wrong in any layer is told at once, with the line
it stands in, before anything is built. Importing this imports neither torch nor Lightning; loading a recipe does.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from longnet_kit import interpolation, plugins, recipe_files, runs, shipped, typed
from longnet_kit.errors import UserError
from longnet_kit.recipe_files import Layer
from longnet_kit.recipe_schema import (
    SECTIONS,
    SELECTORS,
    Checkpoint,
    Data,
    Model,
    Optimizer,
    Recipe,
    Strategy,
    names,
)
from longnet_kit.recipe_yaml import Dumper, Excess, Problem

__all__ = [
    "Checkpoint", "Data", "Model", "Optimizer", "Recipe", "RecipeError", "Strategy", "dumps", "load",
    "load_saved", "loads", "parse_options", "save", "to_dict",
]  # fmt: skip

Values = dict[str, Any]


class RecipeError(UserError):
    """A recipe that cannot be used; `problems` are all reasons, and the message has each on a line of its own."""

    def __init__(self, subject: str, problems: Sequence[Problem | typed.Problem]) -> None:
        self.problems = list(problems)
        lines = [str(problem) for problem in self.problems]
        super().__init__(lines[0] if len(lines) == 1 else "\n  ".join([f"{subject}: {len(lines)} problems", *lines]))


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge and check a recipe.

    Args:
        path: a YAML file, or the name of a shipped recipe, like `quickstart` or `paper/longnet_32k`.
        overrides: `key.path=value` items, values in YAML.

    Returns:
        The complete recipe; `notes` says what was adapted.

    Raises:
        RecipeError: the file cannot be read, or keys are unknown, mistyped, out of range or at odds with each other.
    """
    return _load(path, overrides, None)


def _load(path: str | Path, overrides: Sequence[str], origin: Path | None) -> Recipe:
    file = _find(path)
    files, found, complete = recipe_files.read_chain(file)
    return _merged(str(path), file, files if complete else None, found, overrides, origin)


def loads(text: str, file: Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe that `dumps` wrote, as `load` reads it; `file` is where it was found, and plug-ins are beside that.

    Raises:
        RecipeError: as of `load`.
        UserError: its plug-ins are not trusted, see `plugins.check_trust`.
    """
    layer, found = recipe_files.read_text(text, recipe_files.show(file), file.parent)
    return _merged(str(file), file, None if layer is None else [layer], found, overrides, file)


def _merged(
    subject: str,
    file: Path,
    files: list[Layer] | None,
    found: list[Problem],
    overrides: Sequence[str],
    origin: Path | None,
) -> Recipe:
    """Merge and check layers, lowest first, and the command line's items over them; None: they could not be read.

    `origin` is the run or exported file that the recipe is of; None where the user has named the recipe itself.
    """
    dotlist, problems = recipe_files.parse_dotlist(overrides)
    problems = found + problems
    if files is None:
        raise RecipeError(subject, problems)
    layers = [*files, dotlist]
    merged = reduce(overlay, (layer.values for layer in layers), defaults())
    try:
        merged, wrong = interpolation.resolve(merged)
        merged = overlay(defaults(), merged)  # for a mapping that stood for another one
    except Excess as error:
        raise RecipeError(subject, [*problems, Problem("", subject, f"with its ${{...}} replaced, {error}")]) from error
    wrong += _import(merged, layers, origin)

    from longnet_kit import recipe_checks  # torch and Lightning, in whose classes the allowed keys are written

    wrong += recipe_checks.problems(merged)
    problems += [_place(problem, layers, file) for problem in wrong]
    problems = _first_of_each_key(problems)
    if problems:
        raise RecipeError(subject, problems)
    return _clip(_construct(recipe_checks.choices(merged)))


def load_saved(run_directory: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that a run directory holds, as `load` reads it.

    `init_from` and `resume` count as null: they say where the run came from, and that may have moved since.

    Raises:
        RecipeError: as of `load`.
        UserError: its plug-ins are not trusted, see `plugins.check_trust`.
    """
    return _load(run_directory / runs.RECIPE, ["init_from=null", "resume=null", *overrides], run_directory)


def parse_options(items: Sequence[str]) -> Values:
    """`key=value` items as a nested mapping, its `imports` imported and taken out.

    Raises:
        RecipeError: an item is malformed, or `imports` is no list of modules that can be imported.
    """
    layer, problems = recipe_files.parse_dotlist(items)
    wrong = typed.value_problems(layer.values.get("imports", []), list[str], "imports")
    wrong = wrong or _import(layer.values, [layer])
    if problems or wrong:
        raise RecipeError("options", [*problems, *(_place(problem, [layer], None) for problem in wrong)])
    layer.values.pop("imports", None)
    return layer.values


def to_dict(recipe: Recipe) -> Values:
    """The recipe as plain nested mappings, laid out as in YAML."""
    values = {key: copy.deepcopy(getattr(recipe, key)) for key in names(Recipe) if key not in SECTIONS}
    for section, cls in SECTIONS.items():
        values[section] = {key: copy.deepcopy(getattr(getattr(recipe, section), key)) for key in names(cls)}
    values["data"] |= copy.deepcopy(recipe.data.options)
    values["optimizer"]["betas"] = list(recipe.optimizer.betas)
    return {key: values[key] for key in names(Recipe)}


def dumps(recipe: Recipe) -> str:
    """The recipe as YAML that `load` reads back as it is."""
    values = interpolation.escape(to_dict(recipe))
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def save(recipe: Recipe, path: str | Path) -> None:
    """Write the recipe as a YAML file."""
    Path(path).write_text(dumps(recipe), encoding="utf-8", newline="\n")


def defaults() -> Values:
    """The typed defaults: the lowest layer of every recipe. The name has none."""
    return {key: value for key, value in to_dict(Recipe(name="")).items() if key != "name"}


def overlay(below: Values, above: Values, path: str = "") -> Values:
    """`above` over `below`: mappings merge, everything else replaces; a changed selector drops what is below."""
    selector = SELECTORS.get(path)
    if selector is not None and selector in above and above[selector] != below.get(selector):
        below = _at(defaults(), path)
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, dict):
            old = merged.get(key)
            merged[key] = overlay(old if isinstance(old, dict) else {}, value, typed.join(path, key))
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _at(values: Values, path: str) -> Values:
    """The mapping at a dotted path; empty when there is none."""
    for key in path.split("."):
        values = values.get(key, {})
    return values


def _find(path: str | Path) -> Path:
    try:
        return shipped.find(path)
    except UserError as error:
        if Path(path).is_dir():
            return Path(path)  # told of when it is read
        raise RecipeError(str(path), [Problem("", "", str(error))]) from error
    except OSError as error:  # no file can have such a name
        raise RecipeError(str(path), [Problem("", str(path), f"cannot be read: {error.strerror}")]) from error


def _import(merged: Values, layers: Iterable[Layer], origin: Path | None = None) -> list[typed.Problem]:
    """Import the plug-ins; in `merged`, name them so that they are found from the run directory too."""
    entries = merged.get("imports")
    if not isinstance(entries, list):
        return []
    if origin is not None:
        plugins.check_trust([entry for entry in entries if isinstance(entry, str)], origin)
    folders = [layer.folder for layer in reversed(list(layers)) if layer.folder is not None]
    problems: list[typed.Problem] = []
    for i, entry in enumerate(entries):
        if not isinstance(entry, str):
            continue
        try:
            entries[i] = plugins.load(entry, folders)
        except UserError as error:
            problems.append(typed.Problem(f"imports[{i}]", str(error)))
    return problems


def _first_of_each_key(problems: Iterable[Problem]) -> list[Problem]:
    """One problem per key: a value that could not be read or resolved is not to be told of as null or missing too."""
    seen: set[str] = set()
    return [p for p in problems if not p.key or not (p.key in seen or seen.add(p.key))]


def _place(problem: typed.Problem, layers: Sequence[Layer], file: Path | None) -> Problem:
    """Add where the key stands: in the highest layer that has it, or has a mapping or list around it.

    What is missing is asked for by the selector beside it.
    """
    key = problem.key
    section = key.rpartition(".")[0]
    if problem.message.startswith("missing") and section in SELECTORS:
        key = typed.join(section, SELECTORS[section])
    while key:
        for layer in reversed(layers):
            if key in layer.places:
                return Problem(problem.key, layer.places[key], problem.message)
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
    return Problem(problem.key, recipe_files.show(file) if file else "", problem.message)


def _construct(values: Values) -> Recipe:
    """The typed recipe, from values that were checked."""
    data = values["data"]
    options = {key: value for key, value in data.items() if key not in names(Data)}
    arguments = values | {
        "data": {key: value for key, value in data.items() if key not in options} | {"options": options},
        "optimizer": values["optimizer"] | {"betas": tuple(values["optimizer"]["betas"])},
        "extends": None,
    }
    arguments |= {name: cls(**arguments[name]) for name, cls in SECTIONS.items()}
    return Recipe(**arguments)


def _clip(recipe: Recipe) -> Recipe:
    """Fit what a lower max_steps or seq_len has outrun, and note it."""
    max_steps, seq_len = recipe.trainer["max_steps"], recipe.data.seq_len
    optimizer, data = recipe.optimizer, recipe.data
    notes: list[str] = []
    if optimizer.warmup_steps > max_steps:
        notes.append(f"optimizer.warmup_steps {optimizer.warmup_steps} clipped to trainer.max_steps {max_steps}")
        optimizer = dataclasses.replace(optimizer, warmup_steps=max_steps)
    if any(context > seq_len for context in data.eval_contexts):
        contexts = list(dict.fromkeys(min(context, seq_len) for context in data.eval_contexts))
        notes.append(f"data.eval_contexts {data.eval_contexts} clipped to {contexts} by data.seq_len {seq_len}")
        data = dataclasses.replace(data, eval_contexts=contexts)
    from longnet_kit.model import weight_dtype
    from longnet_kit.tasks import optimization

    precision = str(recipe.trainer["precision"])
    if optimization.decay_vanishes(optimizer, weight_dtype(precision)):
        lost = f"weight_decay {optimizer.weight_decay:g} at lr {optimizer.lr:g} is lost in the rounding of the weights"
        notes.append(f"optimizer.{lost} under trainer.precision {precision}; it works under bf16-mixed or 16-mixed")
    strategy = recipe.strategy
    if strategy.name.startswith("sequence_parallel") and strategy.sequence_parallel_size == 1:
        notes.append(f"strategy {strategy.name} with strategy.sequence_parallel_size 1 divides no sequence")
    return dataclasses.replace(recipe, optimizer=optimizer, data=data, notes=notes)
