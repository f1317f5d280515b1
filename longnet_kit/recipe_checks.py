"""What is wrong with the merged keys of a recipe: unknown, mistyped, out of range, at odds with each other.

Every check adds to one list. Registries and Lightning are imported lazily, since their classes say what is allowed.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from longnet_kit import recipe_schema as schema
from longnet_kit import recipe_together, typed
from longnet_kit.errors import UserError
from longnet_kit.recipe_strategy import mapping_at
from longnet_kit.typed import Problem, join

if TYPE_CHECKING:
    from longnet_kit.registry import Registry

Values = dict[str, Any]

OTHER_NAMES = {
    "learning_rate": "optimizer.lr",
    "hidden_size": "model.dim",
    "d_model": "model.dim",
    "context_length": "data.seq_len",
    "epochs": "trainer.max_steps",
}
"""What some keys are called elsewhere."""


def problems(values: Values) -> list[Problem]:
    """Everything wrong with the keys of a recipe, `values` being nested and with the typed defaults filled in."""
    known = _known(values)
    found: list[Problem] = []
    found += _function_problems(schema.Recipe, _without(values, schema.SECTIONS, "trainer"), "", known, _is_top_level)
    for name, cls in schema.SECTIONS.items():
        mapping = values.get(name)
        if not isinstance(mapping, dict):
            given = "null" if mapping is None else repr(mapping)
            found.append(Problem(name, f"got {given}, expected a mapping; leave {name} out for its defaults"))
        elif name == "data":
            own = {key: value for key, value in mapping.items() if key in schema.names(cls)}
            found += _function_problems(cls, own, name, known)
        else:
            found += _function_problems(cls, mapping, name, known)
    found += _trainer_problems(values.get("trainer"), known)
    found += _plugin_problems(values, known)
    # How keys go together is only worth saying of keys that are right by themselves.
    wrong = {re.sub(r"\[.*", "", problem.key) for problem in found}
    return found + [p for keys, p in recipe_together.problems(values) if not any(_touches(key, wrong) for key in keys)]


def choices(values: Values) -> Values:
    """`values` with the defaults of the chosen attention backend and data source written out."""
    from longnet_kit import attention, data

    filled = dict(values)
    for name, registry, mapping in (
        ("attention", attention.registry, values["model"]["attention"]),
        ("data", data.registry, values["data"]),
    ):
        parameters = typed.parameters(registry.get(mapping[registry.selector])).values()
        defaults = {p.name: _plain(p.default) for p in parameters if p.default is not p.empty}
        complete = mapping | {key: value for key, value in defaults.items() if key not in mapping and value is not ...}
        if name == "data":
            filled["data"] = complete
        else:
            filled["model"] = values["model"] | {"attention": complete}
    return filled


def _plain(value: Any) -> Any:
    """A default as YAML can hold it; `...` when it cannot."""
    if isinstance(value, (list, tuple)):
        items = [_plain(item) for item in value]
        return ... if ... in items else items
    return value if value is None or isinstance(value, (bool, int, float, str)) else ...


def _function_problems(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    key: str,
    known: Iterable[str],
    admits: Callable[[str], bool] = lambda name: name not in ("options", "notes"),
) -> list[Problem]:
    """As `typed.argument_problems`, but what an unknown key may have meant is searched in the whole recipe."""
    taken = typed.parameters(function)
    free = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    fitting = {name: value for name, value in arguments.items() if free or (name in taken and admits(name))}
    unknown = [name for name in arguments if name not in fitting]
    return [Problem(join(key, name), f"unknown key; {_meant(join(key, name), known)}") for name in unknown] + (
        typed.argument_problems(function, fitting, key)
    )


def _trainer_problems(trainer: Any, known: Iterable[str]) -> list[Problem]:
    from lightning import Trainer

    if not isinstance(trainer, dict):
        given = "null" if trainer is None else repr(trainer)
        return [Problem("trainer", f"got {given}, expected a mapping that has at least max_steps")]
    found = [
        Problem(f"trainer.{name}", f"a recipe cannot set it: {why}")
        for name, why in schema.TRAINER_REFUSED.items()
        if name in trainer
    ]
    for name, value in trainer.items():
        if name in schema.TRAINER_TYPES:
            found += typed.value_problems(value, schema.TRAINER_TYPES[name], f"trainer.{name}")
    if "max_steps" not in trainer:
        found.append(Problem("trainer.max_steps", "missing; expected a whole number at least 1, the length of the run"))
    rest = _without(trainer, schema.TRAINER_REFUSED, *schema.TRAINER_TYPES)
    return found + _function_problems(Trainer, rest, "trainer", known)


def _plugin_problems(values: Values, known: Iterable[str]) -> list[Problem]:
    """Of what registered classes decide: the task, the attention backend, the data source."""
    from longnet_kit import data, tasks
    from longnet_kit.data import tokenizers

    found: list[Problem] = []
    task = values.get("task")
    if isinstance(task, str) and (refusal := tasks.registry.refusal(task)):
        found.append(Problem("task", refusal))
    config = mapping_at(values, "model").get("attention")
    if isinstance(config, dict):
        found += _attention_problems(config, known)
    source = mapping_at(values, "data")
    if isinstance(source.get("source"), str):
        options = _without(source, [n for n in schema.names(schema.Data) if n != "source"])
        found += _registered_problems(data.registry, options, "data", known)
        name = source["source"]
        if isinstance(task, str) and not tasks.registry.refusal(task) and not data.registry.refusal(name):
            takes = getattr(tasks.registry.get(task), "takes", ("text",))
            supplies = getattr(data.registry.get(name), "supplies", "text")
            if supplies not in takes:
                fitting = [n for n in tasks.names() if supplies in getattr(tasks.registry.get(n), "takes", ("text",))]
                message = f"got {task!r}, which takes {' or '.join(takes)}, and data.source {name} supplies {supplies}"
                found.append(Problem("task", f"{message}; tasks for it: {', '.join(fitting)}"))
    tokenizer = source.get("tokenizer")
    if isinstance(tokenizer, str):
        found += _construction_problems(lambda: tokenizers.build(tokenizer), "data.tokenizer")
    return found


def _attention_problems(config: Values, known: Iterable[str]) -> list[Problem]:
    from longnet_kit import attention
    from longnet_kit.attention import patterns

    key, pattern = "model.attention", config.get("pattern")
    found = _registered_problems(attention.registry, config, key, known)
    within: list[Problem] = []
    if isinstance(pattern, dict):
        within = _registered_problems(patterns.registry, pattern, join(key, "pattern"), known)
        if not isinstance(pattern.get(patterns.registry.selector, ""), str):
            return found or within
    found = found or _construction_problems(lambda: attention.build(config), key)
    # A backend whose pattern is a registered one says so; another's may be any mapping.
    return within if within and any(patterns.registry.kind in problem.message for problem in found) else found


def _registered_problems(registry: Registry[Any], config: Values, key: str, known: Iterable[str]) -> list[Problem]:
    name = config.get(registry.selector)
    if not isinstance(name, str):
        given = "missing" if name is None else f"got {name!r}, which is no {registry.kind}"
        return [Problem(join(key, registry.selector), f"{given}; known: {', '.join(registry.names())}")]
    if refusal := registry.refusal(name):
        return [Problem(join(key, registry.selector), refusal)]
    return _function_problems(registry.get(name), _without(config, [registry.selector]), key, known)


def _construction_problems(construct: Callable[[], Any], key: str) -> list[Problem]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # building the model says it again
        try:
            construct()
        except UserError as error:
            return [Problem(key, str(error).removeprefix(f"{key}: "))]
    return []


def _known(values: Values) -> list[str]:
    """Every key that this recipe could have, as dotted paths."""
    from lightning import Trainer

    from longnet_kit import attention, data
    from longnet_kit.attention import patterns

    backend = mapping_at(values, "model").get("attention")
    paths = schema.names(schema.Recipe)
    for name, cls in schema.SECTIONS.items():
        paths += [join(name, key) for key in schema.names(cls)]
    arguments = typed.parameters(Trainer)
    paths += [join("trainer", key) for key in arguments if key not in schema.TRAINER_REFUSED]
    for registry, key, config in (
        (attention.registry, "model.attention", backend),
        (patterns.registry, "model.attention.pattern", backend.get("pattern") if isinstance(backend, dict) else None),
        (data.registry, "data", mapping_at(values, "data")),
    ):
        name = config.get(registry.selector) if isinstance(config, dict) else None
        taken = typed.parameters(registry.get(name)) if name in registry.names() else ()
        paths += [join(key, option) for option in (registry.selector, *taken)]
    return list(dict.fromkeys(paths))


def _meant(path: str, known: Iterable[str]) -> str:
    """A hint at the key that a misspelled or misplaced one is nearest to."""
    section, _, name = path.rpartition(".")
    if path in known:
        return f"write it as {section} with {name} inside it, not with a dot"
    if name in OTHER_NAMES:
        return f"did you mean {OTHER_NAMES[name]}?"
    alike = typed.likeness(name, {other.rpartition(".")[2] for other in known})
    scores: dict[str, float] = {}
    for other in known:
        home, _, key = other.rpartition(".")
        near = home == section
        if alike.get(key, 0) >= (0.6 if near else 0.75):
            scores[other] = alike[key] + (0.1 if near else 0)
    if scores:
        return f"did you mean {max(scores, key=lambda other: scores[other])}?"
    here = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == section]
    return (
        f"known{f' in {section}' if section else ''}: {', '.join(sorted(here))}" if here else "nothing is allowed here"
    )


def _is_top_level(name: str) -> bool:
    return name != "notes"


def _touches(key: str, wrong: set[str]) -> bool:
    """Whether a key, or one around it or inside it, is wrong."""
    return any(key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.") for other in wrong)


def _without(values: Mapping[str, Any], names: Iterable[str], *more: str) -> Values:
    dropped = {*names, *more}
    return {key: value for key, value in values.items() if key not in dropped}
